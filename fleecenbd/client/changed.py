"""What a session's bitmap says has changed, bit by bit."""

from __future__ import annotations

from fleecenbd.client.endpoints import Source
from fleecenbd.client.plan import DIRTY, IS_DIRTY, map_windows
from fleecenbd.engine.bitmap import Bitmap


async def changed_bits(source: Source, bitmap: str, granularity: int) -> Bitmap:
    """A bit for each ``granularity`` bytes of the source of which something has changed.

    The session's own bits are constant: it does not matter when they are asked for, nor what was
    released. Raises OSError.
    """
    bits = Bitmap(source.size, granularity)
    async for start, (extents,) in map_windows(source, [f"{DIRTY}{bitmap}"]):
        offset = start
        for length, flags in extents:
            if flags & IS_DIRTY:
                bits.set(offset, length)
            offset += length
    return bits
