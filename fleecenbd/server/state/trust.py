"""Whether an image is still what our last write left: nobody else may have written to it.

Bitmaps and temp images are right only together with the active image of the same moment. What
speaks for that (docs/semantics.md, section 11):

    after a clean stop    the image's mtime and ctime are as they were then
    after a kill          none of our writes was in flight: mtime is not after the last one's end;
                          some were: mtime is not more than SLACK_NS after the last one's start
    another boot id       only a clean stop counts
    a block device        tells nothing: only the admin's word counts (--trust-offline)
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice

if TYPE_CHECKING:
    from fleecenbd.server.state.description import DiskEntry

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

SLACK_NS = 2_000_000_000
"""How much later than its start a write that was in flight at a kill may have set mtime."""

QCOW2 = "qcow2:"
"""What the name of an image begins with that is a qcow2 file."""

FILE, BLOCK, OTHER = "file", "block", "other"
"""Kinds of images: OTHER ones are a child's or another server's, whose calls outlive us."""


def boot_id(path: Path = BOOT_ID) -> str:
    """The machine's boot id. Raises OSError."""
    return path.read_text().strip()


@dataclass(frozen=True)
class Image:
    """An image as it is now. ``device`` and ``inode`` tell it from others of the same boot."""

    kind: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, device: Device) -> Image:
        """Of an open device. Raises OSError."""
        if not isinstance(device, FileDevice):
            return cls(OTHER, 0, 0, device.size, 0, 0)
        found = device.status()
        if stat.S_ISBLK(found.st_mode):
            return cls(BLOCK, found.st_rdev, 0, device.size, 0, 0)
        return cls(
            FILE,
            found.st_dev,
            found.st_ino,
            device.size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )


@dataclass(frozen=True)
class Evidence:
    """What is known of the last server's end.

    ``is_marked``: it left the clean mark for this description. ``same_boot``: the machine has not
    gone down since. ``stamps``: (began, ended, in flight), None where they are lost.
    """

    is_marked: bool
    same_boot: bool
    stamps: tuple[int, int, int] | None


def why_not(
    entry: DiskEntry, image: Image, evidence: Evidence, *, trust_offline: bool
) -> str | None:
    """Why what belongs to this disk cannot be trusted; None: it can."""
    if OTHER in (image.kind, entry.kind):
        return f"{entry.image} is no raw file or block device: nobody can tell who wrote to it"
    if image.size != entry.size:
        return f"{entry.image} had {entry.size} bytes, and has {image.size} now"
    if image.kind != entry.kind or image.inode != entry.inode:
        return f"{entry.image} is another image than it was"
    # Device numbers are given out anew at each boot.
    if evidence.same_boot and image.device != entry.device:
        return f"{entry.image} is another image than it was"
    # An image that nobody of us has had open since a clean stop needs no second mark.
    was_clean = entry.clean is not None and (evidence.is_marked or evidence.same_boot)
    if not was_clean and not evidence.same_boot:
        return "the machine went down without a clean stop of the server"
    if image.kind == BLOCK:
        if trust_offline:
            return None
        return (
            f"{entry.image} is a block device, which does not tell whether anybody else wrote to "
            "it while no server had it; --trust-offline declares that nobody does"
        )
    if was_clean:
        assert entry.clean is not None, "see above"
        if (image.mtime_ns, image.ctime_ns) != (entry.clean.mtime_ns, entry.clean.ctime_ns):
            return f"somebody else changed {entry.image} while no server had it"
        return None
    if evidence.stamps is None:
        return f"the stamps of {entry.image} are lost"
    began, ended, in_flight = evidence.stamps
    limit = began + SLACK_NS if in_flight else ended
    if image.mtime_ns > limit:
        return f"somebody else wrote to {entry.image} after the server was killed"
    return None


def real_path(image: str) -> str:
    """The image's path, absolute and without links; a URI as it is."""
    if "://" in image:
        return image
    prefix = QCOW2 if image.startswith(QCOW2) else ""
    return prefix + os.path.realpath(image.removeprefix(prefix))
