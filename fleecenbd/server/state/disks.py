"""A disk as the store knows it: what its image is, and the file with its stamps."""

from __future__ import annotations

import asyncio
import logging

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import RecordingBitmap, Since
from fleecenbd.server.state.names import Unserved
from fleecenbd.server.state.trust import Image, real_path
from fleecenbd.storage.mapped import MappedFile
from fleecenbd.storage.stamps import Stamps

logger = logging.getLogger(__name__)

UNRECORDED = "its disk was served again by a server that had started without it"


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


def take_back(disk: Disk, unserved: Unserved) -> tuple[Unserved, list[str]]:
    """A disk comes at run time. The bitmaps that were kept for it are its own again, and lost: they
    would not know of its guest's writes. What is unserved still, and the files that were theirs.
    """
    files = [
        other.stamps
        for other in unserved.disks
        if other.name == disk.name and other.stamps is not None
    ]
    for entry in unserved.bitmaps:
        if entry.disk == disk.name:
            since = entry.since
            disk.add_bitmap(
                RecordingBitmap(
                    entry.name,
                    disk.size,
                    entry.granularity,
                    bitmap_id=entry.id,
                    since=Since(since.session, since.session_id, since.armed_at) if since else None,
                    lost=entry.lost or UNRECORDED,
                )
            )
            logger.error(
                "bitmap %s of %s is lost: %s. A full backup is needed",
                entry.name,
                disk.name,
                entry.lost or UNRECORDED,
            )
            if entry.file is not None:
                files.append(entry.file)
    left = Unserved(
        tuple(other for other in unserved.disks if other.name != disk.name),
        tuple(entry for entry in unserved.bitmaps if entry.disk != disk.name),
    )
    return left, files
