"""A fleece: one disk within one session, put together from its layers.

    copy_before_write ──▶ block_copy ◀── snapshot_access
                 └────────▶ state ◀────────┘

The layers share a FleeceState and know nothing of each other but block-copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleecenbd.engine.block_copy import BlockCopy
from fleecenbd.engine.copy_before_write import CopyBeforeWrite
from fleecenbd.engine.own_bits import OwnBits
from fleecenbd.engine.snapshot_access import SnapshotAccess
from fleecenbd.engine.state import FleeceState

if TYPE_CHECKING:
    from fleecenbd.engine.disk import Disk


class Fleece:
    """One disk within one session; its fleecing export is called ``name`` (DISK@SESSION).

    ``read_now``, ``read``, ``trim_now``, ``trim``, ``release_read``, ``status``,
    ``access_status`` and ``dirty_status`` are those of SnapshotAccess; a guest's requests come in
    through ``copy_before_write``.
    """

    def __init__(self, disk: Disk, state: FleeceState, own: OwnBits | None = None) -> None:
        self.disk = disk
        self.state = state
        self.own = own
        """What it took from a recording bitmap, if it was armed with one."""
        self.name = state.name
        self.size = state.size
        self.cluster_size = state.cluster_size
        self.temp = state.target
        self.freed = False
        """It broke, and its temp image is closed; ``stats`` stay as they were then."""
        self.access = state.access
        self.copy = state.copy
        self.done = state.done
        self.stats = state.stats
        self.block_copy = BlockCopy(state)
        self.copy_before_write = CopyBeforeWrite(state, self.block_copy)
        self.snapshot_access = SnapshotAccess(state, self.block_copy, own)
        self.read_now = self.snapshot_access.read_now
        self.read = self.snapshot_access.read
        self.trim_now = self.snapshot_access.trim_now
        self.trim = self.snapshot_access.trim
        self.release_read = self.snapshot_access.release_read
        self.status = self.snapshot_access.status
        self.access_status = self.snapshot_access.access_status
        self.dirty_status = self.snapshot_access.dirty_status

    @property
    def broken(self) -> str | None:
        """Why the fleece broke; None if it did not."""
        return self.state.broken

    @property
    def finished(self) -> bool:
        return self.state.finished

    def finish(self) -> None:
        """End it in one step: guests no longer wait for it, its requests get ESHUTDOWN."""
        self.state.finish()
        if self in self.disk.fleeces:
            self.disk.fleeces.remove(self)

    async def wait_freed(self) -> None:
        """After a break: return when the temp image is closed, and so holds nothing any more (a
        hung call on it may keep it for ever)."""
        await self.temp.wait_closed()
        self.freed = True

    async def wait_closed(self) -> None:
        """Return when the last copy and the last call on the temp image have ended."""
        await self.block_copy.drained()
        await self.temp.wait_closed()
        self.close_bits()

    def close_bits(self) -> None:
        """After the end, once nothing is in flight: let go of the store's buffers."""
        if self.own is not None:
            self.own.bitmap.detach()
        self.state.close_bits()
