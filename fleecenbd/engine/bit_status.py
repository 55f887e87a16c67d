"""Meta contexts that are told from bits alone, in one step: nothing is asked of a device.

(length, flags) runs from ``offset`` on, in order, without a gap. An answer may cover less than it
was asked about, as it ends with the extent that passed the most of them. ``one``: only the first
extent is wanted, and no more is looked at than that takes (QEMU asks so, extent by extent).
"""

from __future__ import annotations

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.extents import STATUS_EXTENTS_MAX, append_extent
from fleecenbd.storage.device import Extent

ACCESS_READABLE = 1
"""x-fleecenbd:access: the range may still be read."""
ACCESS_IN_TEMP = 2
"""x-fleecenbd:access: the range is held in the temp image."""
DIRTY = 1
"""qemu:dirty-bitmap: the range changed since the bitmap's ``since``."""


def access_extents(
    access: Bitmap, done: Bitmap, offset: int, length: int, *, one: bool
) -> list[Extent]:
    """x-fleecenbd:access of a range."""
    extents: list[Extent] = []
    count_max = 1 if one else STATUS_EXTENTS_MAX
    for start, run, readable in access.runs(offset, length):
        parts = done.runs(start, run) if readable else [(start, run, False)]
        for _, part, in_temp in parts:
            flags = ACCESS_READABLE | (ACCESS_IN_TEMP if in_temp else 0) if readable else 0
            append_extent(extents, part, flags)
            if len(extents) > count_max:
                return extents[:1] if one else extents
    return extents


def dirty_extents(own: Bitmap, offset: int, length: int, *, one: bool) -> list[Extent]:
    """qemu:dirty-bitmap of a range."""
    extents: list[Extent] = []
    count_max = 1 if one else STATUS_EXTENTS_MAX
    for _, run, dirty in own.runs(offset, length):
        append_extent(extents, run, DIRTY if dirty else 0)
        if len(extents) > count_max:
            return extents[:1] if one else extents
    return extents
