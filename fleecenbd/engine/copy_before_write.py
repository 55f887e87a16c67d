"""The guest's side of a fleece: what a guest request must wait for before it changes the disk.

    1  claim the runs whose copy bit is set               (BlockCopy.claim)
    2  the copies run by themselves
    3  wait until no copy in flight overlaps where access is set; look again from 1
    4  wait for the frozen reads that overlap and have lost none of their access

``done`` is set before the wait for frozen reads, and a reader checks ``access``, ``done`` and
freezes in one step: after step 3 no new reader can freeze the range, so step 4 ends.

Under ``throttle`` a request that would copy is delayed before 1, the longer the less room there is
(room.py).

One timer per guest request covers the delay, and 1 to 4. A timeout ends the waiting, never the
copy.

Once ``ready`` has returned, the range stays ready: its clusters are ``done`` or released, and
neither is ever undone. So requests may be made ready for several fleeces, one after the other.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

from fleecenbd.engine.block_copy import BlockCopy
from fleecenbd.engine.room import THROTTLE_MAX_S, TIMER_SHARE
from fleecenbd.engine.shared_read import ReadNow, SharedReads
from fleecenbd.engine.state import BREAK_GUEST_WRITE, Copy, FleeceState


class CopyBeforeWrite:
    """Copy-before-write for one fleece."""

    def __init__(self, state: FleeceState, block_copy: BlockCopy) -> None:
        self._state = state
        self._block_copy = block_copy

    def ready_now(self, first: int, end: int, reads: ReadNow | None = None) -> bool:
        """Make the clusters ``[first, end)`` ready in this very step. False: ``ready`` must.

        ``reads``: what was read for other fleeces in this step.
        """
        state = self._state
        if state.dead:
            return True
        if state.copies and state.copy_in_flight(first, end):
            return False
        if state.copy.bits.find(1, first, end) >= 0:
            if state.throttles and self.is_delayed(first, end):
                return False
            if not self._block_copy.copy_now(first, end, reads):
                return False
        return not (state.frozen_reads and state.frozen(first, end))

    def claim(self, first: int, end: int, reads: SharedReads) -> list[Copy]:
        """Step 1 of ``ready``, in one step with other fleeces: copies that may share a read."""
        return [] if self._state.dead else self._block_copy.claim(first, end, reads)

    def is_delayed(self, first: int, end: int) -> bool:
        """Whether ``ready`` would hold up a request first, for want of room (``throttle``)."""
        state = self._state
        return (
            state.throttles
            and not state.dead
            and state.copy.bits.find(1, first, end) >= 0
            and state.room.delay_s() > 0
        )

    async def _delay(self, first: int, end: int, started: float) -> bool:
        """Hold up a request that would copy, as long as the room says; whether it was."""
        state = self._state
        loop = asyncio.get_running_loop()
        timer_s = state.cbw_timeout_s
        most = timer_s * TIMER_SHARE if timer_s > 0 else THROTTLE_MAX_S
        is_delayed = False
        while self.is_delayed(first, end):
            until = started + min(most, state.room.delay_s())
            if loop.time() >= until:
                break
            is_delayed = True
            await state.guests.wait(first, end, until)
        if is_delayed:
            state.stats.throttled += 1
            state.stats.throttled_s += loop.time() - started
        return is_delayed

    async def ready(self, first: int, end: int, claimed: Sequence[Copy] | None = None) -> None:
        """Return when a guest may change the clusters ``[first, end)``.

        ``claimed``: what ``claim`` returned for this request, which is then not delayed. Raises
        OSError(EIO) for a failure under break-guest-write. Cancelling it is safe.
        """
        state = self._state
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + state.cbw_timeout_s if state.cbw_timeout_s > 0 else None
        waited = claimed is None and await self._delay(first, end, started)
        try:
            ours = list(claimed or ())
            while not state.dead:
                if self._failed(ours):
                    return
                ours += self._block_copy.claim(first, end)
                if not state.copy_in_flight(first, end):
                    break
                if deadline is not None and loop.time() >= deadline:
                    self._give_up("copying old data")
                    return
                waited = True
                await state.guests.wait(first, end, deadline)
            while not state.dead and state.frozen(first, end):
                if deadline is not None and loop.time() >= deadline:
                    self._give_up("a backup read of the same range")
                    return
                waited = True
                state.stats.frozen_waits += 1
                await state.guests.wait(first, end, deadline)
        finally:
            if waited:
                spent = loop.time() - started
                stats = state.stats
                stats.guest_waits += 1
                stats.guest_wait_s += spent
                if spent > stats.guest_wait_max_s:
                    stats.guest_wait_max_s = spent
                stats.guest_wait_times.note(spent)

    def _failed(self, claimed: list[Copy]) -> bool:
        """Did a copy that this request claimed fail, on a cluster that still has access?

        Under break-snapshot the session breaks and this is True: the guest goes on. Under
        break-guest-write it raises.
        """
        state = self._state
        for copy in claimed:
            if copy.error is not None and state.access.bits.find(1, copy.first, copy.end) >= 0:
                cause = copy.error.strerror or str(copy.error)
                if copy.error.filename is not None:
                    cause = f"{copy.error.filename}: {cause}"
                if state.on_cbw_error == BREAK_GUEST_WRITE:
                    raise OSError(errno.EIO, f"{state.name}: old data could not be copied: {cause}")
                state.break_session(f"old data could not be copied: {cause}")
                return True
        return False

    def _give_up(self, what: str) -> None:
        """The request's time is up: break the session, or raise."""
        state = self._state
        state.stats.timeouts += 1
        cause = f"a guest write waited over {state.cbw_timeout_s:g} s for {what}"
        if state.on_cbw_error == BREAK_GUEST_WRITE:
            raise OSError(errno.EIO, f"{state.name}: {cause}")
        state.break_session(cause)
