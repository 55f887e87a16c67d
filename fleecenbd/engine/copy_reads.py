"""What a copy learns of the active image: the data there, or that there is none.

A hole is not worth a read: to read it, most file systems fill the page cache with zeroes. So a
long copy asks for the extents first, as long as holes are what is found: the first of a fleece
does, and each after one that found nothing but zeroes. Over data that question is a waste.

What is learned stays true until the copy ends, as a read's data does: the copy is in flight, and
where it still has ``access`` nobody may change the image before.
"""

from __future__ import annotations

from fleecenbd.engine.state import Copy, FleeceState
from fleecenbd.engine.zeroes import is_zero
from fleecenbd.storage.device import EXTENT_ZERO, Buffer

HOLE_LENGTH_MIN = 256 << 10
"""Bytes. A shorter copy just reads."""


class CopyReads:
    """The reads of one fleece's copies."""

    def __init__(self, state: FleeceState) -> None:
        self._state = state
        self._expects_holes = True
        """The last long copy found nothing but zeroes: the next one is likely to."""

    async def read(self, copy: Copy) -> Buffer | None:
        """The data of the copy's clusters; None: zeroes, all of it. Raises OSError."""
        source = self._state.source
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
            now = source.pread_now(offset, length)
            data = now if now is not None else await source.pread(offset, length)
        if is_long:
            self._expects_holes = is_zero(data, 0, length)
        return data

    async def _is_hole(self, offset: int, length: int) -> bool:
        try:
            extents = await self._state.source.extents(offset, length)
        except OSError:
            return False  # the read may do better, and says what is wrong if it doesn't
        return all(flags & EXTENT_ZERO for _, flags in extents)
