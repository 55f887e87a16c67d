"""Which parts of an image hold data: SEEK_DATA and SEEK_HOLE, and the one run that is remembered.

A client maps an image window by window. SEEK_HOLE looks for the end of a run of data wherever it
is, far behind the window; on tmpfs it looks at every page on the way. So mapping an image without
holes took time with the square of its size. The last run of data that was found is remembered.

That run may have got holes since, by us or by somebody else: "data" is always a right answer, if
not the best one. Nothing is remembered of holes. What frees space here makes it forgotten.
"""

from __future__ import annotations

import errno
import os

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Extent
from fleecenbd.storage.errors import shrank_error
from fleecenbd.storage.system_calls import image_size

EXTENT_COUNT_MAX = 65536
"""Extents per answer; what lies behind is reported as data, which is always allowed."""


class Holes:
    """The map of one open image."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        # A single store by whatever thread; at worst an older run is remembered.
        self._data = (0, 0)

    def known(self, offset: int, length: int) -> list[Extent] | None:
        """The extents of a range, where they are known without asking; else None."""
        begin, end = self._data
        return [(length, 0)] if begin <= offset and offset + length <= end else None

    def freed(self) -> None:
        """Space of the image is being given back, or was."""
        self._data = (0, 0)

    def find(self, offset: int, length: int, *, count_max: int = EXTENT_COUNT_MAX) -> list[Extent]:
        """The extents of a range: data, and holes that read as zeroes. Blocks.

        Where the file system or the device does not tell, all that it does not tell is data.
        Moves the descriptor's file position, which nobody here uses. Raises OSError(EIO) where
        the image became shorter.
        """
        descriptor = self._descriptor
        extents: list[Extent] = []
        position = offset
        end = offset + length
        while position < end and len(extents) < count_max:
            try:
                data = min(os.lseek(descriptor, position, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    break
                # No data from here to the end of the file: or no file any more.
                if image_size(descriptor) < end:
                    raise shrank_error(self._name, position) from None
                data = end
            if data > position:
                extents.append((data - position, EXTENT_HOLE | EXTENT_ZERO))
                position = data
                continue
            try:
                hole = os.lseek(descriptor, data, os.SEEK_HOLE)
            except OSError:
                break
            if hole <= data:
                break  # it was punched between the two calls
            if hole > end:
                self._data = (data, hole)
                hole = end
            extents.append((hole - data, 0))
            position = hole
        if position < end:
            extents.append((end - position, 0))
        return extents
