"""Clones: ranges of a temp image that share the blocks of the active image, so that no data moves.

XFS (made with reflink) and btrfs can let two files share blocks until one of them is written
there (FICLONERANGE). A copy of old data then costs no read and no write: the guest's own write,
which comes right after it, goes to new blocks. docs/images.md has the figures behind each rule.

When a clone is not made, and the data is copied instead
    * Once and for all: where it was refused (another file system, one that shares nothing, a
      source that is no file), or where the kernel does not tell which pages are dirty.
    * For a range with dirty pages: a clone would wait until they are on the disk, and save nothing.
    * While space is short. A copy that finds no space breaks a session; a guest's write to blocks
      that are still shared needs new ones, and would fail in the guest. So there must be room for
      everything that the temp image holds, once more.
"""

from __future__ import annotations

import errno
import os

from fleecenbd.storage import system_calls
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice

FREE_MIN = 64 << 20
"""Bytes that the file system must have free, besides as many as the temp image holds."""

_REFUSALS = frozenset(
    {errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
)


class Clones:
    """The clones in one temp image."""

    def __init__(self, target: FileDevice) -> None:
        self._target = target
        # A single store by whatever thread.
        self._refused = False

    def likely(self, source: Device, offset: int, length: int) -> bool:
        """Cloning.clones."""
        if self._refused or not isinstance(source, FileDevice):
            return False
        try:
            return source.dirty_pages(offset, length) == 0
        except OSError:
            self._refused = True
            return False

    async def make(self, source: Device, offset: int, length: int) -> bool:
        """Cloning.clone."""
        if self._refused or not isinstance(source, FileDevice):
            return False
        # The call has a descriptor of its own: the source may be closed while it lasts.
        lent = source.lend()
        try:
            making = self._target.change(self._make, lent, offset, length)
        except BaseException:
            os.close(lent)
            raise
        return await making

    def _make(self, descriptor: int, source: int, offset: int, length: int) -> bool:
        """Run by a thread of the pool. Closes ``source``."""
        try:
            room = os.fstatvfs(descriptor)
            held = os.fstat(descriptor).st_blocks * 512
            if room.f_bavail * room.f_frsize < held + FREE_MIN:
                return False
            system_calls.clone_range(descriptor, source, offset, length, self._target.name)
            return True
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refused = True
            return False
        finally:
            os.close(source)
