"""An increment put into the full backup that it builds on, so that no moment destroys the only one.

Copying straight into the full would leave, when it fails half-way, neither the old moment nor the
new one. So the changes go to a side file first, and only when they are whole and durable there is
the full touched; from then on everything that is needed to go on is on the disk.

    TARGET.backing-up         the changes, at the same offsets, sparse; made by a pull
    TARGET.roll-forward       the mark: which parts have changed, and the record to be written
    TARGET.rolling            the full while it is a mix of two moments: TARGET is never half done

    pulled ▶ mark durable ▶ TARGET becomes .rolling ▶ changes written, durable ▶ record ▶
             .rolling becomes TARGET ▶ .backing-up goes ▶ mark goes

Before the mark the full is as it was, and the side file is worth nothing without its session. With
it, ``roll_forward`` goes on from wherever it was left, and may begin again any number of times:

    mark   TARGET  .rolling
    -      yes     -         nothing is pending
    yes    yes     -         to be renamed first; if its record is the mark's, only to be cleared up
    yes    -       yes       write the changes (again)
    yes    yes     yes       somebody has put another TARGET there: refused
    yes    -       -         the full is gone: refused
"""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from bitarray import bitarray

from fleecenbd.client import records
from fleecenbd.client.journal_file import sync_folder
from fleecenbd.client.leftovers import write_durably
from fleecenbd.client.records import BackedUp, Record
from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.zeroes import ZEROES
from fleecenbd.storage.space import Space
from fleecenbd.storage.system_calls import read_all, write_all

STAGED_SUFFIX = ".backing-up"
MARK_SUFFIX = ".roll-forward"
ROLLING_SUFFIX = ".rolling"
VERSION = 1
PIECE_LENGTH = 1 << 20
"""Bytes copied by one call."""

Step = Callable[[str], None]
"""Told before each step; a test may end it there."""


def _no_step(_name: str) -> None:
    """Nobody looks."""


class Mark(msgspec.Struct, frozen=True):
    """What is to be done; its presence says that it must be."""

    record: Record
    """Of TARGET as it will be; with one disk."""
    before: BackedUp
    """TARGET as it was."""
    granularity: int
    changed: bytes
    """A bit for each granule that has changed, little-endian, deflated."""
    stale: list[str] = []  # msgspec copies it
    """Files beside TARGET that are no longer true of it."""
    roll_forward: int = VERSION

    def bitmap(self) -> Bitmap:
        """What has changed. Raises OSError where that cannot be told."""
        bitmap = Bitmap(self.before.size, self.granularity)
        bits = bitarray(endian="little")
        try:
            bits.frombytes(zlib.decompress(self.changed))
        except zlib.error as error:
            raise OSError(errno.EINVAL, f"its bits are damaged: {error}") from None
        if len(bits) < bitmap.clusters:
            raise OSError(errno.EINVAL, "it has too few bits")
        bitmap.bits[: bitmap.clusters] = bits[: bitmap.clusters]
        return bitmap


def staged_path(target: Path) -> Path:
    """What a backup is called as long as it has no record: here, where changes are pulled to."""
    return target.with_name(f"{target.name}{STAGED_SUFFIX}")


def mark_path(target: Path) -> Path:
    return target.with_name(f"{target.name}{MARK_SUFFIX}")


def rolling_path(target: Path) -> Path:
    return target.with_name(f"{target.name}{ROLLING_SUFFIX}")


def is_pending(target: Path) -> bool:
    """Whether the target must be rolled forward before it is used for anything."""
    return mark_path(target).exists() or rolling_path(target).exists()


def set_mark(
    target: Path, record: Record, before: BackedUp, changed: Bitmap, stale: list[str]
) -> None:
    """The side file is whole and durable: from now on it will be put into the target.

    Raises OSError, and then nothing is pending.
    """
    bits = changed.bits[: changed.clusters].tobytes()
    mark = Mark(record, before, changed.cluster_size, zlib.compress(bits, 1), stale)
    body = msgspec.json.encode(mark)
    write_durably(str(mark_path(target)), b"%08x %s\n" % (zlib.crc32(body), body))


def pending_session(target: Path) -> str | None:
    """The session whose changes wait to be put into the target. Raises OSError."""
    with suppress(FileNotFoundError):
        return _read_mark(mark_path(target)).record.id
    return None


def _read_mark(path: Path) -> Mark:
    crc, _, body = path.read_bytes().partition(b" ")
    body = body.removesuffix(b"\n")
    try:
        if int(crc, 16) != zlib.crc32(body):
            raise ValueError("its checksum is another")
        mark = msgspec.json.decode(body, type=Mark)
        if mark.roll_forward != VERSION:
            raise ValueError("it is of another version of fleecenbd")
    except ValueError as error:  # msgspec's are such
        raise OSError(
            errno.EINVAL, f"what is to be put into the full cannot be told: {error}", str(path)
        ) from None
    return mark


def roll_forward(target: Path, step: Step = _no_step) -> Record | None:
    """Put the changes into the target, or go on with that; None: nothing was pending.

    Blocks. Raises OSError: EBUSY where another process is at it, and what the disk says; it stays
    pending then.
    """
    path = mark_path(target)
    if not path.exists():
        if rolling_path(target).exists():
            raise _stuck(target, f"{path} is gone, which says what is to be put into it")
        return None
    with _locked(path):
        mark = _read_mark(path)
        if _renamed(target, mark, step):
            _write_changes(target, mark, step)
            _put_back(target, mark, step)
        _clear_up(target, mark, step)
        return mark.record


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another backup is rolling it forward", str(path)) from None
        yield
    finally:
        os.close(descriptor)


def _stuck(target: Path, why: str) -> OSError:
    return OSError(
        errno.EINVAL,
        f"it cannot be rolled forward: {why}; make a full backup under another name, and look at "
        f"what is here ({target.name}{MARK_SUFFIX}, {ROLLING_SUFFIX}, {STAGED_SUFFIX})",
        str(target),
    )


def _renamed(target: Path, mark: Mark, step: Step) -> bool:
    """Let the target have its other name; False: it has the changes already."""
    rolling = rolling_path(target)
    if target.exists():
        if rolling.exists():
            raise _stuck(target, f"{rolling} is there too, and is the one that was begun with")
        found = records.of_file(target)
        if found is not None and found.record.id == mark.record.id:
            return False
        why = records.why_changed(target, mark.before)
        if why is not None:
            raise _stuck(target, why)
        step("rename to .rolling")
        os.rename(target, rolling)
        sync_folder(str(rolling))
    elif not rolling.exists():
        raise _stuck(target, "it is gone")
    return True


def _write_changes(target: Path, mark: Mark, step: Step) -> None:
    side, rolling = staged_path(target), rolling_path(target)
    try:
        source = os.open(side, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _stuck(target, f"{side} is gone, which has the changes") from None
    try:
        if os.fstat(source).st_size != mark.before.size:
            raise _stuck(target, f"{side} has {os.fstat(source).st_size} bytes")
        descriptor = os.open(rolling, os.O_RDWR | os.O_CLOEXEC)
        try:
            space = Space(descriptor, str(rolling))
            bitmap = mark.bitmap()
            for offset, length, is_set in bitmap.runs(0, bitmap.size):
                for at in range(offset, offset + length if is_set else offset, PIECE_LENGTH):
                    step("write")
                    piece_length = min(PIECE_LENGTH, offset + length - at)
                    _write_piece(source, descriptor, space, at, piece_length, str(rolling))
            step("make durable")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        os.close(source)


def _write_piece(
    source: int, descriptor: int, space: Space, offset: int, length: int, name: str
) -> None:
    end = offset + length
    while offset < end:
        try:
            data = min(os.lseek(source, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # nothing but a hole up to the file's end
        if data > offset:
            space.zero(offset, data - offset, may_trim=True, fast=False)
            offset = data
            continue
        piece = read_all(source, offset, end - offset, name)
        if piece == ZEROES[: len(piece)]:
            space.zero(offset, len(piece), may_trim=True, fast=False)
        else:
            write_all(descriptor, offset, piece, name)
        offset += len(piece)


def _put_back(target: Path, mark: Mark, step: Step) -> None:
    rolling = rolling_path(target)
    (disk,) = mark.record.disks
    record = msgspec.structs.replace(mark.record, disks=[records.whole_file(rolling, disk)])
    step("write the record")
    records.write(records.record_path(target), record)
    step("rename back")
    os.rename(rolling, target)
    sync_folder(str(target))


def _clear_up(target: Path, mark: Mark, step: Step) -> None:
    for name in mark.stale:
        with suppress(FileNotFoundError):
            target.with_name(name).unlink()
    step("remove the side file")
    with suppress(FileNotFoundError):
        staged_path(target).unlink()
    step("remove the mark")
    mark_path(target).unlink()
    sync_folder(str(target))
