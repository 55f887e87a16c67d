"""What a backup leaves beside it, so that the next one knows what it may build on: its record.

``TARGET.backup.json`` beside a file, or ``session.json`` in a folder with a night's files:

    {
      "id": "6f1c3a52-…",                  the session that it was made from
      "session": "backup",
      "armed_at": 1795378503.2,            the moment that it shows: seconds since the epoch
      "disks": [
        {
          "disk": "vda", "size": 1073741824,
          "file": "vda.qcow2", "format": "qcow2", "kind": "increment",
          "bitmap": {"name": "chain", "id": "…", "since": "0b77d1e8-…"},
          "backing": "../2026-11-22T02-00-00Z-0b77d1e8/vda.raw", "onto": "0b77d1e8-…",
          "length": 1234, "mtime_ns": 1795378510000000000, "checksum": null
        }
      ],
      "fleecenbd_backup": 1
    }

What a backup may be built on is decided by ``why_not_onto``, never by dates:

* its session is the very one that the bitmap's bits are counted from (``since``); or
* its session took bits of the same bitmap, counted from the same ``since``, and gave them back (it
  was whole, and its session counts as failed all the same). The bits that are taken now are counted
  from a moment before it, so they cover all that has changed since.

And every file below it, down to the full one, must be there as its own record describes it: of the
session that was built on, of the same length, and not written to since.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fleecenbd.client.leftovers import write_durably

SUFFIX = ".backup.json"
FOLDER_RECORD = "session.json"
RECORD_LENGTH_MAX = 16 << 20
VERSION = 1

RAW: Literal["raw"] = "raw"
QCOW2: Literal["qcow2"] = "qcow2"
FULL: Literal["full"] = "full"
INCREMENT: Literal["increment"] = "increment"

COARSE_NS = 10_000_000
COARSE_TOLERANCE_NS = 2_000_000_000
"""Times of some file systems are of whole hundredths, seconds, or two seconds (FAT): one that is so
round may have been rounded."""


class BitmapUse(msgspec.Struct, frozen=True):
    """What the session took from the disk's recording bitmap."""

    name: str
    id: str
    since: str | None
    """The session that its bits were counted from."""


class RecordedChecksum(msgspec.Struct, frozen=True):
    """Of what was copied (``checksums``); ``root`` in hexadecimal."""

    algorithm: str
    root: str


class BackedUp(msgspec.Struct, frozen=True):
    """The backup of one disk. Sizes in bytes."""

    disk: str
    size: int
    """Of the disk."""
    file: str
    """Its name, in the record's folder."""
    format: Literal["raw", "qcow2"]
    kind: Literal["full", "increment"]
    bitmap: BitmapUse | None = None
    backing: str | None = None
    """The file that it builds on, seen from the record's folder."""
    onto: str | None = None
    """That one's session."""
    length: int | None = None
    mtime_ns: int | None = None
    """Of the file when it was whole; None: nobody has noted it."""
    checksum: RecordedChecksum | None = None


class Record(msgspec.Struct, frozen=True):
    """What was made from one session."""

    id: str
    session: str
    armed_at: float
    disks: list[BackedUp]
    fleecenbd_backup: int = VERSION


@dataclass(frozen=True)
class Found:
    """A backup of a disk, and the record that tells of it."""

    path: Path
    record: Record
    disk: BackedUp

    @property
    def folder(self) -> Path:
        return self.path.parent


def record_path(target: Path) -> Path:
    """Where the record of one file is."""
    return target.with_name(f"{target.name}{SUFFIX}")


def write(path: Path, record: Record) -> None:
    """Write it, durably, in the place of what was there. Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(record), indent=2)
    write_durably(str(path), content + b"\n")


def read(path: Path) -> Record | None:
    """What a record says; None where there is none, or nothing that can be understood.

    What ``examples/nightly.sh`` leaves is understood, too.
    """
    try:
        with path.open("rb") as file:
            content = file.read(RECORD_LENGTH_MAX)
        plain = msgspec.json.decode(content)
        if isinstance(plain, dict) and "fleecenbd_backup" not in plain:
            return _of_answer(plain, path.parent)
        record = msgspec.convert(plain, Record)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, KeyError, TypeError):
        return None
    return record if record.fleecenbd_backup == VERSION else None


def _of_answer(answer: dict[str, Any], folder: Path) -> Record:
    """A record from what the server said of a session, beside DISK.raw or DISK.qcow2."""
    disks = []
    for one in answer["disks"]:
        own = one["bitmap"]
        for form in (RAW, QCOW2):
            name = f"{one['disk']}.{form}"
            if not (folder / name).is_file():
                continue
            use = None
            if own is not None:
                since = (own["since"] or {}).get("session_id")
                use = BitmapUse(own["name"], own["id"], since)
            kind = FULL if own is None or own["mode"] == "new" else INCREMENT
            disks.append(BackedUp(one["disk"], one["size"], name, form, kind, use))
            break
    return Record(answer["id"], answer["name"], answer["armed_at"], disks)


def of_file(target: Path) -> Found | None:
    """The record of a backup that is there, or was."""
    for path in (record_path(target), target.parent / FOLDER_RECORD):
        record = read(path)
        for disk in record.disks if record is not None else ():
            if disk.file == target.name:
                assert record is not None, "it has disks"
                return Found(target, record, disk)
    return None


def in_folder(folder: Path) -> Iterator[Found]:
    """All backups that the records in a folder tell of."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if not name.endswith(SUFFIX) and name != FOLDER_RECORD:
            continue
        record = read(folder / name)
        if record is not None:
            for disk in record.disks:
                yield Found(folder / disk.file, record, disk)


def whole_file(path: Path, disk: BackedUp) -> BackedUp:
    """The entry with what the file is like now that it is whole. Raises OSError."""
    found = path.stat()
    return msgspec.structs.replace(disk, length=found.st_size, mtime_ns=found.st_mtime_ns)


def dependents(target: Path, folders: Iterable[Path]) -> list[Path]:
    """Backups in these folders that build on a file: it must not change under them."""
    real = target.resolve()
    return [
        found.path
        for folder in folders
        for found in in_folder(folder)
        if found.disk.backing is not None
        and (folder / found.disk.backing).resolve() == real
        and found.path.exists()
    ]


def fits(found: Found, bitmap_id: str, since: str) -> bool:
    """Whether bits of a bitmap, counted from a session, cover all that changed since a backup."""
    use = found.disk.bitmap
    return found.record.id == since or (
        use is not None and use.id == bitmap_id and use.since == since
    )


def why_not_onto(found: Found, disk: str, size: int, bitmap_id: str, since: str) -> str | None:
    """Why a backup of a disk must not be built on this one; None: it may."""
    if found.disk.disk != disk:
        return f"{found.path} is a backup of {found.disk.disk}, not of {disk}"
    if found.disk.size != size:
        return f"{found.path} is of a disk of {found.disk.size} bytes, and {disk} has {size}"
    if not fits(found, bitmap_id, since):
        return (
            f"{found.path} is of session {found.record.id}, and what has changed is counted from "
            f"session {since}"
        )
    return why_not_whole(found)


def why_not_whole(found: Found) -> str | None:
    """Why a backup, with all that it builds on, is not what its record says; None: it is."""
    seen: set[Path] = set()
    while True:
        why = why_changed(found.path, found.disk)
        if why is not None or found.disk.backing is None:
            return why
        below = (found.folder / found.disk.backing).resolve()
        if below in seen:
            return f"{below} builds on itself"
        seen.add(below)
        next_found = of_file(below)
        if next_found is None:
            return None if below.is_file() else f"{below}, on which {found.path} builds, is gone"
        if found.disk.onto is not None and next_found.record.id != found.disk.onto:
            return (
                f"{below} is of session {next_found.record.id} now, and {found.path} builds on "
                f"what it was: session {found.disk.onto}"
            )
        found = next_found


def why_changed(path: Path, disk: BackedUp) -> str | None:
    """Why a file is not the one that was noted; None: it is, as far as can be told."""
    try:
        there = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"{path} is gone"
        return f"{path}: {error.strerror}"
    if disk.length is not None and there.st_size != disk.length:
        return f"{path} has {there.st_size} bytes, and had {disk.length} when it was made"
    if disk.mtime_ns is not None and not _is_same_time(disk.mtime_ns, there.st_mtime_ns):
        return f"{path} was written to since it was made (or copied without its time: cp -p)"
    return None


def _is_same_time(noted: int, there: int) -> bool:
    if noted == there:
        return True
    return there % COARSE_NS == 0 and abs(noted - there) < COARSE_TOLERANCE_NS
