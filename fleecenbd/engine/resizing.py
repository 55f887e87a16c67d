"""An active image whose size others change, or that is lost: what that is the end of."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleecenbd.engine.recording import RecordingBitmap
from fleecenbd.storage.device import Losable, Reaching, Resizable

if TYPE_CHECKING:
    from fleecenbd.engine.disk import Disk
    from fleecenbd.engine.fleece import Fleece


def resized(disk: Disk, size: int) -> list[RecordingBitmap]:
    """The disk's image has so many bytes now. Where these are not the disk's, there is no point in
    time any more: all sessions break, and bitmaps are lost; returns those that were not before.
    """
    disk.image_size = size
    if isinstance(disk.device, Resizable):
        disk.device.limit(size if size < disk.size else None)
    if size == disk.size:
        return []
    disk.resizes += 1
    why = f"the image of {disk.name} changed its size from {disk.size} to {size} bytes"
    for fleece in list(disk.fleeces):
        fleece.state.break_session(why)
    lost = [bitmap for bitmap in disk.bitmaps.values() if bitmap.lost is None]
    for bitmap in lost:
        bitmap.lose(why)
    return lost


def is_lost(disk: Disk, why: str) -> None:
    """Who keeps the disk's image is gone, and every request fails: all sessions break. What was
    written and not flushed may be lost, and be as it was before: bitmaps are lost, too."""
    disk.lost = why
    reason = loss_of(disk)
    for fleece in list(disk.fleeces):
        fleece.state.break_session(reason)
    for bitmap in disk.bitmaps.values():
        bitmap.lose(reason)


def loss_of(disk: Disk) -> str:
    """What its sessions and bitmaps, which are lost with it, say of a lost disk."""
    return f"disk {disk.name} is lost: {disk.lost}"


def is_away(disk: Disk) -> bool:
    """Whether the server that has the disk's image is being connected to again."""
    device = disk.device
    # What can be lost is not connected to again.
    return isinstance(device, Reaching) and not isinstance(device, Losable) and not device.is_usable


def check_usable(disk: Disk) -> None:
    """Raises OSError: EIO where the disk is lost, EINVAL while its image has another size."""
    if disk.lost is not None:
        raise OSError(
            errno.EIO,
            f"disk {disk.name} is lost: {disk.lost}; add it anew, or start the server again",
        )
    if disk.image_size != disk.size:
        raise OSError(
            errno.EINVAL,
            f"the image of {disk.name} has {disk.image_size} bytes now, and {disk.size} when it "
            "was opened; add the disk anew, or start the server again",
        )


class Alive:
    """What a session is being armed over: as it was when that began."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        """Raises OSError as ``check``."""
        self._resizes = {disk: disk.resizes for disk in disks}
        self.check(())

    def check(self, fleeces: Sequence[Fleece]) -> None:
        """Raises OSError where a disk cannot be used, has had another size in between, even if it
        has its own again, or a temp image is lost."""
        for disk, resizes in self._resizes.items():
            check_usable(disk)
            if disk.resizes != resizes:
                raise OSError(
                    errno.EINVAL, f"the image of {disk.name} had another size in between; try again"
                )
        for fleece in fleeces:
            if fleece.broken is not None:
                raise OSError(errno.EIO, f"{fleece.name}: {fleece.broken}")
