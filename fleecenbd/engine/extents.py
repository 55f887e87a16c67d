"""Lists of extents: joined, cut to pieces, and asked of a device a window at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fleecenbd.storage.device import Extent

STATUS_WINDOW = 128 << 20
"""Bytes that a device is asked for at first."""
STATUS_WINDOW_ONE = 256 << 10
"""Where only the first extent is asked for, which may be short,"""
STATUS_WINDOW_ONE_GROWTH = 4
"""and how many times as long each next window is."""
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

    ``status`` may tell about less than it is asked for: the answer ends there.

    A client may ask about 2 GiB, or a whole disk, only to look at the first extent: without
    windows each of its requests would map the rest again. ``one``: the first extent only. QEMU
    maps an image so, a request for each extent: windows that were long from the start would make
    that take time with the square of the extents.
    """
    stop = offset + length
    window = min(STATUS_WINDOW, STATUS_WINDOW_ONE) if one else STATUS_WINDOW
    growth = STATUS_WINDOW_ONE_GROWTH if one else 2
    extents: list[Extent] = []
    while offset < stop:
        part = min(window, stop - offset)
        told = 0
        for run, flags in await status(offset, part):
            append_extent(extents, run, flags)
            told += run
        offset += part
        if told < part or len(extents) > (1 if one else STATUS_EXTENTS_MAX):
            break
        # A window that asked no device has awaited nothing: others must have their turn.
        await asyncio.sleep(0)
        window = min(window * growth, STATUS_WINDOW_MAX)
    return extents[:1] if one else extents
