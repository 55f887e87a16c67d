"""A disk as the store knows it: what its image is, and the file with its stamps."""

from __future__ import annotations

import asyncio

from fleecenbd.engine.disk import Disk
from fleecenbd.server.state.trust import Image, real_path
from fleecenbd.storage.mapped import MappedFile
from fleecenbd.storage.stamps import Stamps


class DiskFiles:
    """A disk that is served. Raises OSError where its image does not tell what it is."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        # Asked now, and kept: an image that hangs by then must not hold up the others' guests.
        self.image = Image.of(disk.device)
        self.path = real_path(disk.device.name)
        self.stamps = Stamps()
        self.file: MappedFile | None = None
        """With the stamps, once there is something that lasts."""
        self.making = asyncio.Lock()
