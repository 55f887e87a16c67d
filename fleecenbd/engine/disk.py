"""A disk: an active image, its guests' requests, and the fleeces that these go through.

A guest's write in steps:

    1  go through every fleece's copy-before-write            (all at the same time)
    2  look once more: held, it waits; a fleece installed since, it goes through that one first
    3  in the same step: set its bits in the recording bitmaps, and start the active write

Arming holds new active writes and waits for those in flight, so that a session begins between
two active writes. A write that waits in some copy-before-write has not touched the active image
and holds nothing up.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from bitarray import bitarray

from fleecenbd.engine.bitmap import cluster_runs
from fleecenbd.engine.extents import windowed_status
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.recording import RecordingBitmap, check_removable, clear
from fleecenbd.engine.reqlist import Waiters
from fleecenbd.engine.resizing import check_usable, is_lost
from fleecenbd.engine.shared_read import ReadNow, SharedReads
from fleecenbd.engine.store import Stamps
from fleecenbd.storage.device import Buffer, Data, Device, Extent, Losable

WRITE_NOW_LENGTH_MAX = 1 << 20
"""Bytes. A longer write would keep the loop from everybody else: it goes to the pool."""
PIECE_LENGTH_MAX = 32 << 20
"""Bytes of a guest's TRIM or WRITE_ZEROES that are made ready under one timer."""
TRIM_PART_MIN = 64 << 10
"""Bytes. Smaller parts of a guest's TRIM are left alone, where other parts must be."""


class Disk:
    """A name, an active image, and the fleeces of the sessions that it is in."""

    def __init__(self, name: str, device: Device, *, discards: bool = True) -> None:
        self.name = name
        self.discards = discards
        """What a guest discards is freed; else its discards do nothing, and its zeroes hold their
        space."""
        self.device = device
        self.size = device.size
        self.image_size = device.size
        """Bytes that the image has now, as far as is known: others can change that."""
        self.resizes = 0
        """How often it was found to have another size than this disk's."""
        self.lost: str | None = None
        """Why nothing can be read or written any more: who keeps the image is gone."""
        self.fleeces: list[Fleece] = []
        self.active_writes = 0
        """Guest requests that are changing the active image now."""
        self.writes = 0
        """Guest requests that may have changed the active image since the start."""
        self.bitmaps: dict[str, RecordingBitmap] = {}
        """Those that record; ``add_bitmap`` and ``remove_bitmap`` change this."""
        self.bitmaps_begun: dict[str, str] = {}
        """Name of a bitmap that is being made to the name of the session that makes it."""
        self._stamps: Stamps | None = None
        self._recorded: list[tuple[bitarray, int]] = []
        """Of each bitmap that records: (bits, shift)."""
        self._noted = False
        """Somebody is told of active writes: a bitmap, or stamps."""
        self._active_calls: dict[asyncio.Task[None], list[tuple[int, int]]] = {}
        """Active writes in flight, each with its byte ranges."""
        self._holds = 0
        self.held_since = 0.0
        """The loop's time since which active writes are held without a break, while they are."""
        self._held = Waiters()
        self._idle = Waiters()
        self.read_now: Callable[[int, int], Buffer | None] = device.pread_now
        self.read: Callable[[int, int], Coroutine[Any, Any, Buffer]] = device.pread
        if isinstance(device, Losable):
            device.on_lost = partial(is_lost, self)

    # -- guest requests --------------------------------------------------------------------

    def write_now(self, offset: int, data: Data) -> bool:
        """Write in this very step. False: nothing was written, and ``write`` must do it."""
        length = len(data)
        if self._holds or length > WRITE_NOW_LENGTH_MAX:
            return False
        reads: ReadNow | None = {} if len(self.fleeces) > 1 else None
        for fleece in self.fleeces:
            shift = fleece.state.shift
            if not fleece.copy_before_write.ready_now(
                offset >> shift, ((offset + length - 1) >> shift) + 1, reads
            ):
                return False
        if self._noted:
            return self._noted_write_now(offset, data)
        if self.device.pwrite_now(offset, data):
            self.writes += 1
            return True
        return False

    def _noted_write_now(self, offset: int, data: Data) -> bool:
        self._record(offset, len(data))
        stamps = self._stamps
        if stamps is not None:
            stamps.begin()
        try:
            written = self.device.pwrite_now(offset, data)
        finally:
            if stamps is not None:
                stamps.end()
        self.writes += written
        return written

    async def write(self, offset: int, data: Data) -> None:
        """Write once no fleece needs the old data. Raises OSError.

        Cancelling it before the active write has started writes nothing; afterwards the write
        goes on, as every device call does, and arming waits for it.
        """
        ranges = [(offset, len(data))]
        await self._before_write(ranges)
        await self._active(ranges, self.device.pwrite(offset, data))

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """As ``write`` of zeroes. ``fast``: ENOTSUP at once where old data must be copied first.

        Made ready in pieces, each with its own timer, and written in one call: a request that
        fails for a session's sake has changed no byte.
        """
        if fast and self._must_copy(offset, length):
            raise OSError(errno.ENOTSUP, f"{self.name}: old data must be copied first")
        await self._before_write(_pieces(offset, length))
        await self._active(
            [(offset, length)],
            self.device.zero(offset, length, may_trim=may_trim and self.discards, fast=fast),
        )

    async def trim(self, offset: int, length: int) -> None:
        """A guest's discard, a hint: leaves alone what would have to be copied first.

        Worked in pieces, each with its own timer. A part that a session does not let go is left
        alone too: a request that fails for a session's sake must have changed no byte, and other
        parts may have been discarded already. Where discards are ignored all of it is left alone:
        nothing changes, so that nothing is copied, waited for or recorded.
        """
        if not self.discards:
            return
        for piece in _pieces(offset, length):
            await asyncio.sleep(0)  # a piece in which nothing can go awaits nothing else
            for start, run in self._trimmable(*piece):
                try:
                    await self._before_write([(start, run)])
                except OSError:
                    continue
                await self._active([(start, run)], self.device.trim(start, run))

    def flush_now(self) -> bool:
        """Whether every write that was replied to is durable already."""
        return self.device.flush_now()

    async def flush(self) -> None:
        """Return when every write that was replied to is durable."""
        await self.device.flush()

    async def status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """base:allocation of the active image; ``one`` and the answer as Fleece.status."""
        return await windowed_status(self.device.extents, offset, length, one=one)

    # -- before and around the active write ------------------------------------------------

    async def _before_write(self, ranges: list[tuple[int, int]]) -> None:
        """Return in the step in which the active write of these byte ranges may start."""
        passed: set[Fleece] = set()
        while True:
            fleeces = [fleece for fleece in self.fleeces if fleece not in passed]
            if len(fleeces) == 1:
                await _ready(fleeces[0], ranges)
            elif fleeces:
                await _all_ready(fleeces, ranges)
            elif self._holds:
                await self._held.wait(0, 1)
            else:
                return
            passed.update(fleeces)

    async def _active(self, ranges: list[tuple[int, int]], call: Coroutine[Any, Any, None]) -> None:
        """The active write to these byte ranges, in a task of its own: it is in flight until the
        call has ended, whatever becomes of the request, and arming waits for it."""
        if self._noted:
            self._note_begin(ranges)
        task = asyncio.get_running_loop().create_task(call, name=f"active write to {self.name}")
        self.active_writes += 1
        self._active_calls[task] = ranges
        task.add_done_callback(self._active_ended)
        await asyncio.shield(task)

    def _active_ended(self, task: asyncio.Task[None]) -> None:
        del self._active_calls[task]
        self.active_writes -= 1
        self.writes += 1
        if self._noted:
            self._note_end()
        if not self.active_writes:
            self._idle.wake_all()

    def _must_copy(self, offset: int, length: int) -> bool:
        for fleece in self.fleeces:
            state = fleece.state
            first, end = state.copy.span(offset, length)
            if state.copy.bits.find(1, first, end) >= 0 or state.copy_in_flight(first, end):
                return True
        return False

    def _trimmable(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of the range that no fleece would have to copy first.

        Of a range that falls to pieces, only those that are worth a call.
        """
        ranges = [(offset, length)]
        for fleece in self.fleeces:
            state = fleece.state
            free: list[tuple[int, int]] = []
            for start, run in ranges:
                stop = start + run
                first, end = state.copy.span(start, run)
                kept = ~state.access.bits[first:end] | state.done.bits[first:end]
                for low, high in cluster_runs(kept, 0, end - first):
                    low_byte = max(start, (first + low) << state.shift)
                    free.append((low_byte, min(stop, (first + high) << state.shift) - low_byte))
            ranges = free
        return [part for part in ranges if part[1] >= TRIM_PART_MIN or part[1] == length]

    # -- recording -------------------------------------------------------------------------

    def add_bitmap(self, bitmap: RecordingBitmap) -> None:
        """Record in it from this step on, beginning with the active writes in flight.

        Raises OSError: EEXIST, EINVAL for another size.
        """
        name = bitmap.name
        if name in self.bitmaps or name in self.bitmaps_begun:
            raise OSError(errno.EEXIST, f"{self.name} has a bitmap called {name} already")
        check_usable(self)
        if bitmap.size != self.size:
            raise OSError(
                errno.EINVAL,
                f"bitmap {name} is of {bitmap.size} bytes, and {self.name} of {self.size}",
            )
        self.put_bitmap(name, bitmap)
        self._note_in_flight(bitmap)

    def remove_bitmap(self, name: str) -> RecordingBitmap:
        """Record in it no longer; the caller closes it. Raises OSError: ENOENT, EBUSY."""
        bitmap = self.bitmaps.get(name)
        if bitmap is None:
            raise OSError(errno.ENOENT, f"{self.name} has no bitmap called {name}")
        check_removable(bitmap)
        self.put_bitmap(name, None)
        return bitmap

    def clear_bitmap(self, name: str) -> None:
        """Forget what has changed until now, but for the active writes in flight.

        Raises OSError: ENOENT, EBUSY, EINVAL when it is lost.
        """
        bitmap = self.bitmaps.get(name)
        if bitmap is None:
            raise OSError(errno.ENOENT, f"{self.name} has no bitmap called {name}")
        clear(bitmap)
        self._note_in_flight(bitmap)

    def _note_in_flight(self, bitmap: RecordingBitmap) -> None:
        for ranges in self._active_calls.values():
            for offset, length in ranges:
                bitmap.bitmap.set(offset, length)

    def put_bitmap(self, name: str, bitmap: RecordingBitmap | None) -> None:
        """What is called ``name`` from this step on; None: nothing. For sessions."""
        if bitmap is not None:
            self.bitmaps[name] = bitmap
        else:
            self.bitmaps.pop(name, None)
        self._recorded = [(b.bitmap.bits, b.bitmap.shift) for b in self.bitmaps.values()]
        self._noted = bool(self._recorded) or self._stamps is not None

    @property
    def stamps(self) -> Stamps | None:
        """Who is told when an active write begins and ends; set while none is in flight."""
        return self._stamps

    @stamps.setter
    def stamps(self, stamps: Stamps | None) -> None:
        assert not self.active_writes, "an active write that began unseen would end"
        self._stamps = stamps
        self._noted = bool(self._recorded) or stamps is not None

    def _record(self, offset: int, length: int) -> None:
        end = offset + length - 1
        for bits, shift in self._recorded:
            first, last = offset >> shift, end >> shift
            if first == last:
                # The common case, a small write; one bit takes a third of a slice's time.
                bits[first] = 1
            else:
                bits[first : last + 1] = 1

    def _note_begin(self, ranges: list[tuple[int, int]]) -> None:
        """In the step that starts an active write, before it."""
        for offset, length in ranges:
            self._record(offset, length)
        if self._stamps is not None:
            self._stamps.begin()

    def _note_end(self) -> None:
        if self._stamps is not None:
            self._stamps.end()

    # -- arming ----------------------------------------------------------------------------

    def hold(self) -> None:
        """Start no active write until ``release_hold``; holds count."""
        if not self._holds:
            self.held_since = asyncio.get_running_loop().time()
        self._holds += 1

    def release_hold(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._held.wake_all()

    async def wait_idle(self, deadline: float) -> bool:
        """Return True when no active write is in flight, False when ``deadline`` passed."""
        loop = asyncio.get_running_loop()
        while self.active_writes:
            if loop.time() >= deadline:
                return False
            await self._idle.wait(0, 1, deadline)
        return True


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    stop = offset + length
    return [
        (start, min(PIECE_LENGTH_MAX, stop - start))
        for start in range(offset, stop, PIECE_LENGTH_MAX)
    ]


async def _ready(fleece: Fleece, ranges: list[tuple[int, int]]) -> None:
    for offset, length in ranges:
        await fleece.copy_before_write.ready(*fleece.access.span(offset, length))


async def _all_ready(fleeces: list[Fleece], ranges: list[tuple[int, int]]) -> None:
    """Every fleece at the same time; the first failure is the request's."""
    loop = asyncio.get_running_loop()
    for offset, length in ranges:
        # They claim in this step, so that what two of them need is read once.
        reads: SharedReads = {}
        tasks = []
        for fleece in fleeces:
            first, end = fleece.access.span(offset, length)
            guard = fleece.copy_before_write
            # One that holds up the request first claims later, and reads by itself.
            claimed = None if guard.is_delayed(first, end) else guard.claim(first, end, reads)
            ready = guard.ready(first, end, claimed)
            tasks.append(loop.create_task(ready, name=f"cbw {fleece.name}"))
        del reads
        try:
            for done in asyncio.as_completed(tasks):
                await done
        finally:
            # What is left only waits (the copies run by themselves), so cancelling it is safe.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
