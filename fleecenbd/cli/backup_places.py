"""Where backups go, whatever kind of place it is: what each kind must be able to do."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from fleecenbd.cli import logs
from fleecenbd.client import in_place, records
from fleecenbd.client.in_place import Step
from fleecenbd.client.records import BackedUp, BitmapUse, Found, Record, RecordedChecksum
from fleecenbd.engine.bitmap import Bitmap

LOCK_SUFFIX = ".lock"
LOCK_TRIES = 10
"""How often a lock's file that goes just while it is being locked is made again."""


@dataclass(frozen=True)
class Destination:
    """Where one disk of a session goes."""

    disk: str
    target: str
    """For the pull: a path with its format, or what was typed."""
    staged: Path | None
    """What the file is called until it has its record; None: it is no file."""
    final: Path | None
    """What it is called then."""
    format: Literal["raw", "qcow2"]
    previous: Found | None = None
    """What it builds on; None: it is a full backup."""
    in_place: bool = False
    """It goes into what it builds on."""
    shown: str = ""
    """What to call it in a message."""

    @property
    def backing(self) -> str | None:
        """What the file is to be told that it builds on: a path seen from its folder, so that all
        can be moved together."""
        if self.previous is None or self.in_place or self.final is None:
            return None
        return os.path.relpath(self.previous.path.resolve(), self.final.parent.resolve())


class Places(Protocol):
    """Pairs of disk and file, or a folder of nights. Calls block, and raise OSError."""

    @property
    def disks(self) -> list[str] | None:
        """What is to be backed up; None: all disks of the server."""

    def enter(self, step: Step) -> None:
        """Nobody else works here until ``leave``; end what a run that was killed had decided."""

    def leave(self) -> None:
        """Let others in."""

    def check(self) -> None:
        """Refuse what is in the way."""

    def previous(self, disk: str, size: int, bitmap_id: str, since: str) -> Found | str:
        """What the changes can be put on; or why there is nothing."""

    def prepare(self, session_id: str) -> None:
        """Make room for what is pulled from this session."""

    def is_prepared(self, session_id: str) -> bool:
        """Whether what is here already was pulled from it."""

    def destination(self, disk: str, previous: Found | None) -> Destination:
        """Where to, for a full backup or an increment."""

    def commit(
        self,
        record: Record,
        destinations: Sequence[Destination],
        changed: Mapping[str, Bitmap],
    ) -> list[Path]:
        """All is whole and durable: write that down, and give the files their names.

        ``changed``: for what goes in place.
        """

    def settle(self, destinations: Sequence[Destination], step: Step) -> None:
        """The session is finished: put increments in their places."""

    def made_from(self, session_id: str, disks: Sequence[str]) -> list[Path] | None:
        """The backups of these disks, if that session's are whole and written down."""

    def clean(self) -> None:
        """Remove what was not written down."""

    def clean_after(self, session_id: str) -> None:
        """That session has failed: remove what is left of it here, under whatever name."""


class Lock:
    """A file that is locked as long as this is open. It may go with the lock, and have content."""

    def __init__(self, path: Path, what: str) -> None:
        """Raises OSError: EBUSY where another process has it."""
        self.path = path
        busy = OSError(errno.EBUSY, f"another backup {what} is at work; wait for it")
        for _ in range(LOCK_TRIES):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_there(path, self._descriptor):
                    return
            except BlockingIOError:
                os.close(self._descriptor)
                raise busy from None
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        raise busy

    @property
    def content(self) -> str:
        return os.pread(self._descriptor, 4096, 0).decode(errors="replace")

    def set_content(self, text: str) -> None:
        """It need not be durable: what is without it counts as nobody's."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def close(self, *, remove: bool) -> None:
        """Let others have it."""
        try:
            if remove:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def belongings(staged: Path) -> list[Path]:
    """The file of an unfinished backup, and all that stands beside it under its name."""
    try:
        names = os.listdir(staged.parent)
    except FileNotFoundError:
        return []
    return [
        staged.with_name(name)
        for name in sorted(names)
        if name == staged.name
        or (name.startswith(f"{staged.name}.") and not name.endswith(LOCK_SUFFIX))
    ]


def entry_of(
    destination: Destination,
    answer: Mapping[str, Any],
    checksum: RecordedChecksum | None,
) -> BackedUp:
    """The record's entry for a disk; ``answer``: what the server says of it in the session."""
    assert destination.final is not None, "only files have records"
    own = answer["bitmap"]
    use = None
    if own is not None:
        use = BitmapUse(own["name"], own["id"], (own["since"] or {}).get("session_id"))
    previous = destination.previous
    is_increment = previous is not None and not destination.in_place
    entry = BackedUp(
        disk=destination.disk,
        size=answer["size"],
        file=destination.final.name,
        format=destination.format,
        kind=records.INCREMENT if is_increment else records.FULL,
        bitmap=use,
        backing=destination.backing,
        onto=previous.record.id if previous is not None and is_increment else None,
        checksum=checksum,
    )
    if destination.in_place or destination.staged is None:
        return entry
    return records.whole_file(destination.staged, entry)


def only(record: Record, disk: str) -> Record:
    """The record with one of its disks."""
    disks = [one for one in record.disks if one.disk == disk]
    return msgspec.structs.replace(record, disks=disks)


def roll_all(paths: Iterable[Path], step: Step) -> None:
    """Roll forward what is pending there; what cannot be is told: it may not be needed here."""
    for path in paths:
        try:
            if in_place.roll_forward(path, step) is not None:
                logs.report(f"{path}: the changes that an earlier run had pulled are in it now")
        except InterruptedError:
            raise  # it is ours: there is nothing to tell
        except OSError as error:
            logs.report(f"{path}: {error.strerror}")


def pending_in(folder: Path) -> list[Path]:
    """Full backups in a folder that must be rolled forward before they are used."""
    suffix = in_place.MARK_SUFFIX
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name.removesuffix(suffix) for name in names if name.endswith(suffix)]
