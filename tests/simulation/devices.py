"""A simulated device: everything that a real one may do to its callers, drawn from a seed.

A call lands piece by piece, each piece at a moment of its own; there may be time before the first
and after the last. A failed write leaves some of its pieces done, some untouched and some with
garbage. A call can hang: for ever, or until long after everybody has stopped waiting. A device can
die at a moment and take every call in flight with it. ``pread_now`` and ``pwrite_now`` answer with
a chance between 0 and 1, so that "now" and "later" are held against each other.

Space is tracked in blocks of ``hole_size``: what a sparse file would hold.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Buffer, Data, Extent

from .calls import CHANGES, REQUEST, Call, Profile, Watcher
from .loop import VirtualLoop

WRITES = {"write": "write", "clone": "write"}
"""Kinds of calls that fail, hang and fill a device as a write does."""


class SimDevice:
    """A block device made of a bytearray, a seed and bad luck."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        watcher: Watcher,
        name: str,
        size: int,
        profile: Profile,
        *,
        hole_size: int = 4096,
        content: bytes | None = None,
        is_temp: bool = False,
    ) -> None:
        self.name = name
        self.is_temp = is_temp
        self.size = size
        self.hole_size = hole_size
        self.profile = profile
        self.content = bytearray(content) if content is not None else bytearray(size)
        self.space = bytearray(-(-size // hole_size))
        if content is not None:
            for block in range(len(self.space)):
                if any(content[block * hole_size : (block + 1) * hole_size]):
                    self.space[block] = 1
        self.calls: list[Call] = []
        """In flight."""
        self.closed = False
        self.hung_count = 0
        self._loop = loop
        self._rng = rng
        self._watcher = watcher
        self._close_waiters: list[asyncio.Future[None]] = []

    # the device interface

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        if not self._answers_now(self.profile.now_read_chance):
            return None
        call = self._call("read", offset, length, None)
        self._now(call)
        return bytes(call.data)

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        data = self.pread_now(offset, len(buffer))
        if data is None:
            return False
        buffer[:] = data
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        call = await self._later(self._call("read", offset, length, None))
        data: bytearray = call.data
        return data

    def pwrite_now(self, offset: int, data: Data) -> bool:
        if not self._answers_now(self.profile.now_write_chance):
            return False
        self._now(self._call("write", offset, len(data), data))
        return True

    async def pwrite(self, offset: int, data: Data) -> None:
        await self._later(self._call("write", offset, len(data), data))

    def clones(self, source: SimDevice, offset: int, length: int) -> bool:
        return self.profile.clones > 0 and self._rng.random() < self.profile.clones

    async def clone(self, source: SimDevice, offset: int, length: int) -> bool:
        if (offset | length) % self.hole_size or offset + length > source.size:
            self._watcher.violation(f"X: clone {offset}+{length} is not of whole blocks")
        if self._refuses_clone():
            await self._later(self._call("refused clone", offset, length, None))
            return False
        call = self._call("clone", offset, length, None)
        call.source = source
        await self._later(call)
        return True

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        if fast and not self.profile.fast_zero:
            raise OSError(errno.ENOTSUP, "no fast zero")
        call = self._call("zero", offset, length, None)
        call.keep_space = not may_trim
        await self._later(call)

    async def trim(self, offset: int, length: int) -> None:
        await self._later(self._call("trim", offset, length, None))

    def flush_now(self) -> bool:
        return False

    async def flush(self) -> None:
        await self._later(self._call("flush", 0, 0, None))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        call = await self._later(self._call("extents", offset, length, None))
        answer: list[Extent] = call.data
        return answer

    def close(self) -> None:
        self.closed = True
        self._tell_closed()

    async def wait_closed(self) -> None:
        if not self.closed or self.calls:
            waiter = self._loop.create_future()
            self._close_waiters.append(waiter)
            await waiter

    # what temp images have besides

    def used_bytes(self) -> int:
        """Bytes of space in use, in whole blocks (the last one may be partial)."""
        used = self.space.count(1) * self.hole_size
        if self.space and self.space[-1]:
            used -= len(self.space) * self.hole_size - self.size
        return used

    def holds(self, offset: int, length: int) -> bool:
        """Whether a block that touches the range holds space."""
        return 1 in self.space[offset // self.hole_size : -(-(offset + length) // self.hole_size)]

    # a call's life

    def _answers_now(self, chance: float) -> bool:
        alive = self._wakes_at() <= self._loop.time()
        return chance > 0 and alive and self._rng.random() < chance

    def _refuses_clone(self) -> bool:
        return self._rng.random() < self.profile.refuses_clone

    def _wakes_at(self) -> float:
        now = self._loop.time()
        profile = self.profile
        if profile.dies_at_s <= now < profile.lives_again_at_s:
            return profile.lives_again_at_s
        return now

    def _call(self, kind: str, offset: int, length: int, data: Data | None) -> Call:
        if self.closed:
            self._watcher.violation(f"S: {kind} {offset}+{length} on {self.name} after its close")
        if offset < 0 or offset + length > self.size or (length < 1 and kind != "flush"):
            self._watcher.violation(f"X: {kind} {offset}+{length} is outside of {self.name}")
        call = Call(kind, offset, length, REQUEST.get(), self._loop.time(), data)
        rng = self._rng
        if kind == "read":
            call.data = bytearray(length)
        if rng.random() < self.profile.fail.get(WRITES.get(kind, kind), 0.0):
            call.fails, call.error = True, errno.EIO
        if kind in WRITES and self._has_no_space_for(offset, length):
            call.fails, call.error = True, errno.ENOSPC
        self.calls.append(call)
        self._watcher.call_began(self, call)
        return call

    def _has_no_space_for(self, offset: int, length: int) -> bool:
        space_max = self.profile.space_max
        if space_max is None:
            return False
        first, end = offset // self.hole_size, -(-(offset + length) // self.hole_size)
        new = self.space[first:end].count(0) * self.hole_size
        return self.used_bytes() + new > space_max

    def _now(self, call: Call) -> None:
        if call.fails:
            self._spoil(call)
        else:
            self._land(call, call.offset, call.length)
        self._end(call)
        if call.fails:
            raise OSError(call.error, f"simulated: {self.name}: {call}")

    async def _later(self, call: Call) -> Call:
        rng = self._rng
        call.future = self._loop.create_future()
        call.cuts = [call.end, *self._random_cuts(call)]
        if rng.random() < self.profile.hang.get(WRITES.get(call.kind, call.kind), 0.0):
            call.hangs_at = rng.randrange(len(call.cuts) + 1)
        self._wait(call, len(call.cuts))
        await call.future
        return call

    def _random_cuts(self, call: Call) -> list[int]:
        """Ends of pieces inside the call, last one first: some at blocks, some anywhere."""
        rng = self._rng
        count = rng.randrange(self.profile.pieces_max)
        if call.length < 2 or not count:
            return []
        cuts = set()
        for _ in range(count):
            cut = rng.randrange(call.offset + 1, call.end)
            block = cut - cut % self.hole_size
            cuts.add(block if rng.random() < 0.7 and block > call.offset else cut)
        return sorted(cuts, reverse=True)

    def _wait(self, call: Call, parts: int) -> None:
        rng = self._rng
        profile = self.profile
        delay = rng.uniform(profile.latency_min_s, profile.latency_max_s) / parts
        delay *= profile.pace.get(call.kind, 1.0)
        if rng.random() < profile.slow_chance:
            delay *= profile.slow_factor
        if rng.random() < 0.15:
            delay = 0.0
        if profile.quantum_s:
            delay = math.ceil(delay / profile.quantum_s) * profile.quantum_s
        if call.hangs_at is not None and len(call.cuts) <= call.hangs_at:
            call.hangs_at = None
            call.hung = True
            self.hung_count += 1
            if rng.random() >= profile.late_chance:
                return
            delay = profile.late_s
        self._loop.complete_at(self._loop.time() + delay, self._advance, call)

    def _advance(self, call: Call) -> None:
        """The next piece of the call lands, or the call ends."""
        wakes_at = self._wakes_at()
        if wakes_at > self._loop.time():
            if not call.hung:
                call.hung = True
                self.hung_count += 1
            if wakes_at < math.inf:
                self._loop.complete_at(wakes_at + 1e-3 * self._rng.random(), self._advance, call)
            return
        if call.cuts and call.fails and self._rng.random() < 1.5 / (len(call.cuts) + 0.5):
            self._spoil(call)
            call.cuts.clear()
            if self._rng.random() < 0.5:
                self._wait(call, 1)
                return
        if call.cuts:
            cut = call.cuts.pop()
            start = call.offset + call.landed
            self._land(call, start, cut - start)
            call.landed = cut - call.offset
            if call.cuts or self._rng.random() < 0.4:
                self._wait(call, len(call.cuts) + 1)
                return
        self._end(call)

    def _end(self, call: Call) -> None:
        call.ended, call.ended_at = True, self._loop.time()
        self.calls.remove(call)
        self._watcher.call_ended(self, call)
        future = call.future
        if future is not None and not future.done():
            if call.fails:
                future.set_exception(OSError(call.error, f"simulated: {self.name}: {call}"))
            else:
                future.set_result(None)
        self._tell_closed()

    def _tell_closed(self) -> None:
        if self.closed and not self.calls:
            for waiter in self._close_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._close_waiters.clear()

    # content

    def _land(self, call: Call, offset: int, length: int) -> None:
        """The piece takes effect."""
        content = self.content
        end = offset + length
        kind = call.kind
        if kind == "read":
            start = offset - call.offset
            call.data[start : start + length] = content[offset:end]
        elif kind == "write":
            start = offset - call.offset
            content[offset:end] = call.data[start : start + length]
            self._take_space(offset, end)
        elif kind == "clone":
            # Extent by extent, each as it is at that moment.
            assert call.source is not None, "a clone has a source"
            content[offset:end] = call.source.content[offset:end]
            self._take_space(offset, end)
        elif kind == "extents":
            if end == call.end:
                call.data = self._extents(call.offset, call.length)
        elif kind not in ("flush", "refused clone"):
            content[offset:end] = bytes(length)
            if call.keep_space:
                self._take_space(offset, end)
            else:
                self._free_space(call, offset, end)
        self._watcher.call_landed(self, call, offset, length)

    def _take_space(self, offset: int, end: int) -> None:
        first, last = offset // self.hole_size, -(-end // self.hole_size)
        self.space[first:last] = b"\x01" * (last - first)

    def _free_space(self, call: Call, offset: int, end: int) -> None:
        """Free the blocks that the call covers whole and of which this is the last piece.

        Not those into which a write has landed between two pieces of this call.
        """
        size = self.hole_size
        first = max(-(-call.offset // size), offset // size)
        last = len(self.space) if end == self.size else end // size
        for block in range(first, last):
            if not any(self.content[block * size : (block + 1) * size]):
                self.space[block] = 0

    def _spoil(self, call: Call) -> None:
        """A failed write: pieces of what had still to land are done, untouched or garbage."""
        if call.kind not in CHANGES:
            return
        rng = self._rng
        offset = call.offset + call.landed
        while offset < call.end:
            length = min(call.end - offset, max(1, rng.choice((self.hole_size, 512, call.length))))
            luck = rng.random()
            if luck < 0.6 and call.kind in WRITES:
                self.content[offset : offset + length] = rng.randbytes(length)
                self._take_space(offset, offset + length)
                self._watcher.call_landed(self, call, offset, length)
            elif luck < 0.8:
                self._land(call, offset, length)
            offset += length

    def _extents(self, offset: int, length: int) -> list[Extent]:
        size = self.hole_size
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            block = offset // size
            stop = min(end, (block + 1) * size)
            flags = 0 if self.space[block] else EXTENT_HOLE | EXTENT_ZERO
            if not flags and not any(self.content[block * size : (block + 1) * size]):
                flags = EXTENT_ZERO
            if extents and extents[-1][1] == flags:
                extents[-1] = (extents[-1][0] + stop - offset, flags)
            else:
                extents.append((stop - offset, flags))
            offset = stop
        return extents
