"""MappedFile: bitmaps in a file that is mapped, so that every store into them outlives the process.

A store reaches the page cache at once, without a system call: after ``kill -9`` the file holds
all stores, in the order in which they were made. After a crash of the whole machine it may hold
any of them; who needs more calls ``sync``.

    0      magic, version, length and checksum of the identity; the identity: a JSON object
    2048   flag "broken", length of the cause, the cause
    3072   stamps: began, ended (nanoseconds of the real-time clock), number in flight
    4096   the areas, each from a page's start on

The file is allocated in full before it is mapped: a store into a hole of a full file system is
SIGBUS. It is written, too, so that a store meets mapped blocks that need no journal. btrfs, which
would take new blocks for a page that was written back, is asked to overwrite it in its place.

Buffers that live in the map (a bitarray, a memoryview) keep it alive: ``close`` unmaps at once
where none is left, else the map goes with the last of them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress

from fleecenbd.storage import system_calls
from fleecenbd.storage.errors import named_error
from fleecenbd.storage.filesystem import type_of

MAGIC = b"fleecenB"
VERSION = 1
PAGE = 4096
BROKEN_OFFSET = 2048
STAMPS_OFFSET = 3072
CAUSE_LENGTH_MAX = STAMPS_OFFSET - BROKEN_OFFSET - 8
"""Bytes of a cause that are kept."""

_HEAD = struct.Struct("<8sIII")
_BROKEN = struct.Struct("<II")
_IDENTITY_LENGTH_MAX = BROKEN_OFFSET - _HEAD.size

Identity = Mapping[str, str | int]
"""What a file is about; whoever opens it compares."""


class MappedFile:
    """Named areas of bytes in one mapped file."""

    def __init__(
        self, path: str, identity: Identity, areas: Mapping[str, tuple[int, int]], view: mmap.mmap
    ) -> None:
        self.path = path
        self.identity = dict(identity)
        self._areas = dict(areas)
        self._map = view

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], identity: Identity, lengths: Mapping[str, int]
    ) -> MappedFile:
        """Make a new file with areas of zeroes, of these lengths in bytes.

        Raises OSError, with the path, and leaves nothing behind then: EEXIST, ENOSPC, EDQUOT,
        EROFS. Blocks.
        """
        name = os.fspath(path)
        areas: dict[str, tuple[int, int]] = {}
        end = PAGE
        for area, length in lengths.items():
            areas[area] = (end, length)
            end += -(-length // PAGE) * PAGE
        import json  # takes as long to import as a small part of a server to start

        text = json.dumps({**identity, "areas": areas}).encode()
        if len(text) > _IDENTITY_LENGTH_MAX:
            raise OSError(errno.ENAMETOOLONG, "what the file is about is too long a text", name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600)
        try:
            if type_of(descriptor) == "btrfs":
                with suppress(OSError):
                    system_calls.overwrite_in_place(descriptor)
            try:
                os.posix_fallocate(descriptor, 0, end)
            except OSError as error:
                raise named_error(error, name) from None
            system_calls.write_zeroes(descriptor, 0, end, name)
            view = mmap.mmap(descriptor, end)
            view[_HEAD.size : _HEAD.size + len(text)] = text
            # The magic comes last: a file that a kill left half made is none of ours.
            view[: _HEAD.size] = _HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text))
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        finally:
            os.close(descriptor)
        return cls(name, identity, areas, view)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MappedFile:
        """Map a file that is there, with all it holds. Raises OSError; EINVAL where it is not
        what ``create`` makes, or only a part of it. Blocks."""
        name = os.fspath(path)
        descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.fstat(descriptor).st_size
            first_page = os.pread(descriptor, PAGE, 0)
            identity, areas = _parse(first_page, size, name)
            # It may have holes (a copy of it, a file system that was repaired): they are filled.
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                raise named_error(error, name) from None
            view = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        return cls(name, identity, areas, view)

    def area(self, name: str) -> memoryview:
        """The bytes of an area, to be read and stored into. KeyError if there is none."""
        offset, length = self._areas[name]
        return memoryview(self._map)[offset : offset + length]

    def has_area(self, name: str) -> bool:
        """Whether there is an area of that name."""
        return name in self._areas

    def cells(self, offset: int, count: int) -> memoryview:
        """``count`` numbers of 64 bits in the first page; each store is one."""
        return memoryview(self._map)[offset : offset + 8 * count].cast("Q")

    @property
    def broken(self) -> str | None:
        """The cause that ``mark_broken`` was told; None if it was not."""
        flag, length = _BROKEN.unpack_from(self._map, BROKEN_OFFSET)
        if not flag:
            return None
        start = BROKEN_OFFSET + _BROKEN.size
        text = self._map[start : start + min(length, CAUSE_LENGTH_MAX)]
        return text.decode("utf-8", "replace")

    def mark_broken(self, cause: str) -> None:
        """Set the flag for good; the first cause stays. Outlives a kill from its return on."""
        if self.broken is not None:
            return
        text = cause.encode("utf-8", "replace")[:CAUSE_LENGTH_MAX]
        start = BROKEN_OFFSET + _BROKEN.size
        self._map[start : start + len(text)] = text
        # The flag comes last: one that is set has its cause.
        struct.pack_into("<I", self._map, BROKEN_OFFSET + 4, len(text))
        struct.pack_into("<I", self._map, BROKEN_OFFSET, 1)

    def sync(self) -> None:
        """Return when all stores are durable. Raises OSError. Blocks."""
        try:
            self._map.flush()
        except OSError as error:
            raise named_error(error, self.path) from None

    def unlink(self) -> None:
        """Take away the file's name; the map stays. Nothing happens if it is gone."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Unmap, now or with the last buffer that lives in the map."""
        with suppress(BufferError):
            self._map.close()


def _parse(
    first_page: bytes, size: int, name: str
) -> tuple[dict[str, str | int], dict[str, tuple[int, int]]]:
    """(identity, areas) of a file. Raises OSError(EINVAL)."""
    if len(first_page) < PAGE:
        raise _damaged(name, f"it has {size} bytes only")
    magic, version, length, checksum = _HEAD.unpack_from(first_page)
    if magic != MAGIC:
        raise _damaged(name, "it does not begin as one")
    if version != VERSION:
        raise _damaged(name, f"it is of version {version}, and this is version {VERSION}")
    text = first_page[_HEAD.size : _HEAD.size + length]
    if length > _IDENTITY_LENGTH_MAX or zlib.crc32(text) != checksum:
        raise _damaged(name, "its header is damaged")
    import json

    identity = json.loads(text)
    areas = {area: (start, count) for area, (start, count) in identity.pop("areas").items()}
    end = max((start + count for start, count in areas.values()), default=PAGE)
    if size < end:
        raise _damaged(name, f"it has {size} bytes of {end}")
    return identity, areas


def _damaged(name: str, cause: str) -> OSError:
    return OSError(errno.EINVAL, f"this is no whole file of bitmaps: {cause}", name)


def lock_file(path: str | os.PathLike[str]) -> int:
    """Open (or make) a file and lock it whole, for this open file description alone.

    The lock goes when the descriptor is closed, or with the last system call of a process that
    was killed. Raises OSError; EAGAIN where another one has the lock. Blocks, but not for the
    lock.
    """
    name = os.fspath(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(name, flags, 0o600)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EACCES:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), name) from None
        raise named_error(error, name) from None
    return descriptor


# struct flock: type, whence, start, length (0: all), process id; padded as the compiler does.
_FLOCK = struct.Struct("@hhqqi0q")
