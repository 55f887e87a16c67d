"""Images that become longer or shorter while they are open.

The kernel tells nobody. A read beyond the end is short, and so is an error; but a write beyond the
end of a file makes it longer again, with nothing in between, and one beyond a block device's end
says ENOSPC, upon which QEMU pauses its guest. So whoever finds out (server/size_watch.py) says
where the end is, and changes beyond it are refused.
"""

from __future__ import annotations

import os

from fleecenbd.storage import system_calls
from fleecenbd.storage.device import Data, WriteNow
from fleecenbd.storage.errors import closed_error, past_end_error
from fleecenbd.storage.pool import ThreadPool


class Resized:
    """A part of FileDevice."""

    name: str
    pwrite_now: WriteNow
    _descriptor: int
    _pool: ThreadPool

    _end: int | None = None
    """Bytes, where the image is shorter than it was when it was opened."""
    _unlimited: WriteNow | None = None
    """What ``pwrite_now`` was before the first limit."""

    async def present_size(self) -> int:
        """Bytes that the image has now. Raises OSError."""
        return await self._pool.run(self._look)

    def _look(self) -> int:
        if self._descriptor < 0:
            raise closed_error(self.name)
        return system_calls.image_size(self._descriptor)

    async def room(self) -> tuple[int, int]:
        """(bytes free, bytes in all) of the file system, for who is not root. Raises OSError."""
        return await self._pool.run(self.room_now)

    def room_now(self) -> tuple[int, int]:
        """The same. Blocks."""
        if self._descriptor < 0:
            raise closed_error(self.name)
        found = os.fstatvfs(self._descriptor)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def limit(self, end: int | None) -> None:
        """Refuse changes that go beyond ``end``; None: none."""
        if self._unlimited is None:
            self._unlimited = self.pwrite_now
        self._end = end
        self.pwrite_now = self._unlimited if end is None else self._pwrite_limited

    def _pwrite_limited(self, offset: int, data: Data) -> bool:
        self._check_end(offset + len(data))
        assert self._unlimited is not None, "limit() has set it"
        return self._unlimited(offset, data)

    def _check_end(self, end: int) -> None:
        """Raises OSError(EIO)."""
        if self._end is not None and end > self._end:
            raise past_end_error(self.name, self._end)
