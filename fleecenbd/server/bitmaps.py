"""Recording bitmaps of disks, made and changed while guests run.

What a store describes is replaced after each change: until then a kill finds it as it was. So one
change at a time: what another one writes down in between would be true too early, or too late.
"""

from __future__ import annotations

import asyncio
import errno
import logging

from fleecenbd.engine import recording
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.recording import RecordingBitmap, check_removable
from fleecenbd.engine.resizing import check_usable
from fleecenbd.engine.store import MEMORY, Store
from fleecenbd.server.server import Server

logger = logging.getLogger(__name__)


class Bitmaps:
    """The recording bitmaps of a server's disks. Everything raises OSError."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._changing = asyncio.Lock()

    @property
    def _store(self) -> Store:
        return MEMORY if self._server.store is None else self._server.store

    def find(self, disk: str, name: str) -> RecordingBitmap:
        """Raises ENOENT."""
        found = self._server.disk(disk).bitmaps.get(name)
        if found is None:
            raise OSError(errno.ENOENT, f"{disk} has no bitmap called {name}")
        return found

    async def add(self, disk_name: str, name: str, granularity: int) -> RecordingBitmap:
        """Record from now on. Raises EEXIST, EINVAL for a granularity that is none."""
        disk = self._server.disk(disk_name)
        try:
            recording.check_granularity(granularity)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        if name in disk.bitmaps or name in disk.bitmaps_begun:
            raise OSError(errno.EEXIST, f"{disk_name} has a bitmap called {name} already")
        bitmap_id = random_uuid()
        bits = await self._store.make_recording_bits(disk_name, bitmap_id, disk.size, granularity)
        bitmap = RecordingBitmap(name, disk.size, granularity, bitmap_id=bitmap_id, bits=bits)
        try:
            self._check_served(disk)
            check_usable(disk)
            disk.add_bitmap(bitmap)
        except BaseException:
            bitmap.close()
            raise
        try:
            await self._store.commit()
        except BaseException:
            if disk.bitmaps.get(name) is bitmap and bitmap.used_by is None:
                disk.remove_bitmap(name).close()
            raise
        logger.info("bitmap %s of %s: added", name, disk_name)
        return bitmap

    def _check_served(self, disk: Disk) -> None:
        if self._server.disks.get(disk.name) is not disk:
            raise OSError(errno.ENOENT, f"disk {disk.name} was removed meanwhile")

    async def remove(self, disk_name: str, name: str) -> None:
        """Record in it no longer. Raises ENOENT, EBUSY while a session resets it."""
        async with self._changing:
            # From its removal on it records no more, and a kill finds it described until the second
            # commit.
            check_removable(bitmap := self.find(disk_name, name))
            await self._leave_chain(disk_name, bitmap)
            self._server.disk(disk_name).remove_bitmap(name)
            try:
                await self._store.commit()
            finally:
                bitmap.close()
        logger.info("bitmap %s of %s: removed", name, disk_name)

    async def clear(self, disk_name: str, name: str) -> RecordingBitmap:
        """Forget what has changed until now. Raises ENOENT, EBUSY, EINVAL when it is lost."""
        async with self._changing:
            bitmap = self.find(disk_name, name)
            recording.check_clearable(bitmap)
            # A kill must not find it cleared, and still in a chain.
            await self._leave_chain(disk_name, bitmap)
            self._server.disk(disk_name).clear_bitmap(name)
        logger.info("bitmap %s of %s: cleared", name, disk_name)
        return bitmap

    async def _leave_chain(self, disk_name: str, bitmap: RecordingBitmap) -> None:
        """It belongs to no chain any more, and that is written down. Raises OSError: then it does
        as before, or ENOENT where it has gone meanwhile."""
        since, bitmap.since = bitmap.since, None
        try:
            await self._store.commit()
        except BaseException:
            if bitmap.used_by is None:
                bitmap.since = since
            raise
        if self.find(disk_name, bitmap.name) is not bitmap:
            raise OSError(
                errno.ENOENT, f"bitmap {bitmap.name} of {disk_name} was removed meanwhile"
            )

    async def merge(self, disk_name: str, source: str, target: str) -> RecordingBitmap:
        """Add what ``source`` says to ``target``, of the same disk. Raises as ``clear``."""
        if source == target:
            raise OSError(errno.EINVAL, f"bitmap {source} cannot be merged into itself")
        async with self._changing:
            into = self.find(disk_name, target)
            recording.merge(self.find(disk_name, source), into)
            await self._store.commit()
        logger.info("bitmap %s of %s: merged into %s", source, disk_name, target)
        return into
