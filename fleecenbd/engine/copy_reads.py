"""What a copy learns of the active image: the data there, that there is none, or where it is.

A hole is not worth a read: to read it, most file systems fill the page cache with zeroes. So a
long copy asks for the extents first, as long as holes are what is found: the first of a fleece
does, and each after one that found nothing but zeroes. Over data that question is a waste.

Data that the temp image can share with the active image need not be read at all (``parts``). Then
nobody sees which of it is zeroes, but for the holes.

What is learned stays true until the copy ends, as a read's data does: the copy is in flight, and
where it still has ``access`` nobody may change the image before.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from bitarray import bitarray

from fleecenbd.engine.state import Copy, FleeceState
from fleecenbd.engine.zeroes import is_zero
from fleecenbd.storage.device import EXTENT_ZERO, Buffer, Cloning, Extent

HOLE_LENGTH_MIN = 256 << 10
"""Bytes. A shorter copy just reads."""
CLONE_LENGTH_MIN = 256 << 10
"""Bytes. Shorter runs of data are read: docs/images.md has the figures."""


class How(Enum):
    """How a part of a copy is made."""

    ZERO = auto()
    READ = auto()
    CLONE = auto()


Part = tuple[int, int, How]
"""(first cluster, end, how)."""


class CopyReads:
    """The reads of one fleece's copies."""

    def __init__(self, state: FleeceState) -> None:
        self._state = state
        self._expects_holes = True
        """The last long copy found nothing but zeroes: the next one is likely to."""
        self._cloning = state.target if isinstance(state.target, Cloning) else None

    async def parts(self, copy: Copy) -> list[Part] | None:
        """The parts of a copy of which some are to be cloned; None: ``read`` all of it."""
        state = self._state
        offset, length = state.access.bytes_of(copy.first, copy.end)
        if (
            length < CLONE_LENGTH_MIN
            or self._cloning is None
            or not self._cloning.clones(state.source, offset, length)
        ):
            return None
        try:
            extents = await state.source.extents(offset, length)
        except OSError:
            return None  # the read may do better, and says what is wrong if it doesn't
        parts = [part for run in self._runs(copy, extents) for part in self._split(*run)]
        kinds = {how for _, _, how in parts}
        if How.READ in kinds and How.CLONE not in kinds:
            self._expects_holes = False  # there is data, and ``read`` need not ask again
            return None
        if copy.shared is not None:
            copy.shared.parties -= 1
            copy.shared = None
        return parts

    def _runs(self, copy: Copy, extents: list[Extent]) -> Iterator[tuple[int, int, bool]]:
        """(first, end, is there data) of clusters that are alike."""
        shift = self._state.shift
        data = bitarray(copy.end - copy.first)
        data.setall(0)
        start = 0
        for length, flags in extents:
            end = start + length
            if not flags & EXTENT_ZERO:
                data[start >> shift : -(-end >> shift)] = 1
            start = end
        first = 0
        while first < len(data):
            stop = data.find(not data[first], first)
            if stop < 0:
                stop = len(data)
            yield copy.first + first, copy.first + stop, bool(data[first])
            first = stop

    def _split(self, first: int, end: int, is_data: bool) -> Iterator[Part]:
        """A run as one part; a last, partial cluster of the disk shares no blocks."""
        if not is_data:
            yield first, end, How.ZERO
            return
        whole = min(end, self._state.size >> self._state.shift)
        if whole > first and (whole - first) << self._state.shift >= CLONE_LENGTH_MIN:
            yield first, whole, How.CLONE
            first = whole
        if first < end:
            yield first, end, How.READ

    async def read_part(self, first: int, end: int) -> Buffer:
        """The data of these clusters. Raises OSError."""
        source = self._state.source
        offset, length = self._state.access.bytes_of(first, end)
        now = source.pread_now(offset, length)
        return now if now is not None else await source.pread(offset, length)

    async def read(self, copy: Copy) -> Buffer | None:
        """The data of the copy's clusters; None: zeroes, all of it. Raises OSError."""
        offset, length = self._state.access.bytes_of(copy.first, copy.end)
        # No copy keeps the data longer than it needs it.
        shared, copy.shared = copy.shared, None
        is_long = length > HOLE_LENGTH_MIN
        if is_long and self._expects_holes and await self._is_hole(offset, length):
            if shared is not None:
                shared.parties -= 1
            return None
        if shared is not None:
            data = await shared.take()
        else:
            data = await self.read_part(copy.first, copy.end)
        if is_long:
            self._expects_holes = is_zero(data, 0, length)
        return data

    async def _is_hole(self, offset: int, length: int) -> bool:
        try:
            extents = await self._state.source.extents(offset, length)
        except OSError:
            return False  # the read may do better, and says what is wrong if it doesn't
        return all(flags & EXTENT_ZERO for _, flags in extents)
