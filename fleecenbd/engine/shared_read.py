"""One read of the active image for the copies of several fleeces.

A guest write that two sessions need is read once: copies that were claimed in one step, for one
range, share the read that the first of them begins. They all were in flight when it began, so
until the last of them has ended no guest write that any of them counts for can have changed the
range. A fleece armed later has no part in it, and reads by itself.

Only copies that run share: one that waits for a slot would keep the data for as long as it waits.
"""

from __future__ import annotations

import asyncio

from fleecenbd.storage.device import Buffer, Device


class SharedRead:
    """A read of ``[offset, offset + length)``, begun by the first who takes it."""

    __slots__ = ("_data", "_length", "_offset", "_source", "_task", "parties")

    def __init__(self, source: Device, offset: int, length: int) -> None:
        self._source = source
        self._offset = offset
        self._length = length
        self.parties = 0
        """Copies that will take it, once each."""
        self._data: Buffer | None = None
        self._task: asyncio.Task[Buffer] | None = None

    async def take(self) -> Buffer:
        """The data, which nobody may change. Raises OSError, the same for all."""
        if self._data is not None:
            return self._data
        if self._task is None:
            self._data = self._source.pread_now(self._offset, self._length)
            if self._data is not None:
                return self._data
            if self.parties == 1:
                return await self._source.pread(self._offset, self._length)
            self._task = asyncio.get_running_loop().create_task(
                self._source.pread(self._offset, self._length),
                name=f"shared read of {self._source.name}",
            )
        # A device's call is never cancelled, and others may be waiting for it.
        return await asyncio.shield(self._task)


SharedReads = dict[tuple[int, int], SharedRead]
"""Of one step: by (offset, length)."""

ReadNow = dict[tuple[int, int], Buffer]
"""What was read in this very step, by (offset, length)."""
