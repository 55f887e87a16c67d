"""TempImage: a fleece's old data, in a sparse file with the same offsets as the disk.

What was never written, or was trimmed, reads as zeroes and holds no space.

``create``: the file has no name from its first moment: when the last descriptor of it is closed,
and so whatever happens to the server, its space is free. ``create_named``: a session that outlives
its server finds its temp image by name (``reopen``). That file is always a new one, is locked while
it is open, and is unlinked by whoever made it, after ``wait_closed``: a call that ends late must
never reach a file that somebody else was given.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

from fleecenbd.storage import system_calls
from fleecenbd.storage.clones import Clones
from fleecenbd.storage.device import Buffer, Data, Device, Extent, ReadIntoNow, ReadNow, WriteNow
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.filesystem import hole_size_of
from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.pool import SIZE_MAX
from fleecenbd.storage.space import PUNCH

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOATIME


class TempImage:
    """A sparse file of its own, with a pool of its own; what it is not asked to keep is free."""

    def __init__(
        self,
        descriptor: int,
        name: str,
        size: int,
        *,
        cluster_size: int | None = None,
        hole_size: int | None = None,
        holds_space: bool = False,
        threads_max: int = SIZE_MAX,
    ) -> None:
        """Take over the descriptor of an empty file; ``size`` in bytes, as in ``create``.

        ``hole_size``: what it was when the image was made, where the file is not empty.
        """
        self.name = name
        self.holds_space = holds_space
        """All space that it may need was allocated at the start; what is trimmed is freed."""
        self.on_closed: Callable[[], None] | None = None
        """Called once the file is closed, by another thread."""
        self.hole_size = _measured_hole_size(descriptor, name) if hole_size is None else hole_size
        if cluster_size is not None:
            # Both are powers of two: a multiple of the larger is a multiple of the other.
            size = _rounded_up(size, max(cluster_size, self.hole_size))
        self.size = size
        # The file ends with a whole block, so that a trim of the last part frees it.
        self._file_size = _rounded_up(size, self.hole_size)
        os.ftruncate(descriptor, self._file_size)
        if holds_space and hole_size is None:
            _allocate(descriptor, name, self._file_size)
        self._file = FileDevice(descriptor, name, size=size, role="temp", threads_max=threads_max)
        self._clones = Clones(self._file)
        self._first_room = self._file.room_now() if hole_size is None else None
        self.pread_now: ReadNow = self._file.pread_now
        self.pread_into_now: ReadIntoNow = self._file.pread_into_now
        self.pwrite_now: WriteNow = self._file.pwrite_now

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        name: str,
        size: int,
        *,
        cluster_size: int | None = None,
        preallocate: bool = False,
        threads_max: int = SIZE_MAX,
    ) -> TempImage:
        """Make an empty temp image in ``directory``; ``name`` is for messages only.

        ``cluster_size``: a power of two; ``size`` is rounded up to whole clusters, of at least
        the image's own ``hole_size``. ``preallocate``: its space is taken now, all of it, so that
        no copy can run out of it. Raises OSError; ENOTSUP where the file system can't free what is
        trimmed, ENOSPC where there is no space for a preallocated one. Blocks.
        """
        path = os.path.join(os.fspath(directory), name)
        descriptor = _create_unnamed(os.fspath(directory))
        try:
            return cls(
                descriptor,
                path,
                size,
                cluster_size=cluster_size,
                holds_space=preallocate,
                threads_max=threads_max,
            )
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def create_named(
        cls,
        path: str | os.PathLike[str],
        size: int,
        *,
        cluster_size: int | None = None,
        preallocate: bool = False,
        threads_max: int = SIZE_MAX,
    ) -> TempImage:
        """As ``create``, in a new file of this path; EEXIST if there is one. Blocks."""
        name = os.fspath(path)
        descriptor = os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            lock_image(descriptor, name, LockMode.EXCLUSIVE)
            return cls(
                descriptor,
                name,
                size,
                cluster_size=cluster_size,
                holds_space=preallocate,
                threads_max=threads_max,
            )
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(name)
            raise

    @classmethod
    def reopen(
        cls,
        path: str | os.PathLike[str],
        size: int,
        hole_size: int,
        *,
        holds_space: bool = False,
        threads_max: int = SIZE_MAX,
    ) -> TempImage:
        """Open the file of a ``create_named`` of another process, with what it holds.

        ``size``, ``hole_size`` and ``holds_space`` are those that it had. Raises OSError; EBUSY
        while a system call of that process has not ended; EINVAL where it is not the whole file.
        Blocks.
        """
        name = os.fspath(path)
        descriptor = os.open(name, _FLAGS | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            lock_image(descriptor, name, LockMode.EXCLUSIVE)
            found = os.fstat(descriptor)
            expected = _rounded_up(size, hole_size)
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
                raise OSError(
                    errno.EINVAL, f"the temp image has {found.st_size} bytes of {expected}", name
                )
            return cls(
                descriptor,
                name,
                size,
                hole_size=hole_size,
                holds_space=holds_space,
                threads_max=threads_max,
            )
        except BaseException:
            os.close(descriptor)
            raise

    async def room(self) -> tuple[int, int]:
        """(bytes free, bytes in all) of its file system, for who is not root. Raises OSError.

        The first answer is that of when the image was made: arming asks then, and must start no
        thread, since nbdkit forks after it.
        """
        first, self._first_room = self._first_room, None
        if first is not None:
            return first
        return await self._file.room()

    def used_bytes(self) -> int:
        """Bytes of space that it holds now."""
        return self._file.used_bytes()

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read ``length`` bytes at ``offset``."""
        return await self._file.pread(offset, length)

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data``; ENOSPC where the file system is full."""
        await self._file.pwrite(offset, data)

    def clones(self, source: Device, offset: int, length: int) -> bool:
        """Whether ``clone`` is worth trying (clones.py)."""
        return self._clones.likely(source, offset, length)

    async def clone(self, source: Device, offset: int, length: int) -> bool:
        """Share the blocks that ``source`` has in the range; False: refused."""
        return await self._clones.make(source, offset, length)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes."""
        await self._file.zero(offset, length, may_trim=may_trim, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """Free the range's space. Raises OSError where that fails: its users count on it."""
        end = offset + length
        if end == self.size:
            end = self._file_size
        await self._file.punch(offset, end - offset)

    async def trim_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free all of these (offset, length), as ``trim`` does, by one call in the pool."""

        def punch_each(descriptor: int) -> None:
            for offset, length in ranges:
                end = offset + length
                if end == self.size:
                    end = self._file_size
                system_calls.fallocate(descriptor, PUNCH, offset, end - offset, self.name)

        await self._file.change(punch_each)

    def flush_now(self) -> bool:
        """Whether there is nothing to do."""
        return self._file.flush_now()

    async def flush(self) -> None:
        """fdatasync."""
        await self._file.flush()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """What is kept is data, all else holes."""
        return await self._file.extents(offset, length)

    def close(self) -> None:
        """Take no more calls; the file is closed when the last call has ended: the space of an
        unnamed one goes with it."""
        self._file.close(self.on_closed)

    async def wait_closed(self) -> None:
        """Return when the file is gone."""
        await self._file.wait_closed()


def _create_unnamed(directory: str) -> int:
    """An open file in ``directory`` that no name leads to."""
    try:
        return os.open(directory, _FLAGS | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError as error:
        # EISDIR: a kernel that takes the directory for a file to be written.
        if error.errno not in (errno.ENOTSUP, errno.EISDIR, errno.EINVAL):
            raise
    # Only here: few file systems need it, and a server is to start fast.
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix=".fleecenbd-", dir=directory)
    os.unlink(path)
    return descriptor


def _measured_hole_size(descriptor: int, name: str) -> int:
    """Bytes, a power of two: what one block takes in an empty file, which stays empty.

    The block size of statvfs is not it where a file system gives out space in larger units
    (ext4's bigalloc, XFS's realtime extents): then a block that is kept among others that were
    trimmed holds all their space, and a limit counted in blocks says nothing. Where the space is
    told of later only, the block size has to do. Raises OSError; ENOTSUP where nothing is freed.
    """
    block = hole_size_of(descriptor)
    # Inside the file: XFS takes more, for what may come, where a file grows.
    os.ftruncate(descriptor, block)
    before = os.fstat(descriptor).st_blocks
    system_calls.write_all(descriptor, 0, b"\xff" * block, name)
    taken = (os.fstat(descriptor).st_blocks - before) * 512
    hole_size = 1 << max(taken - 1, block - 1).bit_length()
    _punch(descriptor, name, hole_size)
    return hole_size


def _allocate(descriptor: int, name: str, length: int) -> None:
    """Take the space of the whole file. Raises OSError."""
    try:
        system_calls.fallocate(descriptor, 0, 0, length, name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause = f"there is no room to preallocate {length} bytes ({error.strerror})"
        elif error.errno in (errno.ENOTSUP, errno.ENOSYS):
            cause = "the file system cannot preallocate a file"
        else:
            raise
        raise OSError(error.errno, cause, name) from None


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _punch(descriptor: int, name: str, length: int) -> None:
    """Free the start of a file. Refuses a file system that can't free part of a file."""
    try:
        system_calls.fallocate(descriptor, PUNCH, 0, length, name)
    except OSError as error:
        raise OSError(
            errno.ENOTSUP,
            f"the file system cannot free parts of a file ({error.strerror}), so that a temp "
            "image would only grow; put temp images on ext4, XFS, Btrfs or tmpfs",
            name,
        ) from None
