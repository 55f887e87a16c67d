"""A device whose calls stall, as a disk does that is worn out, or far away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from fleecenbd.storage.device import Buffer, Data, Device, Extent
from fleecenbd.storage.pool import ThreadPool

STALL_S = 0.2
CALLS = frozenset({"pread", "pwrite", "zero", "trim", "flush", "extents"})


class StallingDevice:
    """Another device, whose calls of the kinds in ``stalls`` first sit ``STALL_S`` in a thread.

    A kind that stalls has no answer at once, as with a real device that may block; but one in
    ``blocks`` blocks its caller, which no device may: to see that this would be noticed.
    """

    def __init__(
        self,
        device: Device,
        stalls: Collection[str] = CALLS,
        *,
        blocks: Collection[str] = (),
    ) -> None:
        self.name = device.name
        self.size = device.size
        self.hole_size = device.hole_size
        self.stalled = 0
        """Calls that have stalled."""
        self._device = device
        self._stalls = stalls
        self._blocks = blocks
        self._pool = ThreadPool(device.name, "stalls")

    async def _stall(self, kind: str) -> None:
        if kind in self._stalls:
            await self._pool.run(time.sleep, STALL_S)
            self.stalled += 1

    def _may_answer_now(self, kind: str) -> bool:
        if kind in self._blocks:
            time.sleep(STALL_S)
            self.stalled += 1
            return True
        return kind not in self._stalls

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        return self._device.pread_now(offset, length) if self._may_answer_now("pread") else None

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        return self._may_answer_now("pread") and self._device.pread_into_now(offset, buffer)

    def pwrite_now(self, offset: int, data: Data) -> bool:
        return self._may_answer_now("pwrite") and self._device.pwrite_now(offset, data)

    def flush_now(self) -> bool:
        return self._may_answer_now("flush") and self._device.flush_now()

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._stall("pread")
        return await self._device.pread(offset, length)

    async def pwrite(self, offset: int, data: Data) -> None:
        await self._stall("pwrite")
        await self._device.pwrite(offset, data)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        await self._stall("zero")
        await self._device.zero(offset, length, may_trim=may_trim, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        await self._stall("trim")
        await self._device.trim(offset, length)

    async def flush(self) -> None:
        await self._stall("flush")
        await self._device.flush()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        await self._stall("extents")
        return await self._device.extents(offset, length)

    def close(self) -> None:
        self._pool.close()
        self._device.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._pool.wait_closed(), self._device.wait_closed())
