"""Advisory locks on an image, on the bytes that QEMU locks: QEMU and fleecenbd refuse each other.

The protocol is QEMU's ("Disk image file locking" in its manual, ``locking=auto``): one byte per
permission, from 100 for those in use, from 200 for those *not* shared with others.

    ===========================  ====  ===================================================
    permission                   bit   a lock on byte 100 + bit; on byte 200 + bit
    ===========================  ====  ===================================================
    consistent read              0     I rely on what I read; nobody else shall
    write                        1     I write it; nobody else shall
    write unchanged              2     I rewrite what is there; nobody else shall
    resize                       3     I resize it; nobody else shall
    ===========================  ====  ===================================================

Nobody ever takes a write lock: locks of several programs stand side by side on one byte, and
what conflicts is found by asking. Order: *first* take the locks, then ask for the others'
(whether anybody refuses to share what I use, whether anybody uses what I don't share). Of two
that come at once, both may be refused; both let in never happens.

They are open-file-description locks: they belong to the descriptor, not to the process, and go
when the last copy of it is closed, or with the last system call of a process that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import Enum
from pathlib import Path

USED_BASE = 100
UNSHARED_BASE = 200

CONSISTENT_READ = 1 << 0
WRITE = 1 << 1
WRITE_UNCHANGED = 1 << 2
RESIZE = 1 << 3

PERMISSION_NAMES = {
    CONSISTENT_READ: "read",
    WRITE: "write",
    WRITE_UNCHANGED: "rewrite",
    RESIZE: "resize",
}

# struct flock: type, whence, start, length, process id; padded as the compiler does.
_FLOCK = struct.Struct("@hhqqi0q")


_CHILD = "qemu-storage-daemon"[:15]
"""A program that keeps images for us, as the kernel shortens its name."""


class LockMode(Enum):
    """Who else may use an image: permissions used, permissions not shared with others."""

    EXCLUSIVE = (CONSISTENT_READ | WRITE, WRITE | RESIZE)
    """I write it; others may neither write nor resize it (so QEMU's tools do not read it)."""
    SHARED = (CONSISTENT_READ, WRITE | RESIZE)
    """I read it, as others may; nobody may write it."""
    NONE = (0, 0)
    """--force-share: neither lock nor look."""


def lock_image(descriptor: int, name: str, mode: LockMode) -> None:
    """Lock an open image, for as long as the descriptor is open.

    Raises OSError: EBUSY where another program's use of it conflicts, which says what to do;
    another errno where the file system can't lock. The locks taken so far then go with the
    descriptor, which the caller closes.
    """
    used, unshared = mode.value
    for byte in _bytes(USED_BASE, used) + _bytes(UNSHARED_BASE, unshared):
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(descriptor, name, "another program has locked it whole") from None
            raise OSError(
                error.errno,
                f"the image cannot be locked ({error.strerror}): make sure that nobody else "
                "uses it, and give --force-share",
                name,
            ) from None
    for permission, permission_name in PERMISSION_NAMES.items():
        if used & permission and _is_locked(descriptor, UNSHARED_BASE, permission):
            cause = f"another program does not let others {permission_name} it"
            raise _in_use(descriptor, name, cause)
        if unshared & permission and _is_locked(descriptor, USED_BASE, permission):
            raise _in_use(descriptor, name, f"another program may {permission_name} it")


def _bytes(base: int, permissions: int) -> list[int]:
    return [base + bit for bit in range(permissions.bit_length()) if permissions >> bit & 1]


def _is_locked(descriptor: int, base: int, permission: int) -> bool:
    """Whether another open file description holds a lock on the permission's byte."""
    byte = base + permission.bit_length() - 1
    question = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _in_use(descriptor: int, name: str, cause: str) -> OSError:
    users, is_ours = _users(descriptor)
    if is_ours and not users:
        text = (
            f"the image is in use by this very process (pid {os.getpid()}), as a disk or below one"
        )
        return OSError(errno.EBUSY, f"{text}; give it once", name)
    by = f" by {', '.join(users)}" if users else ""
    return OSError(
        errno.EBUSY,
        f"the image is in use{by}: {cause}; stop the other program, "
        "or give --force-share to use the image all the same",
        name,
    )


def _users(descriptor: int) -> tuple[list[str], bool]:
    """Processes that have the image open, as "qemu-img (pid 12)", those that we may see, without
    those that keep images for us; whether we ourselves have, by another descriptor.

    The locks themselves name nobody: they belong to no process.
    """
    image = os.fstat(descriptor)
    us = str(os.getpid())
    own = f"/proc/{us}/fd/{descriptor}"
    users = []
    is_ours = False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for link in (process / "fd").iterdir():
                if str(link) != own and os.path.samestat(link.stat(), image):
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    if process.name == us:
                        is_ours = True
                        break
                    comm = (process / "comm").read_text().strip()
                    if (parent, comm) != (us, _CHILD):
                        users.append(f"{comm} (pid {process.name})")
                    break
        except OSError:
            continue  # it has ended, or is somebody else's
    return users, is_ours
