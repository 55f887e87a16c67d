"""A device whose calls wait until the test lets them go: the tool for one order of events.

    device = GatedDevice("active", 64 * 1024)
    device.gate("write")                          # from now on, writes wait
    task = asyncio.ensure_future(disk.write(0, data))
    call = await device.reached("write")          # the call has begun and stands still
    call.go()                                     # it lands and ends
    call.fail(errno.EIO)                          # or: garbage lands, and it fails

Calls that no gate holds end in the step that begins them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Buffer, Data, Extent

GARBAGE = 0xEE
"""What a failed write leaves behind."""


class GatedCall:
    """One call that stands still at its gate. Nobody's cancelling stops it."""

    def __init__(
        self, kind: str, offset: int, length: int, land: Callable[[GatedCall, int], None]
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.ended = False
        self.answer: Any = None
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._land = land

    def go(self) -> None:
        """Let it land, now, and end well."""
        self._end(0)

    def fail(self, error: int = errno.EIO) -> None:
        """Let it leave garbage, now, and fail."""
        self._end(error)

    def _end(self, error: int) -> None:
        assert not self.ended, f"{self} has ended already"
        self.ended = True
        self._land(self, error)
        if self.future.done():
            return
        if error:
            self.future.set_exception(OSError(error, f"{self.kind} failed by the test"))
        else:
            self.future.set_result(None)

    def __repr__(self) -> str:
        return f"{self.kind} {self.offset}+{self.length}"


class GatedDevice:
    """A memory device with gates: read, write, zero, trim, clone, flush, extents."""

    def __init__(
        self, name: str, size: int, content: bytes = b"", *, hole_size: int = 4096
    ) -> None:
        self.name = name
        self.size = size
        self.hole_size = hole_size
        self.content = bytearray(content.ljust(size, b"\0"))
        self.space: set[int] = {
            block
            for block in range(-(-size // hole_size))
            if any(self.content[block * hole_size : (block + 1) * hole_size])
        }
        self.waiting: list[GatedCall] = []
        """At a gate now, oldest first."""
        self.log: list[str] = []
        """Every call that began, as ``kind offset+length``."""
        self.closed = False
        self.may_clone = False
        """What ``clones`` answers;"""
        self.refuses_clone = False
        """and whether a clone is refused all the same."""
        self._sources: dict[int, GatedDevice] = {}
        self._gates: dict[str, Callable[[int, int], bool]] = {}
        self._arrivals: list[asyncio.Future[None]] = []
        self._close_waiters: list[asyncio.Future[None]] = []

    # the test's side

    def gate(self, *kinds: str, where: Callable[[int, int], bool] | None = None) -> None:
        """Calls of these kinds (for which ``where(offset, length)`` holds) stop at a gate."""
        for kind in kinds:
            self._gates[kind] = where or (lambda offset, length: True)

    def open(self, *kinds: str) -> None:
        """Take the gates away and let their calls go; all of them, if no kind is given."""
        for kind in kinds or tuple(self._gates):
            self._gates.pop(kind, None)
        for call in list(self.waiting):
            if not kinds or call.kind in kinds:
                call.go()

    async def reached(
        self, kind: str, where: Callable[[int, int], bool] | None = None
    ) -> GatedCall:
        """The oldest call of this kind that stands at a gate; waits for one."""
        while True:
            for call in self.waiting:
                if call.kind == kind and (where is None or where(call.offset, call.length)):
                    return call
            arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._arrivals.append(arrival)
            await arrival

    def holds(self, offset: int, length: int) -> bool:
        """Whether a block that touches the range holds space."""
        first, end = offset // self.hole_size, -(-(offset + length) // self.hole_size)
        return any(block in self.space for block in range(first, end))

    # the device interface

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        if self._is_gated("read", offset, length):
            return None
        self._begin("read", offset, length)
        return bytes(self.content[offset : offset + length])

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        data = self.pread_now(offset, len(buffer))
        if data is None:
            return False
        buffer[:] = data
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        data: bytes = await self._call("read", offset, length)
        return data

    def pwrite_now(self, offset: int, data: Data) -> bool:
        if self._is_gated("write", offset, len(data)):
            return False
        self._begin("write", offset, len(data))
        self._store(offset, bytes(data))
        return True

    async def pwrite(self, offset: int, data: Data) -> None:
        await self._call("write", offset, len(data), data)

    def clones(self, source: GatedDevice, offset: int, length: int) -> bool:
        return self.may_clone

    async def clone(self, source: GatedDevice, offset: int, length: int) -> bool:
        if self.refuses_clone:
            self.may_clone = False
            return False
        assert (offset | length) % self.hole_size == 0, f"clone {offset}+{length}: not whole blocks"
        self._sources[offset] = source
        await self._call("clone", offset, length)
        return True

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        await self._call("zero", offset, length)

    async def trim(self, offset: int, length: int) -> None:
        await self._call("trim", offset, length)

    def flush_now(self) -> bool:
        return False

    async def flush(self) -> None:
        await self._call("flush", 0, 0)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        answer: list[Extent] = await self._call("extents", offset, length)
        return answer

    def close(self) -> None:
        self.closed = True
        self._tell_closed()

    async def wait_closed(self) -> None:
        if not self.closed or self.waiting:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._close_waiters.append(waiter)
            await waiter

    def used_bytes(self) -> int:
        return len(self.space) * self.hole_size

    # inside

    def _is_gated(self, kind: str, offset: int, length: int) -> bool:
        gate = self._gates.get(kind)
        return gate is not None and gate(offset, length)

    def _begin(self, kind: str, offset: int, length: int) -> None:
        assert not self.closed, f"{kind} {offset}+{length} on {self.name} after its close"
        assert offset >= 0, f"{kind} {offset}+{length}: outside"
        assert offset + length <= self.size, f"{kind} {offset}+{length}: outside"
        self.log.append(f"{kind} {offset}+{length}")

    async def _call(self, kind: str, offset: int, length: int, data: Data = b"") -> Any:
        self._begin(kind, offset, length)
        call = GatedCall(kind, offset, length, lambda call, error: self._land(call, error, data))
        self.waiting.append(call)
        if not self._is_gated(kind, offset, length):
            call.go()
        for arrival in self._arrivals:
            if not arrival.done():
                arrival.set_result(None)
        self._arrivals.clear()
        await call.future
        return call.answer

    def _land(self, call: GatedCall, error: int, data: Data) -> None:
        offset, length = call.offset, call.length
        self.waiting.remove(call)
        if call.kind == "read":
            call.answer = bytes(self.content[offset : offset + length])
        elif call.kind == "extents":
            call.answer = self._extents(offset, length)
        elif call.kind == "write":
            self._store(offset, bytes([GARBAGE]) * length if error else bytes(data))
        elif call.kind == "clone":
            cloned = bytes(self._sources.pop(offset).content[offset : offset + length])
            self._store(offset, bytes([GARBAGE]) * length if error else cloned)
        elif call.kind == "zero" and error:
            self._store(offset, bytes([GARBAGE]) * length)
        elif call.kind in ("zero", "trim") and not error:
            self._free(offset, length)
        self._tell_closed()

    def _extents(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.hole_size + 1) * self.hole_size)
            flags = 0 if self.holds(offset, 1) else EXTENT_HOLE | EXTENT_ZERO
            extents.append((stop - offset, flags))
            offset = stop
        return extents

    def _tell_closed(self) -> None:
        if self.closed and not self.waiting:
            for waiter in self._close_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._close_waiters.clear()

    def _store(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        first, end = offset // self.hole_size, -(-(offset + len(data)) // self.hole_size)
        self.space.update(range(first, end))

    def _free(self, offset: int, length: int) -> None:
        end = offset + length
        self.content[offset:end] = bytes(length)
        last = -(-end // self.hole_size) if end == self.size else end // self.hole_size
        self.space.difference_update(range(-(-offset // self.hole_size), last))
