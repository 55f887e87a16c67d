"""A folder with a folder in it for each night, of all of a VM's disks.

    FOLDER/2026-11-22T20-15-03Z-6f1c3a52/    vda.raw    vdb.qcow2    session.json
    FOLDER/.part/                            the same, until it is whole

Moment and session name it. It gets its name in one step, when everything in it is whole and on the
disk; the record is the last file that is written before. ``examples/nightly.sh`` makes the same
folders with stock tools: each goes on with what the other has left.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fleecenbd.cli.backup_places import Destination, Lock, pending_in, roll_all
from fleecenbd.client import chains, records
from fleecenbd.client.in_place import Step
from fleecenbd.client.journal_file import sync_folder
from fleecenbd.client.records import FOLDER_RECORD, QCOW2, RAW, Found, Record
from fleecenbd.engine.bitmap import Bitmap

PART = ".part"
_NIGHT = "2026-11-22T20-15-03Z-6f1c3a52"
"""As long as the name of every night's folder."""
MARKER = ".session"
"""In PART: the id of the session that it is pulled from."""


class Nights:
    """backup_places.Places."""

    def __init__(self, folder: Path, disks: list[str] | None, *, compresses: bool = False) -> None:
        """``disks`` None: all. ``compresses``: full backups are qcow2 files, too."""
        self._folder = folder
        self._part = folder / PART
        self._disks = disks
        self._full_format = QCOW2 if compresses else RAW
        self._lock: Lock | None = None

    @property
    def disks(self) -> list[str] | None:
        return self._disks

    def enter(self, step: Step) -> None:
        if not self._folder.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "it is no folder (mkdir makes one)", str(self._folder)
            )
        self._lock = Lock(self._folder / ".lock", f"into {self._folder}")
        record = records.read(self._part / FOLDER_RECORD)
        if record is not None:  # whole, and killed just then
            self._give_name(record)
        for night in self._nights():
            roll_all(pending_in(night), step)

    def leave(self) -> None:
        if self._lock is not None:
            self._lock.close(remove=False)
            self._lock = None

    def check(self) -> None:
        """Nothing can be in the way."""

    def _nights(self) -> Iterator[Path]:
        """The newest first."""
        for entry in sorted(os.scandir(self._folder), key=lambda one: one.name, reverse=True):
            if not entry.name.startswith(".") and entry.is_dir():
                yield Path(entry)

    def previous(self, disk: str, size: int, bitmap_id: str, since: str) -> Found | str:
        why = f"no backup of session {since} is in {self._folder}"
        for is_exact in (True, False):
            for found in self._backups():
                if (found.record.id == since) is not is_exact or found.disk.disk != disk:
                    continue
                if not records.fits(found, bitmap_id, since):
                    continue
                problem = records.why_not_onto(
                    found, disk, size, bitmap_id, since
                ) or chains.why_too_long(found, self._folder / _NIGHT / found.path.name)
                if problem is None:
                    return found
                why = problem
        return why

    def _backups(self) -> Iterator[Found]:
        for night in self._nights():
            record = records.read(night / FOLDER_RECORD)
            for disk in record.disks if record is not None else ():
                assert record is not None, "it has disks"
                yield Found(night / disk.file, record, disk)

    def made_from(self, session_id: str, disks: Sequence[str]) -> list[Path] | None:
        made = {
            found.disk.disk: found.path
            for found in self._backups()
            if found.record.id == session_id and records.why_changed(found.path, found.disk) is None
        }
        return [made[disk] for disk in disks] if set(disks) <= set(made) else None

    def prepare(self, session_id: str) -> None:
        self._part.mkdir(mode=0o700)
        (self._part / MARKER).write_text(session_id)

    def is_prepared(self, session_id: str) -> bool:
        try:
            return (self._part / MARKER).read_text() == session_id
        except OSError:
            return False

    def destination(self, disk: str, previous: Found | None) -> Destination:
        form = self._full_format if previous is None else QCOW2
        staged = self._part / f"{disk}.{form}"
        # As deep as its last place: what it builds on is seen from there in the same way.
        final = self._folder / _NIGHT / staged.name
        shown = f"{self._folder}/…/{staged.name}"
        return Destination(disk, f"{form}:{staged}", staged, final, form, previous, shown=shown)

    def commit(
        self,
        record: Record,
        destinations: Sequence[Destination],
        changed: Mapping[str, Bitmap],
    ) -> list[Path]:
        (self._part / MARKER).unlink()
        records.write(self._part / FOLDER_RECORD, record)
        night = self._give_name(record)
        return [night / one.file for one in record.disks]

    def _give_name(self, record: Record) -> Path:
        moment = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(record.armed_at))
        night = self._folder / f"{moment}-{record.id[:8]}"
        os.rename(self._part, night)
        sync_folder(str(night))
        return night

    def settle(self, destinations: Sequence[Destination], step: Step) -> None:
        """Nothing goes in place."""

    def clean(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)

    def clean_after(self, session_id: str) -> None:
        """It is PART, which goes in any case."""
