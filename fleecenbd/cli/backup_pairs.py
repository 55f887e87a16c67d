"""Backups under names of the user's own: a file, a device or an NBD server for each disk.

    TARGET.backing-up         until it is whole (and, of the pull, .part and .journal)
    TARGET.backing-up.lock    whose it is: locked, and the session's id in it
    TARGET.backup.json        the record; with it the backup counts
    TARGET

The record is written first and the name given then; a run that was killed between the two is
recognised by a record whose file is still called .backing-up.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fleecenbd.cli.backup_places import (
    LOCK_SUFFIX,
    Destination,
    Lock,
    belongings,
    only,
    pending_in,
    roll_all,
)
from fleecenbd.client import chains, in_place, records
from fleecenbd.client.in_place import Step
from fleecenbd.client.journal_file import sync_folder
from fleecenbd.client.leftovers import write_durably
from fleecenbd.client.records import QCOW2, RAW, BackedUp, Found, Record
from fleecenbd.engine.bitmap import Bitmap

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")
_PREFIX = re.compile(r"(raw|qcow2):")


@dataclass(frozen=True)
class Pair:
    """A disk, and where it goes as it was typed."""

    disk: str
    text: str

    @property
    def is_qcow2(self) -> bool:
        return self.text.startswith("qcow2:")

    @property
    def path(self) -> Path | None:
        """The file; None: a block device, or an NBD URI."""
        if _URI.match(self.text):
            return None
        path = Path(_PREFIX.sub("", self.text, count=1))
        try:
            return path if stat.S_ISREG(path.stat().st_mode) else None
        except OSError:
            return path


class Pairs:
    """backup_places.Places."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        onto: Path | None = None,
        is_in_place: bool = False,
        force: bool = False,
    ) -> None:
        """``onto``: the backup that an increment of the one disk builds on."""
        self._pairs = {pair.disk: pair for pair in pairs}
        self._files = {pair.disk: path for pair in pairs if (path := pair.path) is not None}
        self._onto = onto
        self._is_in_place = is_in_place
        self._force = force
        self._locks: dict[str, Lock] = {}
        self._to_replace: set[str] = set()
        """Disks whose targets were there when they were looked at."""

    @property
    def disks(self) -> list[str] | None:
        return list(self._pairs)

    def _staged(self, disk: str) -> Path:
        return in_place.staged_path(self._files[disk])

    # -- coming and going ------------------------------------------------------------------

    def enter(self, step: Step) -> None:
        for disk, path in self._files.items():
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT, "its folder does not exist; make it", str(path)
                )
            staged = self._staged(disk)
            self._locks[disk] = Lock(staged.with_name(f"{staged.name}{LOCK_SUFFIX}"), f"to {path}")
        for disk, path in self._files.items():
            if in_place.is_pending(path):
                in_place.roll_forward(path, step)  # ``made_from`` finds its record then
            elif _is_written_down(path, self._locks[disk].content):
                _give_name(path)
        folders = {path.parent for path in self._files.values()}
        if self._onto is not None:
            folders.add(self._onto.parent)
        for folder in folders:
            for path in pending_in(folder):
                if path not in self._files.values():
                    _roll_other(path, step)

    def leave(self) -> None:
        for disk, lock in self._locks.items():
            # With something that --resume can go on with, the lock's file says whose it is.
            lock.close(remove=not belongings(self._staged(disk)))
        self._locks.clear()

    def check(self) -> None:
        folders = {path.parent for path in self._files.values()}
        for disk, path in self._files.items():
            if not os.path.lexists(path):
                continue
            self._to_replace.add(disk)
            found = records.of_file(path)
            is_ours = found is not None and found.disk.disk == disk
            if not self._force and not (self._is_in_place and is_ours):
                raise FileExistsError(
                    errno.EEXIST,
                    "it is there already, and is no backup of this disk; name another file, or "
                    "write over it with --force"
                    if self._is_in_place
                    else "it is there already; name another file, or write over it with --force",
                    str(path),
                )
            above = records.dependents(path, folders)
            if above:
                raise OSError(
                    errno.EBUSY,
                    f"{above[0]} builds on it, and would be worth nothing; name another file",
                    str(path),
                )

    # -- what there is ---------------------------------------------------------------------

    def previous(self, disk: str, size: int, bitmap_id: str, since: str) -> Found | str:
        if self._is_in_place or self._onto is not None:
            path = self._files[disk] if self._onto is None else self._onto
            found = records.of_file(path)
            if found is None:
                if not path.exists():
                    return f"there is no {path}"
                return f"{path} has no record ({records.record_path(path).name}) of what it is"
            problem = records.why_not_onto(found, disk, size, bitmap_id, since)
            return problem or self._usable(found, disk)
        folder = self._files[disk].parent
        why = f"no backup of session {since} is in {folder} (--onto names one elsewhere)"
        fitting = [
            found
            for found in records.in_folder(folder)
            if found.disk.disk == disk and records.fits(found, bitmap_id, since)
        ]
        # The one that the bits are counted from rather than a later one.
        for found in sorted(fitting, key=lambda found: found.record.id != since):
            problem = records.why_not_onto(found, disk, size, bitmap_id, since)
            usable = problem or self._usable(found, disk)
            if isinstance(usable, Found):
                return usable
            why = usable
        return why

    def _usable(self, found: Found, disk: str) -> Found | str:
        if self._is_in_place:
            return found if found.disk.format == RAW else f"{found.path} is no raw file"
        real = found.path.resolve()
        if any(path.resolve() == real for path in self._files.values()):
            return f"{found.path} would be written over by what is to build on it"
        return chains.why_too_long(found, self._files[disk]) or found

    def made_from(self, session_id: str, disks: Sequence[str]) -> list[Path] | None:
        if not set(disks) <= set(self._files):
            return None
        for disk in disks:
            found = records.of_file(self._files[disk])
            if found is None or found.record.id != session_id:
                return None
            if records.why_changed(found.path, found.disk) is not None:
                return None
        return [self._files[disk] for disk in disks]

    # -- making ----------------------------------------------------------------------------

    def prepare(self, session_id: str) -> None:
        for lock in self._locks.values():
            lock.set_content(session_id)

    def is_prepared(self, session_id: str) -> bool:
        return all(lock.content == session_id for lock in self._locks.values())

    def destination(self, disk: str, previous: Found | None) -> Destination:
        pair, final = self._pairs[disk], self._files.get(disk)
        form = QCOW2 if pair.is_qcow2 else RAW
        if final is None:
            return Destination(disk, pair.text, None, None, form, shown=pair.text)
        staged = self._staged(disk)
        is_in_place = self._is_in_place and previous is not None
        return Destination(
            disk, f"{form}:{staged}", staged, final, form, previous, is_in_place, str(final)
        )

    def commit(
        self,
        record: Record,
        destinations: Sequence[Destination],
        changed: Mapping[str, Bitmap],
    ) -> list[Path]:
        files = [one for one in destinations if one.final is not None]
        stale: dict[Path, list[str]] = {}
        replaced: dict[Path, bytes | None] = {}
        """Records, as they were."""
        try:
            for one in files:
                assert one.final is not None, "chosen so"
                own = only(record, one.disk)
                if one.in_place:
                    assert one.previous is not None, "it goes into that"
                    before = one.previous.disk
                    names = _checksums(one.final, before)
                    in_place.set_mark(one.final, own, before, changed[one.disk], names)
                    continue
                self._check_name(one.disk, one.final)
                old = records.of_file(one.final)
                stale[one.final] = [] if old is None else _checksums(one.final, old.disk)
                path = records.record_path(one.final)
                replaced[path] = path.read_bytes() if path.exists() else None
                records.write(path, own)
        except OSError:
            _put_back(replaced)
            raise
        for final, names in stale.items():
            for name in names:
                final.with_name(name).unlink(missing_ok=True)
            _give_name(final)
        return [one.final for one in files if one.final is not None]

    def _check_name(self, disk: str, path: Path) -> None:
        if not self._force and disk not in self._to_replace and os.path.lexists(path):
            raise FileExistsError(
                errno.EEXIST,
                "has come to be there meanwhile; name another file, or write over it with --force",
                str(path),
            )

    def settle(self, destinations: Sequence[Destination], step: Step) -> None:
        for one in destinations:
            if one.in_place and one.final is not None:
                in_place.roll_forward(one.final, step)

    def clean(self) -> None:
        for disk, path in self._files.items():
            if in_place.is_pending(path):
                continue
            for left in belongings(self._staged(disk)):
                left.unlink(missing_ok=True)
            for unwritten in (in_place.mark_path(path), records.record_path(path)):
                unwritten.with_name(f"{unwritten.name}.new").unlink(missing_ok=True)
            self._locks[disk].set_content("")

    def clean_after(self, session_id: str) -> None:
        for folder in {path.parent for path in self._files.values()}:
            for path in folder.glob(f"*{in_place.STAGED_SUFFIX}{LOCK_SUFFIX}"):
                target = path.with_name(
                    path.name.removesuffix(f"{in_place.STAGED_SUFFIX}{LOCK_SUFFIX}")
                )
                if target in self._files.values() or in_place.is_pending(target):
                    continue
                with suppress(OSError):  # somebody is at work there
                    _clean_one(Lock(path, f"to {target}"), target, session_id)


def _checksums(target: Path, disk: BackedUp) -> list[str]:
    """Files beside a backup that are true of it as it was."""
    return [] if disk.checksum is None else [f"{target.name}.{disk.checksum.algorithm}"]


def _put_back(replaced: Mapping[Path, bytes | None]) -> None:
    """What these records tell of is still there, under its name."""
    for path, content in replaced.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_durably(str(path), content)


def _roll_other(target: Path, step: Step) -> None:
    """Roll forward what another run has left, unless it is at work: then it does that itself."""
    staged = in_place.staged_path(target)
    try:
        lock = Lock(staged.with_name(f"{staged.name}{LOCK_SUFFIX}"), f"to {target}")
    except OSError:
        return
    try:
        roll_all([target], step)
    finally:
        lock.close(remove=not belongings(staged))


def _is_written_down(target: Path, session_id: str) -> bool:
    """Was its run killed between the record and the name?"""
    found = records.of_file(target)
    return (
        found is not None
        and found.record.id == session_id
        and records.why_changed(in_place.staged_path(target), found.disk) is None
    )


def _give_name(target: Path) -> None:
    staged = in_place.staged_path(target)
    for path in belongings(staged):
        # Its checksum, too.
        os.rename(path, target.with_name(target.name + path.name.removeprefix(staged.name)))
    sync_folder(str(target))


def _clean_one(lock: Lock, target: Path, session_id: str) -> None:
    is_of_it = lock.content == session_id
    try:
        if is_of_it and _is_written_down(target, session_id):
            _give_name(target)
        elif is_of_it:
            for left in belongings(in_place.staged_path(target)):
                left.unlink(missing_ok=True)
    finally:
        lock.close(remove=is_of_it)
