"""What the file system below an open image lets us do at once, without waiting for a disk.

Found out once, when the image is opened. Unknown and network file systems get the careful
answer: everything in the pool.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from enum import Enum

LOCAL_TYPES = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "xfs"})
"""File systems that take a write into the page cache without asking anybody else."""

MEMORY_TYPES = frozenset({"ramfs", "tmpfs"})
"""File systems that have nothing to wait for; they refuse RWF_NOWAIT, and need none."""


BTRFS_TRIED = (6, 18)
"""The earliest Linux with which a full btrfs was seen to take stores into a mapped file that it
overwrites in its place. Earlier ones are said to refuse them."""


class Medium(Enum):
    """Which calls on an image can be made on the event loop's thread."""

    MEMORY = "memory"
    """All reads and writes."""
    CACHED = "cached"
    """Reads with RWF_NOWAIT; writes while the page cache takes them fast."""
    UNCACHED_READS = "uncached reads"
    """Writes as above; RWF_NOWAIT is refused, so that a read may wait for the disk."""
    SLOW = "slow"
    """None: a call may wait for another machine or another process."""


def medium_of(descriptor: int) -> Medium:
    """Which calls on this open regular file or block device can be made inline."""
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        kind = type_of(descriptor)
        if kind in MEMORY_TYPES:
            return Medium.MEMORY
        if kind not in LOCAL_TYPES:
            return Medium.SLOW
    return Medium.CACHED if reads_nowait(descriptor) else Medium.UNCACHED_READS


def reads_nowait(descriptor: int) -> bool:
    """Whether the file system or the device knows RWF_NOWAIT for buffered reads."""
    try:
        os.preadv(descriptor, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def stores_may_fail(kind: str) -> bool:
    """Whether a store into a mapped file that is allocated in full may find no space on such a
    file system, and end the process (SIGBUS)."""
    version = tuple(int(part) for part in re.findall(r"[0-9]+", os.uname().release)[:2])
    return kind == "btrfs" and version < BTRFS_TRIED


def type_of(descriptor: int) -> str:
    """The name of the file system that an open file is on ("ext4"), or "" if it can't be told.

    By the mount's id (proc(5), fdinfo and mountinfo): a device number would not do, since
    btrfs gives each subvolume one of its own.
    """
    try:
        with open(f"/proc/self/fdinfo/{descriptor}") as info:
            mount = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
            for line in mounts:
                if line.split(maxsplit=1)[0] == mount:
                    return line.partition(" - ")[2].split()[0]
    except (OSError, StopIteration):
        pass
    return ""


def hole_size_of(descriptor: int) -> int:
    """Bytes: the smallest power of two whose aligned ranges free their space when punched."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        unit = 4096
    else:
        unit = os.fstatvfs(descriptor).f_bsize
    return 1 << max(unit - 1, 511).bit_length()
