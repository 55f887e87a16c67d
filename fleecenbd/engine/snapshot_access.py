"""The backup's side of a fleece: read, block status, TRIM, READ_ONCE.

A read splits its range into runs. Each run begins in one step: look at ``access`` and ``done``,
register (a frozen read of the active image, or a temp read), start the device call. Between that
and its end nothing else is awaited.

    done clear   frozen read  ──▶ active image       guests wait for it
    done set     temp read    ──▶ temp image         TRIM waits for it

When all data is in memory, and in the step in which ``read`` returns, it looks once more: broken,
finished, any cluster of the request without ``access``. A guest write does not wait for a frozen
read that lost ``access``, so this last look is what keeps wrong data from a client: nothing may be
awaited between it and the queueing of the reply.

BLOCK_STATUS never asks the temp image: where ``charged`` is clear it holds nothing, and elsewhere
"data" is the safe answer. The active image is asked under freeze, a window at a time.
"""

from __future__ import annotations

import errno

from bitarray import bitarray

from fleecenbd.engine.bit_status import access_extents, dirty_extents
from fleecenbd.engine.block_copy import BlockCopy
from fleecenbd.engine.extents import (
    STATUS_EXTENTS_MAX,
    append_extent,
    windowed_status,
)
from fleecenbd.engine.own_bits import OwnBits
from fleecenbd.engine.parts import PartTable, covered_whole
from fleecenbd.engine.reqlist import RangeRequest
from fleecenbd.engine.state import FleeceState, FrozenRead
from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Buffer, Extent

READ_NOW_LENGTH_MAX = 1 << 20
"""Bytes. A longer read would keep the loop from everybody else: it goes to the pool."""
_DATA = 0
_ZERO = EXTENT_HOLE | EXTENT_ZERO


class SnapshotAccess:
    """What a backup client can do with a fleece."""

    def __init__(
        self, state: FleeceState, block_copy: BlockCopy, own: OwnBits | None = None
    ) -> None:
        self._state = state
        self._block_copy = block_copy
        self._own = own if own is not None and own.dirty_only else None
        self._parts = PartTable()

    # -- read ------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """The data as of arming, or None where a device call could block; errors as ``read``."""
        state = self._state
        if state.dead:
            raise state.death()
        shift = state.shift
        first = offset >> shift
        end = ((offset + length - 1) >> shift) + 1
        if state.access.bits.find(0, first, end) >= 0:
            raise self._denied(first, end)
        if length > READ_NOW_LENGTH_MAX:
            return None
        done = state.done.bits
        if done.find(1, first, end) < 0:
            return state.source.pread_now(offset, length)
        if done.find(0, first, end) < 0:
            return state.target.pread_now(offset, length)
        return self._read_mixed_now(first, end, offset, length)

    def _read_mixed_now(self, first: int, end: int, offset: int, length: int) -> Buffer | None:
        """The active image in one call, and over it, run by run, what the temp image holds."""
        state = self._state
        try:
            source_data = state.source.pread_now(offset, length)
        except OSError:
            return None  # it may lie where nothing is read: ``read`` goes run by run
        if source_data is None:
            return None
        data = source_data if isinstance(source_data, bytearray) else bytearray(source_data)
        shift, find = state.shift, state.done.bits.find
        with memoryview(data) as view:
            while (first := find(1, first, end)) >= 0:
                if (stop := find(0, first, end)) < 0:
                    stop = end
                low = max(0, (first << shift) - offset)
                run = view[low : (stop << shift) - offset]
                if not state.target.pread_into_now(offset + low, run):
                    return None
                first = stop
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        """The data as of arming.

        Raises OSError: EIO with the cause when the session broke, ESHUTDOWN when it finished,
        EINVAL when a part of the range may not be read, and what the devices raise.
        """
        state = self._state
        shift = state.shift
        first = offset >> shift
        end = ((offset + length - 1) >> shift) + 1
        stop = offset + length
        parts: list[Buffer] = []
        while True:
            # One step: the look at access and done, the freeze, and the start of the call.
            self._look(first, end)
            if offset >= stop:
                break
            run_first = offset >> shift
            bit = state.done.bits[run_first]
            run_end = state.done.bits.find(not bit, run_first, end)
            if run_end < 0:
                run_end = end
            run_stop = min(run_end << shift, stop)
            if bit:
                parts.append(await self._temp_read(run_first, run_end, offset, run_stop - offset))
            else:
                parts.append(await self._frozen_read(run_first, run_end, offset, run_stop - offset))
            offset = run_stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _look(self, first: int, end: int) -> None:
        state = self._state
        if state.dead:
            raise state.death()
        if state.access.bits.find(0, first, end) >= 0:
            raise self._denied(first, end)

    async def _frozen_read(self, first: int, end: int, offset: int, length: int) -> Buffer:
        state = self._state
        data = state.source.pread_now(offset, length)
        if data is not None:
            return data
        request = state.frozen_reads.add(FrozenRead(first, end))
        try:
            return await state.source.pread(offset, length)
        finally:
            state.frozen_reads.remove(request)
            state.guests.wake(first, end)

    async def _temp_read(self, first: int, end: int, offset: int, length: int) -> Buffer:
        state = self._state
        data = state.target.pread_now(offset, length)
        if data is not None:
            return data
        request = state.temp_reads.add(RangeRequest(first, end))
        try:
            return await state.target.pread(offset, length)
        finally:
            state.temp_reads.remove(request)
            state.trims.wake(first, end)

    def _denied(self, first: int, end: int) -> OSError:
        state = self._state
        cluster = state.access.bits.find(0, first, end)
        own = self._own
        if own is not None and not own.bitmap.any(*state.access.bytes_of(cluster, cluster + 1)):
            why = (
                f"is outside of the session's bitmap {own.name}: it has not changed, "
                "and only what has can be read"
            )
        else:
            # Which of the two it was is not known any more after a restart.
            why = "was released, by a TRIM or by being read once, and can no longer be read"
        return OSError(errno.EINVAL, f"{state.name}: offset {cluster << state.shift} {why}")

    # -- block status ----------------------------------------------------------------------

    async def status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """base:allocation of a range: extents from ``offset`` on, in order, without a gap.

        They may cover less than ``length`` (at least one extent), never more. ``one``: only the
        first extent is wanted. What may not be read counts as data: a client that believes the
        map and reads there fails loudly. Raises OSError when broken or finished.
        """
        extents = await windowed_status(self._window_status, offset, length, one=one)
        if self._state.dead:
            raise self._state.death()
        return self._unreadable_as_data(offset, extents)

    def _unreadable_as_data(self, offset: int, extents: list[Extent]) -> list[Extent]:
        """The look at access after the last await: what was released meanwhile is data.

        Elsewhere the active image's answer was given under freeze, so it is that of arming.
        """
        access = self._state.access
        answer: list[Extent] = []
        for length, flags in extents:
            if flags == _DATA or access.all(offset, length):
                append_extent(answer, length, flags)
            else:
                for _, run, readable in access.runs(offset, length):
                    append_extent(answer, run, flags if readable else _DATA)
                    if len(answer) > STATUS_EXTENTS_MAX:
                        return answer
            offset += length
        return answer

    async def _window_status(self, offset: int, length: int) -> list[Extent]:
        state = self._state
        if state.dead:
            raise state.death()
        shift = state.shift
        first = offset >> shift
        end = ((offset + length - 1) >> shift) + 1
        stop = offset + length
        known = state.access.bits[first:end]
        asked = known & ~state.done.bits[first:end]
        empty_in_temp = known & ~asked & ~state.charged.bits[first:end]
        low = asked.find(1)
        source_extents: list[Extent] = []
        high = source_offset = source_stop = -1
        if low >= 0:
            # The span from the first to the last cluster asked about, in one call.
            high = asked.find(1, right=True) + 1
            source_offset = max(offset, (first + low) << shift)
            source_stop = min(stop, (first + high) << shift)
            request = state.frozen_reads.add(FrozenRead(first + low, first + high, asked[low:high]))
            try:
                source_extents = await state.source.extents(
                    source_offset, source_stop - source_offset
                )
            finally:
                state.frozen_reads.remove(request)
                state.guests.wake(request.first, request.end)
            if state.dead:
                raise state.death()
        extents: list[Extent] = []
        if low >= 0 and asked.find(0, low, high) < 0:
            # Nothing of the span was copied: its answer is finer than clusters.
            self._append_clusters(extents, empty_in_temp, first, offset, source_offset)
            for extent in source_extents:
                append_extent(extents, *extent)
            self._append_clusters(extents, empty_in_temp, first, source_stop, stop)
            return extents
        if low >= 0:
            asked &= self._zero_clusters(first, end, source_offset, source_extents)
            empty_in_temp |= asked
        self._append_clusters(extents, empty_in_temp, first, offset, stop)
        return extents

    def _zero_clusters(self, first: int, end: int, offset: int, extents: list[Extent]) -> bitarray:
        """A bit per cluster of ``[first, end)``: does it lie in a zero extent whole?

        The extents begin at byte ``offset``; where they begin or end inside a cluster, the part
        that they tell about counts.
        """
        shift = self._state.shift
        mask = (1 << shift) - 1
        zero = bitarray(end - first, endian="little")
        zero.setall(0)
        begin = offset
        told = offset + sum(length for length, _ in extents)
        for length, flags in extents:
            stop = offset + length
            if flags & EXTENT_ZERO:
                low = offset >> shift if offset == begin else (offset + mask) >> shift
                high = (stop + mask) >> shift if stop == told else stop >> shift
                if low < high:
                    zero[low - first : high - first] = 1
            offset = stop
        return zero

    def _append_clusters(
        self, extents: list[Extent], zero: bitarray, first: int, offset: int, stop: int
    ) -> None:
        """Append the bytes ``[offset, stop)``: zero where the cluster's bit is set, else data.

        ``zero`` begins at cluster ``first``. Ends early after STATUS_EXTENTS_MAX extents.
        """
        shift = self._state.shift
        while offset < stop and len(extents) <= STATUS_EXTENTS_MAX:
            cluster = (offset >> shift) - first
            bit = zero[cluster]
            run_end = zero.find(not bit, cluster)
            run_stop = stop if run_end < 0 else min(stop, (first + run_end) << shift)
            append_extent(extents, run_stop - offset, _ZERO if bit else _DATA)
            offset = run_stop

    def access_status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """x-fleecenbd:access of a range, as it is in this step: (length, ACCESS_* bits) runs.

        They may cover less than ``length``, as those of ``status``.
        """
        state = self._state
        if state.dead:
            raise state.death()
        return access_extents(state.access, state.done, offset, length, one=one)

    def dirty_status(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """qemu:dirty-bitmap of a range: (length, DIRTY or 0) runs of the session's own bits.

        The same for the session's whole life. They may cover less than ``length``, as those of
        ``status``. The session must have been armed to read what is dirty.
        """
        assert self._own is not None, "the context is on offer only then"
        if self._state.dead:
            raise self._state.death()
        return dirty_extents(self._own.bitmap, offset, length, one=one)

    # -- TRIM ------------------------------------------------------------------------------

    def trim_now(self, offset: int, length: int) -> bool:
        """TRIM in one step, where nothing has to be waited for. False: ``trim`` must do it."""
        state = self._state
        if state.dead:
            raise state.death()
        shift = state.shift
        mask = (1 << shift) - 1
        stop = offset + length
        if offset & mask or (stop & mask and stop != state.size):
            return False
        first, end = offset >> shift, (stop + mask) >> shift
        if not self._block_copy.release_now(first, end):
            return False
        self._count(first, end)
        return True

    async def trim(self, offset: int, length: int) -> None:
        """Release every cluster that the range covers whole, and free its temp space.

        A cluster counts as covered from its start to its end, or to the end of the disk; parts
        add up over requests. Guest writes that wait there go on in this very step. Raises
        OSError: EIO, ESHUTDOWN.
        """
        state = self._state
        if state.dead:
            raise state.death()
        first, end = self._covered(offset, offset + length)
        if first >= end:
            return
        self._count(first, end)
        await self._block_copy.release(first, end)

    # -- READ_ONCE -------------------------------------------------------------------------

    def release_read(self, offset: int, length: int) -> None:
        """Release every cluster that this one READ covered whole: its reply was handed over.

        Parts do not add up. Nobody waits for the space, which is freed as after a TRIM. A plain
        call that does not raise; after the session's end it does nothing. (docs/semantics.md, 6.)
        """
        state = self._state
        if state.dead:
            return
        first, end = covered_whole(offset, length, state.size, state.shift)
        if first >= end:
            return
        state.stats.reads_once += 1
        self._parts.forget(first, end)
        if not self._block_copy.release_now(first, end):
            self._block_copy.release_later(first, end, untold=True)

    def _count(self, first: int, end: int) -> None:
        state = self._state
        state.stats.trims += 1
        if (state.frozen_reads and state.frozen_reads.overlapping(first, end)) or (
            state.temp_reads and state.temp_reads.overlapping(first, end)
        ):
            state.stats.trims_during_reads += 1
        self._parts.forget(first, end)

    def _covered(self, offset: int, stop: int) -> tuple[int, int]:
        """The clusters that ``[offset, stop)``, with the parts known so far, covers whole."""
        state = self._state
        shift = state.shift
        first = offset >> shift
        end = ((stop - 1) >> shift) + 1
        tail = end - 1
        tail_start = tail << shift
        tail_length = min(1 << shift, state.size - tail_start)
        head_start = first << shift
        if first == tail:
            if (offset, stop) == (tail_start, tail_start + tail_length):
                return first, end
            if self._part(first, offset - head_start, stop - head_start, tail_length):
                return first, end
            return first, first
        if stop != tail_start + tail_length and not self._part(
            tail, 0, stop - tail_start, tail_length
        ):
            end = tail
        if offset != head_start and not self._part(
            first, offset - head_start, 1 << shift, 1 << shift
        ):
            first += 1
        return first, end

    def _part(self, cluster: int, start: int, end: int, whole: int) -> bool:
        state = self._state
        if not state.access.bits[cluster]:
            return False
        state.stats.part_trims += 1
        return self._parts.add(cluster, start, end, whole)
