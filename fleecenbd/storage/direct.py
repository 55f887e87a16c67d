"""DirectDevice: a raw image in a regular file or on a block device, past the page cache (O_DIRECT).

The kernel then takes whole blocks only, at addresses that are aligned, too. So every request goes
through a bounce buffer of the thread that makes it, in pieces of at most ``BOUNCE_LENGTH``:

    request          ░░██████████████░░░
    blocks       │   ░░██│████████│██░░░   │      the first and the last one are read, changed
                 └───────┴────────┴────────┘      and written whole, and nobody else writes to
                                                  them meanwhile (claims.py)

Nothing is done "now": whatever is asked for may wait for the disk.

An odd end
    Of a file that does not end with a block, the last ``_tail_unit`` (a page at least) is written
    through the page cache, by a descriptor of its own: a whole block would make the file longer,
    until somebody cut it, and a kill can come between the two. No direct write ever goes to that
    part, and only one write at a time does; direct reads see what the page cache holds.

Durable is what ``flush`` has covered, here as elsewhere: the disk has a cache of its own.
A block that is written in part and whose write fails may hold anything: a disk that tears blocks
is the one case in which more than the request's range is lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from fleecenbd.storage import system_calls
from fleecenbd.storage.buffers import BOUNCE_LENGTH, BounceBuffers, uncleared_buffer
from fleecenbd.storage.claims import Claims, Range
from fleecenbd.storage.device import Buffer, Data
from fleecenbd.storage.errors import named_error, no_direct_error, shrank_error
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.filesystem import MEMORY_TYPES, Medium, hole_size_of, type_of
from fleecenbd.storage.pool import SIZE_MAX
from fleecenbd.storage.space import Space

_ZEROES = memoryview(bytes(BOUNCE_LENGTH))

Result = TypeVar("Result")


class DirectDevice(FileDevice):
    """A raw image, with no page cache between us and the disk."""

    _open_flags = os.O_DIRECT

    def __init__(
        self,
        descriptor: int,
        name: str,
        *,
        size: int | None = None,
        read_only: bool = False,
        role: str = "active",
        threads_max: int = SIZE_MAX,
        alignment: int | None = None,
    ) -> None:
        """Take over a descriptor opened with O_DIRECT. ``open`` is the usual way here.

        ``alignment``: what to believe instead of asking. Raises OSError: ENOTSUP where the file
        system has no direct I/O, or nothing but memory.
        """
        if alignment is None:
            alignment = system_calls.direct_alignment(descriptor)
        # What tmpfs takes since Linux 6.6 goes through the page cache, its only home.
        # (A block device's descriptor is on the file system of its node: on a tmpfs, mostly.)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not 0 < alignment <= BOUNCE_LENGTH or (is_file and type_of(descriptor) in MEMORY_TYPES):
            raise no_direct_error(name)
        super().__init__(
            descriptor,
            name,
            size=size,
            read_only=read_only,
            role=role,
            threads_max=threads_max,
            medium=Medium.SLOW,
        )
        self.alignment = alignment
        """Bytes, a power of two: a block."""
        # Not taken away by ``close``: a call in flight goes on, and no other begins.
        self._direct = descriptor
        self._bounce = BounceBuffers()
        self._claims = Claims()
        self._space = Space(descriptor, name, block_size=alignment, write_zeroes=self._write_zeroes)
        self._tail_unit = max(alignment, os.sysconf("SC_PAGESIZE"), hole_size_of(descriptor))
        self._direct_end = self.size
        self._tail = -1
        if self.size % alignment:
            self._direct_end -= self.size % self._tail_unit
            if not read_only:
                self._tail = _reopen(descriptor, name)

    # Reads

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read in the pool; EIO where the image became shorter than it was."""
        return await self._pool.run(self._read, offset, length)

    def _read(self, offset: int, length: int) -> Buffer:
        result: bytearray = uncleared_buffer(None, length)
        buffer = self._bounce.mine()
        position, end = offset, offset + length
        while position < end:
            start, piece_end, stop = self._piece(position, end)
            piece_end = min(piece_end, start + self._read_blocks(start, buffer[: stop - start]))
            if piece_end <= position:
                raise shrank_error(self.name, position)
            result[position - offset : piece_end - offset] = buffer[
                position - start : piece_end - start
            ]
            position = piece_end
        return result

    def _piece(self, position: int, end: int) -> tuple[int, int, int]:
        """(start, piece_end, stop): the blocks [start, stop) fit a buffer, and hold what is asked
        for from ``position`` to ``piece_end``, a block's end if not the request's."""
        mask = self.alignment - 1
        start = position & ~mask
        piece_end = min(end, start + BOUNCE_LENGTH)
        return start, piece_end, (piece_end + mask) & ~mask

    def _read_blocks(self, offset: int, buffer: memoryview) -> int:
        try:
            return os.preadv(self._direct, [buffer], offset)
        except OSError as error:
            raise named_error(error, self.name) from None

    # Writes

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write in the pool."""
        self._check_writable(offset + len(data))
        await self._pool.run(self._alone, self._write_all, offset, len(data), data)

    def _alone(
        self, call: Callable[..., Result], offset: int, length: int, *arguments: object
    ) -> Result:
        """Run by a pool thread: ``call(offset, length, *arguments)``, a change of that range."""
        whole, parts = self._blocks_of(offset, offset + length)
        with self._claims.of(whole, parts):
            return call(offset, length, *arguments)

    def _blocks_of(self, start: int, end: int) -> tuple[Range, tuple[Range, ...]]:
        """The blocks that a change touches, and those of them that it changes in part."""
        unit = self.alignment
        first, last = start - start % unit, end - end % unit
        whole = (first, last + unit if end > last else last)
        parts = []
        if start > first:
            parts.append((first, first + unit))
        if end > last:
            parts.append((last, last + unit))
        if end > self._direct_end:
            parts.append((self._direct_end, self.size))
        return whole, tuple(parts)

    def _write_all(self, offset: int, length: int, data: Data) -> None:
        try:
            self._write(offset, memoryview(data))
        finally:
            self._sync.changed()

    def _write(self, offset: int, data: memoryview) -> None:
        """The caller has claimed the blocks."""
        direct = max(0, min(len(data), self._direct_end - offset))
        if direct:
            self._write_blocks(offset, data[:direct])
        if direct < len(data):
            system_calls.write_all(self._tail, offset + direct, data[direct:], self.name)

    def _write_blocks(self, offset: int, data: memoryview) -> None:
        unit = self.alignment
        buffer = self._bounce.mine()
        position, end = offset, offset + len(data)
        while position < end:
            start, piece_end, stop = self._piece(position, end)
            if position > start:
                self._read_block(start, buffer[:unit])
            if piece_end < stop and (position == start or stop - unit > start):
                self._read_block(stop - unit, buffer[stop - unit - start : stop - start])
            buffer[position - start : piece_end - start] = data[
                position - offset : piece_end - offset
            ]
            system_calls.write_all(self._direct, start, buffer[: stop - start], self.name)
            position = piece_end

    def _read_block(self, offset: int, buffer: memoryview) -> None:
        if self._read_blocks(offset, buffer) < len(buffer):
            raise shrank_error(self.name, offset)

    def _write_zeroes(self, offset: int, length: int) -> None:
        """For Space, within a claim."""
        end = offset + length
        while offset < end:
            piece = _ZEROES[: min(len(_ZEROES), end - offset)]
            self._write(offset, piece)
            offset += len(piece)

    # Space: in part blocks are written, so that the whole call is a claim

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """As of any file: whole blocks without writing them where that can be."""
        self._check_writable(offset + length)
        await self._pool.run(
            self._changed, self._alone, self._space.zero, offset, length, may_trim, fast
        )

    async def trim(self, offset: int, length: int) -> None:
        """Punch the range out, where the file system or the device can."""
        self._check_writable(offset + length)
        await self._pool.run(self._changed, self._alone, self._space.discard, offset, length)

    # The end

    def close(self, then: Callable[[], None] | None = None) -> None:
        """Take no more calls; both descriptors go when the last call has ended."""
        tail = self._tail

        def last() -> None:
            if tail >= 0:
                os.close(tail)
            if then is not None:
                then()

        super().close(last)


def _reopen(descriptor: int, name: str) -> int:
    """The same file, open once more, and with a page cache."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise named_error(error, name) from None
