"""Watches the disks' images: others can change their sizes, and whoever keeps one can end.

Looks once a second, in each disk's own threads: a disk that hangs is not asked again before it has
answered, and holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from weakref import WeakSet

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import RecordingBitmap
from fleecenbd.engine.resizing import is_away, loss_of, resized
from fleecenbd.server.events import BITMAP_LOST, DISK_AWAY, DISK_BACK, DISK_LOST, DISK_RESIZED
from fleecenbd.server.server import Server
from fleecenbd.storage.device import Resizable

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0


class SizeWatch:
    """The disks of one server, those that come later, too."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._looks: dict[Disk, asyncio.Task[int]] = {}
        self._commits: set[asyncio.Task[None]] = set()
        self._lost: WeakSet[Disk] = WeakSet()
        """That these are lost was told,"""
        self._away: WeakSet[Disk] = WeakSet()
        """and that these are away."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on, until ``stop``."""
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._look_again)

    def stop(self) -> None:
        """Looks in flight go on, and nothing comes of them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self) -> None:
        self.start()  # first: what fails below is told, and looked at again
        self.look()

    def look(self) -> None:
        """Tell of those that are lost, and ask every other disk that is not being asked."""
        loop = asyncio.get_running_loop()
        for disk in self._server.disks.values():
            device = disk.device
            if is_away(disk) != (disk in self._away):
                self._tell_away(disk)
            if disk.lost is not None:
                self._found_lost(disk)
            elif disk not in self._looks and isinstance(device, Resizable):
                task = loop.create_task(device.present_size(), name=f"size of {disk.name}")
                self._looks[disk] = task
                task.add_done_callback(partial(self._looked, disk))

    def _looked(self, disk: Disk, task: asyncio.Task[int]) -> None:
        del self._looks[disk]
        if task.cancelled() or task.exception() is not None:
            return  # a disk that cannot be asked says so to its guests
        if self._timer is not None and self._server.disks.get(disk.name) is disk:
            self._found(disk, task.result())

    def _found(self, disk: Disk, size: int) -> None:
        is_news = size != disk.image_size
        if not is_news and size == disk.size:
            return
        # Again and again while it is so: what was being begun meanwhile must not go on, either.
        lost = resized(disk, size)
        if is_news:
            self._tell(disk, size)
        self._tell_bitmaps(disk, lost)

    def _found_lost(self, disk: Disk) -> None:
        if disk in self._lost:
            return
        self._lost.add(disk)
        logger.error(
            "disk %s is lost, and every request fails: %s; remove it and add it anew, or start the "
            "server again",
            disk.name,
            disk.lost,
        )
        self._server.events.tell(DISK_LOST, disk=disk.name, reason=disk.lost)
        reason = loss_of(disk)
        lost = [bitmap for bitmap in disk.bitmaps.values() if bitmap.lost == reason]
        self._tell_bitmaps(disk, lost)

    def _tell_away(self, disk: Disk) -> None:
        if disk not in self._away:
            self._away.add(disk)
            self._server.events.tell(DISK_AWAY, disk=disk.name, image=disk.device.name)
            return
        self._away.discard(disk)
        self._server.events.tell(DISK_BACK, disk=disk.name, image=disk.device.name)

    def _tell_bitmaps(self, disk: Disk, lost: Sequence[RecordingBitmap]) -> None:
        """That these are lost, now: told, and written down."""
        for bitmap in lost:
            logger.error(
                "bitmap %s of %s is lost: %s. A full backup is needed",
                bitmap.name,
                disk.name,
                bitmap.lost,
            )
            self._server.events.tell(
                BITMAP_LOST, disk=disk.name, bitmap=bitmap.name, reason=bitmap.lost
            )
        if lost and self._server.store is not None:
            task = asyncio.get_running_loop().create_task(self._commit(disk.name))
            self._commits.add(task)
            task.add_done_callback(self._commits.discard)

    def _tell(self, disk: Disk, size: int) -> None:
        if size == disk.size:
            logger.warning(
                "the image of %s has its %d bytes again; sessions and bitmaps that it had before "
                "stay broken, and lost",
                disk.name,
                size,
            )
        else:
            logger.error(
                "the image of %s changed its size from %d to %d bytes: its sessions break, and no "
                "new one begins. Guests keep the size that they were given%s; add the disk anew, "
                "or start the server again",
                disk.name,
                disk.size,
                size,
                ", and get EIO beyond its end" if size < disk.size else "",
            )
        self._server.events.tell(DISK_RESIZED, disk=disk.name, size=disk.size, image_size=size)

    async def _commit(self, name: str) -> None:
        assert self._server.store is not None, "else nothing lasts"
        try:
            await self._server.store.commit()
        except OSError as error:
            logger.error("that the bitmaps of %s are lost is not written down: %s", name, error)
