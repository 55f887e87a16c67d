"""Lists of extents: joined, cut to pieces, and asked of a device a window at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from fleecenbd.storage.device import Extent

STATUS_WINDOW = 128 << 20
"""Bytes that a device is asked for at first."""
STATUS_WINDOW_MAX = 4 << 30
STATUS_EXTENTS_MAX = 16 << 10
"""An answer ends after the window in which it passed this many extents."""


def append_extent(extents: list[Extent], length: int, flags: int) -> None:
    """Add an extent, merged with the last one where the flags are the same."""
    if length <= 0:
        return
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    else:
        extents.append((length, flags))


async def windowed_status(
    status: Callable[[int, int], Awaitable[list[Extent]]],
    offset: int,
    length: int,
    *,
    one: bool,
) -> list[Extent]:
    """``status(offset, length)`` of growing windows, joined until there are extents enough.

    A client may ask about 2 GiB, or a whole disk, only to look at the first extent: without
    windows each of its requests would map the rest again. ``one``: the first extent only.
    """
    stop = offset + length
    window = STATUS_WINDOW
    extents: list[Extent] = []
    while offset < stop:
        part = min(window, stop - offset)
        for extent in await status(offset, part):
            append_extent(extents, *extent)
        offset += part
        if len(extents) > (1 if one else STATUS_EXTENTS_MAX):
            break
        window = min(window * 2, STATUS_WINDOW_MAX)
    return extents[:1] if one else extents


class ExtentCursor:
    """Cuts pieces, in rising order, out of a device's extents that begin at ``offset``."""

    def __init__(self, offset: int, extents: list[Extent]) -> None:
        self._position = offset
        self._extents = iter(extents)
        self._left = 0
        self._flags = 0

    def cut(self, start: int, stop: int) -> Iterator[Extent]:
        """The extents of ``[start, stop)``. The device must have answered for all of it."""
        while start < stop:
            if self._left == 0:
                self._left, self._flags = next(self._extents)
                continue
            if self._position < start:
                skip = min(self._left, start - self._position)
                self._position += skip
                self._left -= skip
                continue
            length = min(self._left, stop - start)
            yield length, self._flags
            start += length
            self._position += length
            self._left -= length
