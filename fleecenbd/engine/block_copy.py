"""Copies dirty runs from the active image to the temp image, and gives temp space back.

    claim     in one step: clear the run's copy bits, register a copy in flight
    run       read the active image, if there is anything to read (copy_reads.py); in the step that
              starts a temp write leave out what lost ``access``; write data as data, zeroes as
              zeroes that use no space; or read nothing, and let the temp image share the blocks
    end       in one step: where ``access`` is still set: ``done``, or ``copy`` again if it failed
    release   clear the bits in one step, wait for the temp calls in flight there, punch

A copy runs by itself, in a task of this object, and nobody waits for it but by range. It is never
cancelled from outside: its device call goes on whatever happens, and its clusters stay its own
until the call has ended. A copy whose clusters have all lost ``access`` simply ends at its next
step.

Copies have slots of their own (``COPIES_MAX``, of ``COPIES_LENGTH_MAX`` bytes in all), which no
guest write holds. A copy that waits for a slot has no task yet, so a hung temp image cannot pile
up tasks behind it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Awaitable
from itertools import islice

from fleecenbd.engine.copy_reads import CopyReads, How
from fleecenbd.engine.reqlist import RangeRequest
from fleecenbd.engine.shared_read import ReadNow, SharedRead, SharedReads
from fleecenbd.engine.state import Copy, FleeceState, Release
from fleecenbd.engine.zeroes import alike, is_zero
from fleecenbd.storage.device import Buffer, Cloning

logger = logging.getLogger(__name__)

COPY_LENGTH_MAX = 1 << 20
"""Bytes. Neighbouring clusters are copied in one go up to this."""
COPY_NOW_LENGTH_MAX = 256 << 10
"""Bytes. A longer copy is not made in one step: it would keep the loop from everybody else."""
COPIES_MAX = 16
"""Copies of one fleece that hold a buffer at the same time,"""
COPIES_LENGTH_MAX = 16 << 20
"""and bytes of their buffers, where a cluster is longer than a copy otherwise is."""
QUEUED_MAX = 64
"""Copies that wait for a slot before those that have been released are looked for."""


class BlockCopy:
    """The copies of one fleece."""

    def __init__(self, state: FleeceState) -> None:
        self._state = state
        self._claim_clusters_max = max(1, COPY_LENGTH_MAX >> state.shift)
        self._now_clusters_max = COPY_NOW_LENGTH_MAX >> state.shift
        self._copies_max = max(1, min(COPIES_MAX, COPIES_LENGTH_MAX // state.cluster_size))
        self._reads = CopyReads(state)
        self._scan_above = QUEUED_MAX
        self._queued: deque[Copy] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._releases: set[asyncio.Task[None]] = set()
        self._told = False
        """That temp space could not be freed."""

    # -- claim and run ---------------------------------------------------------------------

    def claim(self, first: int, end: int, reads: SharedReads | None = None) -> list[Copy]:
        """Claim every run of ``[first, end)`` whose copy bit is set; the copies start at once.

        ``reads``: the same for every fleece that claims in this step.
        """
        state = self._state
        bits = state.copy.bits
        claimed = []
        while (first := bits.find(1, first, end)) >= 0:
            stop = bits.find(0, first, end)
            if stop < 0:
                stop = end
            stop = min(stop, first + self._claim_clusters_max)
            bits[first:stop] = 0
            copy = state.copies.add(Copy(first, stop))
            state.stats.copies_started += 1
            claimed.append(copy)
            self._queued.append(copy)
            if reads is not None:
                self._share(copy, reads)
            first = stop
        if claimed:
            self._start_queued()
            if reads is not None:
                # Ours that must wait for a slot are the last in the queue.
                for copy in islice(reversed(self._queued), len(claimed)):
                    if copy.shared is not None:
                        copy.shared.parties -= 1
                        copy.shared = None
        return claimed

    def _share(self, copy: Copy, reads: SharedReads) -> None:
        key = self._state.access.bytes_of(copy.first, copy.end)
        shared = reads.get(key)
        if shared is None:
            shared = reads[key] = SharedRead(self._state.source, *key)
        shared.parties += 1
        copy.shared = shared

    def copy_now(self, first: int, end: int, reads: ReadNow | None = None) -> bool:
        """Copy every dirty run of ``[first, end)`` in this very step, where no call can block.

        ``reads``: the same for every fleece that copies in this step. False: something is left to
        copy, and nothing was claimed; ``claim`` does it. Errors are left for it too: it meets them
        again, and they have one owner.
        """
        state = self._state
        bits = state.copy.bits
        shift = state.shift
        while (first := bits.find(1, first, end)) >= 0:
            stop = bits.find(0, first, end)
            if stop < 0:
                stop = end
            if stop - first > self._now_clusters_max:
                return False
            offset = first << shift
            length = (stop << shift) - offset
            if offset + length > state.size:
                length = state.size - offset
            try:
                data = reads.get((offset, length)) if reads else None
                if data is None:
                    data = state.source.pread_now(offset, length)
                    if data is None:
                        return False
                    if reads is not None:
                        reads[offset, length] = data
                if stop - first == 1:
                    # The common case, a small write: no runs to tell apart.
                    if data[0] or not is_zero(data, 0, length):
                        state.charge(first, stop)
                        if not state.target.pwrite_now(offset, data):
                            return False
                    elif state.charged.bits[first]:
                        return False
                elif not self._write_runs_now(first, stop, data):
                    return False
            except OSError:
                return False
            bits[first:stop] = 0
            state.done.bits[first:stop] = 1
            stats = state.stats
            stats.copies_started += 1
            stats.copies_done += 1
            stats.copied_bytes += length
            first = stop
        return True

    def _write_runs_now(self, first: int, end: int, data: Buffer) -> bool:
        state = self._state
        base = first
        while first < end:
            stop, only_zeroes = alike(data, base, first, end, state.shift)
            if only_zeroes:
                if state.charged.bits.find(1, first, stop) >= 0:
                    return False
            else:
                state.charge(first, stop)
                offset = (first - base) << state.shift
                piece = memoryview(data)[offset : (stop - base) << state.shift]
                if not state.target.pwrite_now(first << state.shift, piece):
                    return False
            first = stop
        return True

    def _start_queued(self) -> None:
        access = self._state.access.bits
        if len(self._queued) > self._scan_above:
            # Behind a temp image that hangs, what has been released must not pile up.
            queued = list(self._queued)
            self._queued.clear()
            for copy in queued:
                if access.find(1, copy.first, copy.end) < 0:
                    self._end(copy, None)
                else:
                    self._queued.append(copy)
            self._scan_above = max(QUEUED_MAX, 2 * len(self._queued))
        while self._queued and len(self._tasks) < self._copies_max:
            copy = self._queued.popleft()
            if access.find(1, copy.first, copy.end) < 0:
                self._end(copy, None)
                continue
            task = asyncio.get_running_loop().create_task(
                self._run(copy), name=f"copy {self._state.name} {copy.first}-{copy.end}"
            )
            self._tasks.add(task)
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._start_queued()

    async def _run(self, copy: Copy) -> None:
        # Until it has succeeded it has failed, whatever ends it.
        error: OSError | None = OSError(errno.EIO, "the copy was cut off")
        try:
            await self._state.room.twice(self._copy, copy)
            error = None
        except OSError as caught:
            error = caught
        except Exception as caught:
            # Our own fault: this session breaks, no guest does.
            logger.exception("%s: copying clusters %s failed", self._state.name, copy)
            error = OSError(errno.EIO, f"internal error: {caught!r}")
            self._state.break_session(f"internal error: {caught!r}")
        finally:
            self._end(copy, error)

    async def _copy(self, copy: Copy) -> None:
        parts = await self._reads.parts(copy)
        if parts is None:
            await self._write(copy.first, copy.end, await self._reads.read(copy))
            return
        for first, end, how in parts:
            if how is How.ZERO:
                await self._write(first, end, None)
            elif how is How.READ or not await self._clone(first, end):
                await self._write(first, end, await self._reads.read_part(first, end))

    async def _clone(self, first: int, end: int) -> bool:
        """Let the clusters share the active image's blocks; False: refused, write all of them."""
        state = self._state
        shift = state.shift
        access = state.access.bits
        target = state.target
        assert isinstance(target, Cloning), "CopyReads asks the temp image first"
        # Each round is one step up to its await: what lost access until now is left out.
        while (first := access.find(1, first, end)) >= 0:
            stop = access.find(0, first, end)
            if stop < 0:
                stop = end
            state.charge(first, stop)
            clone = target.clone(state.source, first << shift, (stop - first) << shift)
            if not await self._temp_write(first, stop, clone):
                return False
            state.stats.cloned_bytes += (stop - first) << shift
            first = stop
        return True

    async def _write(self, base: int, end: int, data: Buffer | None) -> None:
        """Write to the clusters ``[base, end)`` what they held, ``data``; None: zeroes."""
        state = self._state
        shift = state.shift
        access = state.access.bits
        first = base
        # Each round is one step up to its await: what lost access until now is left out.
        while (first := access.find(1, first, end)) >= 0:
            stop = access.find(0, first, end)
            if stop < 0:
                stop = end
            only_zeroes = data is None
            if data is not None:
                stop, only_zeroes = alike(data, base, first, stop, shift)
            start = first << shift
            run_length = min(stop << shift, state.size) - start
            piece: memoryview | None = None
            if data is not None and not only_zeroes:
                state.charge(first, stop)
                offset = start - (base << shift)
                piece = memoryview(data)[offset : offset + run_length]
            elif state.charged.bits.find(1, first, stop) < 0:
                first = stop
                continue
            # Zeroes where something is charged: an earlier, failed write may have left anything.
            if piece is None:
                zero = state.target.zero(start, (stop << shift) - start)
                await self._temp_write(first, stop, zero)
            elif not state.target.pwrite_now(start, piece):
                await self._temp_write(first, stop, state.target.pwrite(start, piece))
            first = stop

    async def _temp_write(self, first: int, end: int, call: Awaitable[bool | None]) -> bool:
        """Await a write to these clusters of the temp image; TRIM can wait for it.

        False: a clone that was refused. Raises OSError.
        """
        state = self._state
        request = state.temp_writes.add(RangeRequest(first, end))
        try:
            return await call is not False
        except OSError:
            # Only a failure on a cluster that still has access counts.
            if state.access.bits.find(1, first, end) >= 0:
                raise
            return True
        finally:
            state.temp_writes.remove(request)
            state.trims.wake(first, end)

    def _end(self, copy: Copy, error: OSError | None) -> None:
        """In one step: the copy is no longer in flight, and its clusters get their state."""
        state = self._state
        state.copies.remove(copy)
        access = state.access.bits
        bits = state.done.bits if error is None else state.copy.bits
        stats = state.stats
        live = access[copy.first : copy.end]
        count = live.count()
        if count:
            bits[copy.first : copy.end] |= live
            if error is None:
                stats.copies_done += 1
                stats.copied_bytes += count << state.shift
            else:
                stats.copies_failed += 1
                copy.error = error
        state.guests.wake(copy.first, copy.end)

    # -- release ---------------------------------------------------------------------------

    def release_now(self, first: int, end: int) -> bool:
        """TRIM in one step, where nothing is left to wait for or to punch.

        False: nothing was done. The session must be alive.
        """
        state = self._state
        if (
            state.charged.bits.find(1, first, end) >= 0
            or (state.temp_writes and state.temp_writes.overlapping(first, end))
            or (state.temp_reads and state.temp_reads.overlapping(first, end))
            or (state.releases and state.releases.overlapping(first, end))
        ):
            return False
        state.stats.guest_released_by_trim += state.release(first, end)
        return True

    async def release(self, first: int, end: int) -> None:
        """TRIM: release the clusters, wait for the temp calls in flight there, free the space.

        Raises OSError: EIO when the punch failed (the range stays released), the session's own
        error when a break or ``finish`` overtook it.
        """
        state = self._state
        request = self.release_later(first, end)
        while not request.ended and not state.dead:
            await state.trims.wait(first, end)
        if state.dead:
            raise state.death()
        if request.error is not None:
            raise request.error

    def release_later(self, first: int, end: int, *, untold: bool = False) -> Release:
        """Release the clusters in this step; their space is freed by itself. The session must be
        alive. ``untold``: nobody looks at ``Release.error``, so the log tells of the first."""
        state = self._state
        state.stats.guest_released_by_trim += state.release(first, end)
        # No new temp call can begin here: each needs access. So it is enough to wait for these.
        in_flight: list[RangeRequest] = [
            *state.temp_writes.overlapping(first, end),
            *state.temp_reads.overlapping(first, end),
            *state.releases.overlapping(first, end),
        ]
        request = Release(first, end, untold=untold)
        state.releases.add(request)
        # The rest happens even if the client has gone, so it is not the client's task that does it.
        task = asyncio.get_running_loop().create_task(
            self._free(request, in_flight), name=f"free {state.name} {first}-{end}"
        )
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return request

    async def _free(self, request: Release, in_flight: list[RangeRequest]) -> None:
        """Wait for the temp calls in flight, and punch what may hold space."""
        state = self._state
        first, end = request.first, request.end
        # Until it has succeeded it has failed, whatever ends it.
        request.error = OSError(errno.EIO, f"{state.name}: freeing temp space was cut off")
        try:
            while not state.dead and any(not other.ended for other in in_flight):
                await state.trims.wait(first, end)
            charged = state.charged.bits
            if not state.dead and (low := charged.find(1, first, end)) >= 0:
                high = charged.find(1, first, end, right=True) + 1
                await state.target.trim(low << state.shift, (high - low) << state.shift)
                state.uncharge(low, high)
            request.error = None
        except OSError as error:
            request.error = OSError(
                errno.EIO, f"{state.name}: temp space could not be freed: {error.strerror}"
            )
            if request.untold and not self._told:
                self._told = True
                logger.warning("%s (clusters %d to %d)", request.error.strerror, first, end - 1)
        finally:
            state.releases.remove(request)
            state.trims.wake(first, end)

    async def drained(self) -> None:
        """Return when nothing runs here any more (a hung device call may keep it for ever)."""
        while tasks := self._tasks | self._releases:
            await asyncio.wait(tasks)
