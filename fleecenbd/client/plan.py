"""What is to be copied, block by block: asked of the source piece by piece, ahead of the copying.

    scan   what is wanted (everything, or what is dirty), and that all of it is durable already or
           may be read: before the first byte is copied
    map    base:allocation, ahead of the copying, as far as RUNS_AHEAD_MAX runs go
    next   the next blocks to copy: one with what is to be read of it, or many of zeroes

    wanted            ███████████████████░░░░████████      ░ not dirty
    durable           ██████                               an earlier pull's
    base:allocation         ▓▓▓▓▓......▓▓    ▓▓......      ▓ data, . zeroes
    items                   └data┘└zero┘└┘   └┘└zero┘

The map of a disk need not fit into memory, and the first block need not wait for it. As long as
the map has not come to the disk's end, how much data is left is an estimate: as dense as so far.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from fleecenbd.client.endpoints import Source
from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.storage.device import EXTENT_ZERO, Extent

ALLOCATION = "base:allocation"
ACCESS = "x-fleecenbd:access"
DIRTY = "qemu:dirty-bitmap:"
"""Meta contexts; a bitmap's name follows the last one."""

READABLE = 1
IN_TEMP = 2
"""Bits of ACCESS."""
IS_DIRTY = 1
"""Bit of DIRTY."""

RUNS_AHEAD_MAX = 50_000
"""Runs that the map may be ahead of the copying: some MiB of memory."""
WINDOW_LENGTH = 1 << 30
WINDOW_LENGTH_MIN = 16 << 20
WINDOW_LENGTH_MAX = 16 << 30
"""Bytes of the disk that are mapped by one call: more where it has few extents."""
WINDOW_EXTENTS = 4096
"""Extents that one call should bring: about a millisecond's work at both ends."""
ZERO_LENGTH_MIN = 32 << 10
"""Bytes of zeroes within a block, below which reading over them costs less than two requests."""
ZERO_BLOCKS_MAX = 4096
"""Blocks of zeroes that are one item."""


@dataclass(slots=True)
class Item:
    """Blocks that are copied in one go: one, or any number that are zeroes and wanted whole."""

    first: int
    count: int
    data: list[tuple[int, int]]
    """(offset, length) of what is to be read, in order."""
    zeroes: list[tuple[int, int]]
    """(offset, length) of what is wanted and known to be zeroes."""

    @property
    def wanted(self) -> int:
        """Bytes that become durable with it."""
        return self.data_length + sum(length for _, length in self.zeroes)

    @property
    def data_length(self) -> int:
        """Bytes to be read."""
        return sum(length for _, length in self.data)

    @property
    def parts(self) -> list[tuple[int, int, bool]]:
        """(offset, length, is data) of all that is wanted, in order."""
        found = [(offset, length, True) for offset, length in self.data]
        return sorted(found + [(offset, length, False) for offset, length in self.zeroes])


class Windows:
    """Lengths for one map call after the other, so that none brings too much or too little."""

    def __init__(self) -> None:
        self.length = WINDOW_LENGTH

    def saw(self, extents: int) -> None:
        """So many extents came from the last window."""
        if extents > WINDOW_EXTENTS:
            self.length = max(WINDOW_LENGTH_MIN, self.length // 2)
        elif extents < WINDOW_EXTENTS // 4:
            self.length = min(WINDOW_LENGTH_MAX, self.length * 2)


async def map_windows(
    source: Source, contexts: Iterable[str]
) -> AsyncIterator[tuple[int, list[list[Extent]]]]:
    """Offset and extents, context by context, of one window after the other."""
    windows, offset = Windows(), 0
    while offset < source.size:
        length = min(windows.length, source.size - offset)
        found = [await source.extents(context, offset, length) for context in contexts]
        windows.saw(sum(map(len, found)))
        yield offset, found
        offset += length


def overlay(*maps: list[Extent]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(length, flags of each map) of each run in which nothing changes. One length in sum."""
    iterators = [iter(extents) for extents in maps]
    now = [next(iterator, (0, 0)) for iterator in iterators]
    while True:
        step = min(length for length, _ in now)
        if step:
            yield step, tuple(flags for _, flags in now)
        for index, (length, flags) in enumerate(now):
            if length > step:
                now[index] = (length - step, flags)
                continue
            following = next(iterators[index], None)
            if following is None:
                return
            now[index] = following


class Plan:
    """The blocks of one source, of which some are durable in the target already."""

    def __init__(
        self, source: Source, durable: Bitmap, *, bitmap: str | None, align: int = 1
    ) -> None:
        """``durable``: by block, as an earlier pull has left it; changed by whoever copies.

        ``bitmap``: copy what is dirty there only. ``align``, a power of two: what is read of a
        block begins and ends at multiples of it, though zeroes are read with it.
        """
        self.durable = durable
        self.block_size = durable.cluster_size
        self.wanted = Bitmap(source.size, self.block_size, fill=bitmap is None)
        """Blocks of which anything is to be copied."""
        self.to_copy = source.size if bitmap is None else 0
        self.resumed = 0
        """Bytes wanted, and of these durable from the start; known after ``scan``."""
        self.temp = 0
        """Bytes that the server held in its temp image during ``scan``."""
        self.dirty = array("Q") if bitmap is not None else None
        """Offset, length, offset, length … of what is dirty; None: everything is wanted."""
        self._offsets: array[int] | None = None
        """Those of ``dirty``, once somebody looks for one."""
        self._source = source
        self._bitmap = None if bitmap is None else f"{DIRTY}{bitmap}"
        self._align = align
        self._runs: deque[tuple[int, int, bool]] = deque()  # (offset, end, is data), in order
        self._mapped = 0
        self._data_mapped = 0
        self._data_given = 0
        self._hungry = False
        self._changed = asyncio.Event()
        self._block = 0

    @property
    def data_left(self) -> int:
        """Bytes that are still to be read, not counting what was given out: an estimate while
        the map is not whole."""
        found = self._data_mapped - self._data_given
        unmapped = self._source.size - self._mapped
        if not unmapped:
            return found
        if not self._mapped:
            return self.to_copy - self.resumed
        return found + int(unmapped * self._data_mapped / self._mapped)

    # -- what is wanted, and whether it can be had ---------------------------------------------

    async def scan(self) -> None:
        """Find out what is wanted. Raises OSError where some of it is nowhere to be had."""
        source = self._source
        contexts = [c for c in (ACCESS, self._bitmap) if c is not None and c in source.contexts]
        if self._bitmap is not None and self._bitmap not in contexts:
            raise OSError(
                errno.EINVAL,
                f"the export tells of no bitmap {self._bitmap.removeprefix(DIRTY)}: its session "
                "was armed without it, or reads everything (see fleecenbd session show)",
                source.name,
            )
        if not contexts:
            self.resumed = self.durable.count_bytes()
            return
        async for offset, maps in map_windows(source, contexts):
            for length, flags in overlay(*maps):
                told = dict(zip(contexts, flags, strict=True))
                access = told.get(ACCESS, READABLE)
                if access & IN_TEMP:
                    self.temp += length
                if self._bitmap is None or told[self._bitmap] & IS_DIRTY:
                    readable = bool(access & READABLE)
                    self._want(offset, length, readable=readable)
                offset += length

    def _want(self, offset: int, length: int, *, readable: bool) -> None:
        for start, run, is_durable in self.durable.runs(offset, length):
            if is_durable:
                self.resumed += run
            elif not readable:
                raise self._gone(start)
        if self.dirty is None:
            return
        self.to_copy += length
        self.wanted.set(offset, length)
        if self.dirty and self.dirty[-2] + self.dirty[-1] == offset:
            self.dirty[-1] += length
        else:
            self.dirty.extend((offset, length))

    def _gone(self, offset: int) -> OSError:
        if self.durable.bits.any():
            text = (
                f"what is at {offset} was released by somebody else, or was read once and never "
                "became durable here: this backup cannot be completed; begin a new session, and "
                "pull that"
            )
        elif self._bitmap is None:
            text = (
                f"what is at {offset} may not be read: either the session reads only what changed "
                "(give --bitmap NAME), or it was released already, and this would be a backup with "
                "holes (begin a new session, and pull that)"
            )
        else:
            text = (
                f"what is at {offset} has changed, and was released already: this would be a "
                "backup with holes; begin a new session, and pull that"
            )
        return OSError(errno.EINVAL, text, self._source.name)

    def wanted_bytes(self, offset: int, length: int) -> int:
        """Of this range. After ``scan``."""
        if self.dirty is None:
            return length
        if self._offsets is None:
            self._offsets = self.dirty[::2]
        offsets, end = self._offsets, offset + length
        found = 0
        for run in range(max(0, bisect_right(offsets, offset) - 1), len(offsets)):
            start = offsets[run]
            if start >= end:
                break
            found += max(0, min(end, start + self.dirty[2 * run + 1]) - max(offset, start))
        return found

    # -- the map -------------------------------------------------------------------------------

    async def map(self) -> None:
        """Map the disk, to its end, some way ahead of ``next``. To be run beside it."""
        source = self._source
        contexts = [c for c in (ALLOCATION, self._bitmap) if c is not None and c in source.contexts]
        if not contexts:
            self._add(0, source.size, is_data=True)
            self._mapped = source.size
            self._changed.set()
            return
        async for start, maps in map_windows(source, contexts):
            offset = start
            for length, flags in overlay(*maps):
                told = dict(zip(contexts, flags, strict=True))
                if self._bitmap is None or told[self._bitmap] & IS_DIRTY:
                    is_zero = bool(told.get(ALLOCATION, 0) & EXTENT_ZERO)
                    self._add(offset, length, is_data=not is_zero)
                offset += length
            self._mapped = offset
            self._changed.set()
            while len(self._runs) > RUNS_AHEAD_MAX and not self._hungry:
                self._changed.clear()
                await self._changed.wait()

    def _add(self, offset: int, length: int, *, is_data: bool) -> None:
        runs, end = self._runs, offset + length
        if is_data:
            # As far as ``next`` will give it out.
            self._data_mapped += sum(
                run for _, run, durable in self.durable.runs(offset, length) if not durable
            )
        if runs and runs[-1][1] == offset and runs[-1][2] == is_data:
            runs[-1] = (runs[-1][0], end, is_data)
        else:
            runs.append((offset, end, is_data))

    # -- the blocks ----------------------------------------------------------------------------

    async def next(self) -> Item | None:
        """The next blocks to copy, in the disk's order; None at the end. One caller at a time."""
        bits, blocks = self.durable.bits, self.durable.clusters
        while True:
            first = bits.find(0, self._block, blocks)
            if first >= 0:
                first = self.wanted.bits.find(1, first, blocks)
            if first < 0:
                self._block = blocks
                return None
            if bits[first]:
                self._block = first
                continue
            await self._have(self.durable.bytes_of(first, first + 1))
            item = self._take(first)
            self._block = first + item.count
            return item

    async def _have(self, block: tuple[int, int]) -> None:
        """Wait until the map covers the block; forget what is before it."""
        offset, length = block
        runs = self._runs
        while True:
            while runs and runs[0][1] <= offset:
                runs.popleft()
            self._hungry = self._mapped < offset + length
            self._changed.set()
            if not self._hungry:
                return
            self._changed.clear()
            await self._changed.wait()

    def _take(self, first: int) -> Item:
        offset, length = self.durable.bytes_of(first, first + 1)
        end = offset + length
        start, stop, is_data = self._runs[0]
        if not is_data and start <= offset and stop >= end:
            return self._take_zeroes(first, stop)
        parts = []
        for start, stop, is_data in self._runs:
            if start >= end:
                break
            start, stop = max(start, offset), min(stop, end)
            if is_data:
                self._data_given += stop - start
                parts.append((start, stop, True))
            else:
                parts += self._read_over(start, stop)
        return Item(first, 1, *_joined(parts))

    def _read_over(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """Zeroes within a block, of which some had better be read as if they were data: what is
        short, and what is beside data in the same ``align``."""
        mask = self._align - 1
        first = (start + mask) & ~mask
        last = stop if stop == self._source.size else stop & ~mask
        if last - first < ZERO_LENGTH_MIN:
            return [(start, stop, True)]
        parts = [(start, first, True), (first, last, False), (last, stop, True)]
        return [part for part in parts if part[0] < part[1]]

    def _take_zeroes(self, first: int, stop: int) -> Item:
        """As many blocks as there are zeroes, and as are not durable."""
        size, blocks = self._source.size, self.durable.clusters
        last = blocks if stop >= size else stop // self.block_size
        last = min(last, first + ZERO_BLOCKS_MAX)
        durable = self.durable.bits.find(1, first, last)
        if durable >= 0:
            last = durable
        return Item(first, last - first, [], [self.durable.bytes_of(first, last)])


def _joined(
    parts: list[tuple[int, int, bool]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(offset, length) of data, and of zeroes; neighbours of a kind made one."""
    data: list[tuple[int, int]] = []
    zeroes: list[tuple[int, int]] = []
    for start, stop, is_data in parts:
        kind = data if is_data else zeroes
        if kind and sum(kind[-1]) == start:
            kind[-1] = (kind[-1][0], stop - kind[-1][0])
        else:
            kind.append((start, stop - start))
    return data, zeroes
