"""FileDevice: a raw image in a regular file or on a block device, through the page cache.

Inline or in the pool (performance.md, "now, or later")
    ===============  ==========================  ===========================================
    medium           ``pread_now``               ``pwrite_now``
    ===============  ==========================  ===========================================
    MEMORY           pread                       pwrite
    CACHED           preadv with RWF_NOWAIT      pwrite, while the page cache takes it fast
    UNCACHED_READS   None                        the same, whole pages only
    SLOW             None                        False
    ===============  ==========================  ===========================================
    The medium (filesystem.py) is found out once, at open; ``pread_now`` and ``pwrite_now`` are
    then the bound method that fits. fdatasync, fallocate and lseek's SEEK_DATA always go to
    the pool.

Writes that stay fast
    The page cache takes a write in microseconds, until the kernel throttles those who dirty it
    (balance_dirty_pages): then one write sleeps for up to 0.2 s, and there is no way to ask
    beforehand. So every write is measured: one that was slow *and slept* (by the thread's count
    of voluntary context switches: on a busy machine a thread also loses 5 or 20 ms to others,
    which says nothing about the disk) has held up the loop. Such writes may do so for
    ``STALL_SHARE`` of the time, with ``STALL_MAX_S`` at once to spare. Past that, the pool takes
    the writes, until the share has sunk again. They are measured there too, where being slow
    stalls nobody, so that the loop does not try again while they are throttled there.
    A write of part of a page may have to read the page first: it is made inline only where the
    page is in the cache.

The descriptor
    ``close`` takes it away from the inline calls at once; it is closed, in a thread, when the
    last call in the pool has ended. Its locks go with it.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TypeVar

from fleecenbd.storage import system_calls
from fleecenbd.storage.buffers import uncleared_buffer
from fleecenbd.storage.device import Buffer, Data, Extent, ReadIntoNow, ReadNow, WriteNow
from fleecenbd.storage.errors import closed_error, named_error, read_only_error
from fleecenbd.storage.filesystem import Medium, hole_size_of, medium_of
from fleecenbd.storage.holes import Holes
from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.opening import open_image
from fleecenbd.storage.pool import SIZE_MAX, ThreadPool
from fleecenbd.storage.resized import Resized
from fleecenbd.storage.space import Space
from fleecenbd.storage.sync import Sync

NOW_LENGTH_MAX = 1 << 20
"""Bytes: longer reads and writes go to the pool, for they would hold up the loop."""

WRITE_SLOW_S = 0.002
"""Seconds: an inline write that took as long, and slept, has held up the loop."""

STALL_SHARE = 0.05
"""Share of the time that slow inline writes may hold up the loop."""

STALL_MAX_S = 0.05
"""Seconds that they may hold it up at once, before the pool takes the writes."""

POOL_WRITE_SLOW_S = 0.05
"""Seconds: a pool's write that took as long was throttled (threads wait for each other, too)."""

_PAGE_MASK = os.sysconf("SC_PAGESIZE") - 1

_UNCLEARED_LENGTH_MIN = 1 << 15
"""Bytes: shorter buffers are cleared faster than asked for uncleared."""

_preadv = os.preadv
_pread = os.pread
_pwrite = os.pwrite
_RWF_NOWAIT = os.RWF_NOWAIT
_getrusage = resource.getrusage
_RUSAGE_THREAD = resource.RUSAGE_THREAD

Result = TypeVar("Result")


class FileDevice(Resized):
    """A raw image: a regular file or a block device."""

    _open_flags = 0
    """Of open(2), besides those that every image is opened with."""

    def __init__(
        self,
        descriptor: int,
        name: str,
        *,
        size: int | None = None,
        read_only: bool = False,
        role: str = "active",
        threads_max: int = SIZE_MAX,
        medium: Medium | None = None,
    ) -> None:
        """Take over an open descriptor. ``open`` is the usual way here.

        ``size``: the device's size where it is less than the file's. ``role`` names the pool.
        ``medium``: what to believe about the file system instead of asking it.
        """
        self.name = name
        self.size = system_calls.image_size(descriptor) if size is None else size
        self.hole_size = hole_size_of(descriptor)
        self.read_only = read_only
        self.medium = medium_of(descriptor) if medium is None else medium
        self._descriptor = descriptor
        self._pool = ThreadPool(name, role, size_max=threads_max)
        self._space = Space(descriptor, name)
        self._holes = Holes(descriptor, name)
        self._sync = Sync(name)
        self._write_inline_from = 0.0  # time of monotonic(): the pool has the writes until then

        self._read_flags = 0 if self.medium is Medium.MEMORY else _RWF_NOWAIT

        self.pread_now: ReadNow
        self.pread_into_now: ReadIntoNow = self._pread_into
        self.pwrite_now: WriteNow
        if self.medium is Medium.MEMORY:
            self.pread_now = self._pread_memory
            self.pwrite_now = self._pwrite_memory
        elif self.medium is Medium.SLOW:
            self.pread_now = self._pread_never
            self.pwrite_now = self._pwrite_never
        else:
            cached = self.medium is Medium.CACHED
            self.pread_now = self._pread_cached if cached else self._pread_never
            self.pwrite_now = self._pwrite_cached
        if self.medium not in (Medium.MEMORY, Medium.CACHED):
            self.pread_into_now = self._pread_into_never
        if read_only:
            self.pwrite_now = self._pwrite_refused

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        lock: LockMode | None = None,
        role: str = "active",
        threads_max: int = SIZE_MAX,
    ) -> FileDevice:
        """Open and lock an image.

        ``lock``: EXCLUSIVE by default, SHARED where ``read_only``. Does not look at the content
        (probe.py does). Raises OSError; EBUSY where the image is in use. Blocks.
        """
        name = os.fspath(path)
        descriptor = open_image(name, read_only=read_only, flags=cls._open_flags)
        try:
            if lock is None:
                lock = LockMode.SHARED if read_only else LockMode.EXCLUSIVE
            lock_image(descriptor, name, lock)
            return cls(descriptor, name, read_only=read_only, role=role, threads_max=threads_max)
        except BaseException:
            os.close(descriptor)
            raise

    # Reads

    def _pread_cached(self, offset: int, length: int) -> Buffer | None:
        if length < _UNCLEARED_LENGTH_MIN:
            buffer = bytearray(length)
        elif length <= NOW_LENGTH_MAX:
            buffer = uncleared_buffer(None, length)
        else:
            return None
        try:
            if _preadv(self._descriptor, (buffer,), offset, _RWF_NOWAIT) == length:
                return buffer
        except BlockingIOError:
            pass
        except OSError as error:
            raise named_error(error, self.name) from None
        return None

    def _pread_memory(self, offset: int, length: int) -> Buffer | None:
        if length > NOW_LENGTH_MAX:
            return None
        try:
            if length < _UNCLEARED_LENGTH_MIN:
                data: Buffer = _pread(self._descriptor, length, offset)
                return data if len(data) == length else None
            data = uncleared_buffer(None, length)
            return data if _preadv(self._descriptor, (data,), offset) == length else None
        except OSError as error:
            raise named_error(error, self.name) from None

    def _pread_into(self, offset: int, buffer: memoryview) -> bool:
        try:
            return _preadv(self._descriptor, (buffer,), offset, self._read_flags) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            raise named_error(error, self.name) from None

    def _pread_into_never(self, offset: int, buffer: memoryview) -> bool:
        return False

    def _pread_never(self, offset: int, length: int) -> Buffer | None:
        return None

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read in the pool; EIO where the image became shorter than it was."""
        return await self._pool.run(
            system_calls.read_all, self._descriptor, offset, length, self.name
        )

    # Writes

    def _pwrite_cached(self, offset: int, data: Data) -> bool:
        length = len(data)
        started = monotonic()
        if started < self._write_inline_from or length > NOW_LENGTH_MAX:
            return False
        if (offset | length) & _PAGE_MASK and not self._edges_are_cached(offset, length):
            return False
        sleeps = _getrusage(_RUSAGE_THREAD).ru_nvcsw
        try:
            written = _pwrite(self._descriptor, data, offset)
        except OSError as error:
            raise named_error(error, self.name) from None
        self._sync.changed()
        ended = monotonic()
        if ended - started > WRITE_SLOW_S and _getrusage(_RUSAGE_THREAD).ru_nvcsw > sleeps:
            spared = max(self._write_inline_from, ended - STALL_MAX_S / STALL_SHARE)
            self._write_inline_from = spared + (ended - started) / STALL_SHARE
        if written != length:  # out of space, most likely: the next call says so
            self._write_rest(offset, data, written)
        return True

    def _pwrite_memory(self, offset: int, data: Data) -> bool:
        length = len(data)
        if length > NOW_LENGTH_MAX:
            return False
        try:
            written = _pwrite(self._descriptor, data, offset)
        except OSError as error:
            raise named_error(error, self.name) from None
        if written != length:
            self._write_rest(offset, data, written)
        return True

    def _pwrite_never(self, offset: int, data: Data) -> bool:
        return False

    def _pwrite_refused(self, offset: int, data: Data) -> bool:
        raise read_only_error(self.name)

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write in the pool."""
        self._check_writable(offset + len(data))
        await self._pool.run(self._write_measured, self._descriptor, offset, data)

    def _write_rest(self, offset: int, data: Data, written: int) -> None:
        rest = memoryview(data)[written:]
        try:
            system_calls.write_all(self._descriptor, offset + written, rest, self.name)
        finally:
            self._sync.changed()

    def _write_measured(self, descriptor: int, offset: int, data: Data) -> None:
        """Run by a pool thread, which may set the time while the loop reads it: any is fine."""
        started = monotonic()
        try:
            system_calls.write_all(descriptor, offset, data, self.name)
        finally:
            self._sync.changed()
        ended = monotonic()
        # A long write may take its time; a throttled one takes more.
        if ended - started > POOL_WRITE_SLOW_S * max(1.0, len(data) / NOW_LENGTH_MAX):
            pause_s = (ended - started) / STALL_SHARE
            self._write_inline_from = max(self._write_inline_from, ended + pause_s)

    def _edges_are_cached(self, offset: int, length: int) -> bool:
        """Whether the pages that are written in part are in the page cache."""
        if self.medium is not Medium.CACHED:
            return False
        try:
            for edge in (offset, offset + length):
                if edge & _PAGE_MASK and edge < self.size:
                    # One byte tells. A page that leaves the cache just now is bad luck.
                    _preadv(self._descriptor, (bytearray(1),), edge, _RWF_NOWAIT)
        except OSError:
            return False  # not cached, or not to be read: the write itself says what of it
        return True

    # Space

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Punch or zero the range, else write zeroes in pieces; ``fast``: else ENOTSUP."""
        self._check_writable(offset + length)
        await self._pool.run(self._changed, self._space.zero, offset, length, may_trim, fast)

    async def trim(self, offset: int, length: int) -> None:
        """Punch the range out, where the file system or the device can."""
        self._check_writable(offset + length)
        await self._pool.run(self._changed, self._space.discard, offset, length)

    async def punch(self, offset: int, length: int) -> None:
        """As ``trim``, but ENOTSUP where nothing can be freed."""
        self._check_writable()
        if not await self._pool.run(self._changed, self._space.trim, offset, length):
            raise OSError(errno.ENOTSUP, "the range's space cannot be freed", self.name)

    def change(self, change: Callable[..., Result], *arguments: int) -> Awaitable[Result]:
        """A change of the caller's own, in the pool: ``change(descriptor, *arguments)``."""
        self._check_writable()
        return self._pool.run(self._changed, change, self._descriptor, *arguments)

    def lend(self) -> int:
        """The open file as a descriptor of the caller's, who closes it."""
        if self._descriptor < 0:
            raise closed_error(self.name)
        return os.dup(self._descriptor)

    def _changed(self, change: Callable[..., Result], *arguments: int) -> Result:
        """Run by a pool thread: a change of space, which is to be flushed like a write."""
        self._holes.freed()
        try:
            return change(*arguments)
        finally:
            # Again: a map made meanwhile may have been too early.
            self._holes.freed()
            self._sync.changed()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Data and holes by SEEK_DATA and SEEK_HOLE; one data extent where they are refused."""
        known = self._holes.known(offset, length)
        if known is not None and self._descriptor >= 0:
            return known
        return await self._pool.run(self._holes.find, offset, length)

    def used_bytes(self) -> int:
        """Bytes of space that the file holds on its file system (0 for a block device)."""
        if self._descriptor < 0:
            raise closed_error(self.name)
        return os.fstat(self._descriptor).st_blocks * 512

    def dirty_pages(self, offset: int, length: int) -> int:
        """Pages of the range that the disk has yet to get. Raises OSError where that isn't told."""
        return system_calls.dirty_pages(self._descriptor, offset, length, self.name)

    def status(self) -> os.stat_result:
        """fstat(2) of the image."""
        if self._descriptor < 0:
            raise closed_error(self.name)
        return os.fstat(self._descriptor)

    # Durable, and closed

    def flush_now(self) -> bool:
        """Whether everything whose write has ended is durable already."""
        if self._descriptor < 0:
            return False  # ``flush`` says so
        return self.read_only or self.medium is Medium.MEMORY or self._sync.is_done()

    async def flush(self) -> None:
        """fdatasync, which fails for good once it has failed (sync.py)."""
        if not self.read_only:
            await self._pool.run(self._sync.run, self._descriptor)

    def close(self, then: Callable[[], None] | None = None) -> None:
        """Take no more calls; the file and its locks go when the last call has ended.

        ``then`` is called after that, by a thread of the pool.
        """
        descriptor = self._descriptor
        if descriptor >= 0:
            self._descriptor = -1  # EBADF for the inline calls

            def last() -> None:
                os.close(descriptor)
                if then is not None:
                    then()

            self._pool.close(last)

    async def wait_closed(self) -> None:
        """Return when the last call has ended and the descriptor is closed."""
        await self._pool.wait_closed()

    def _check_writable(self, end: int = 0) -> None:
        if self.read_only:
            raise read_only_error(self.name)
        self._check_end(end)
