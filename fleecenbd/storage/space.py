"""Space: zeroing and freeing ranges of a raw image, by fallocate where that is understood.

The same calls serve files and block devices. For a block device the kernel turns
FALLOC_FL_PUNCH_HOLE into a discard that is certain to leave zeroes (and refuses it where the
device can't promise that), FALLOC_FL_ZERO_RANGE into the device's own way of writing zeroes
(BLKZEROOUT), which in the worst case writes them out. What a device discards without that
promise takes an ioctl, BLKDISCARD.

A mode that was refused once is not asked for again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fleecenbd.storage import system_calls
from fleecenbd.storage.errors import slow_zero_error
from fleecenbd.storage.system_calls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
)

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
DISCARD = -1
"""In the place of a mode: the ioctl BLKDISCARD."""

_REFUSALS = frozenset({errno.ENOTSUP, errno.ENOSYS, errno.ENODEV})


class Space:
    """The ranges of one open image. Its calls block: they are for a pool's threads."""

    def __init__(
        self,
        descriptor: int,
        name: str,
        *,
        block_size: int = 1,
        write_zeroes: Callable[[int, int], None] | None = None,
    ) -> None:
        """``write_zeroes(offset, length)``: where another way is needed to write zeroes out.

        ``block_size``: bytes, at least as many as a device's own; parts of a block are written.
        """
        self._descriptor = descriptor
        self._name = name
        own_block_size = system_calls.block_size(descriptor)
        self._is_block_device = own_block_size > 1
        self._block_size = max(own_block_size, block_size)
        self._write_zeroes = write_zeroes or self._write_out
        # Threads add to it at any time; at worst a mode is tried, and refused, twice.
        self._refused: set[int] = set()

    def zero(self, offset: int, length: int, may_trim: bool, fast: bool) -> None:
        """Make the range read as zeroes; Device.zero's rules."""
        modes = [PUNCH] if may_trim else []
        if not (fast and self._is_block_device):
            modes.append(ZERO)
        start, end = self._whole_blocks(offset, length)
        if end > start and any(self._fallocate(mode, start, end - start) for mode in modes):
            self._write_edges(offset, length, start, end)
        elif fast:
            raise slow_zero_error(self._name)
        else:
            self._write_zeroes(offset, length)

    def trim(self, offset: int, length: int) -> bool:
        """Free the range, which then reads as zeroes. False, and nothing done, if that can't be.

        Parts of a block device's blocks are zeroed, not freed.
        """
        start, end = self._whole_blocks(offset, length)
        if end <= start or not self._fallocate(PUNCH, start, end - start):
            return False
        self._write_edges(offset, length, start, end)
        return True

    def discard(self, offset: int, length: int) -> None:
        """Free the range where that can be done, whatever it then reads as.

        A device that discards without promising zeroes (thin LVM is one) refuses to punch, and
        takes BLKDISCARD. It discards in units of its own, so that the range reads as before or
        as zeroes, block by block.
        """
        if self.trim(offset, length) or not self._is_block_device:
            return
        start, end = self._whole_blocks(offset, length)
        if end <= start or DISCARD in self._refused:
            return
        try:
            system_calls.discard(self._descriptor, start, end - start, self._name)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refused.add(DISCARD)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The start and the end of the whole blocks in the range; end <= start if none."""
        mask = self._block_size - 1
        return (offset + mask) & ~mask, (offset + length) & ~mask

    def _write_edges(self, offset: int, length: int, start: int, end: int) -> None:
        self._write_zeroes(offset, start - offset)
        self._write_zeroes(end, offset + length - end)

    def _write_out(self, offset: int, length: int) -> None:
        system_calls.write_zeroes(self._descriptor, offset, length, self._name)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """True if done, False if the file system or the device does not know the mode."""
        if mode in self._refused:
            return False
        try:
            system_calls.fallocate(self._descriptor, mode, offset, length, self._name)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refused.add(mode)
            return False
        return True
