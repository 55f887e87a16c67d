"""A simulated device that leaves its luck to the choices of the run.

What SimDevice draws from a seed is here either a choice (which call goes on next, with a piece or
with a failure; whether ``*_now`` answers at once) or set by the scenario (what hangs, where a call
falls to pieces). Content, space and what the checkers are told are SimDevice's.
"""

from __future__ import annotations

import errno
import random
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tests.simulation.calls import CHANGES, Call, Profile
from tests.simulation.devices import SimDevice

from .scenario import NEVER, REFUSED

if TYPE_CHECKING:
    from .world import OrderWorld

ACTOR: ContextVar[str] = ContextVar("actor", default="")
"""The actor on whose behalf the current step runs; copies have that of their guest."""
GARBAGE = 0xEE
"""What a failed write leaves in the piece at which it failed."""


class OrderDevice(SimDevice):
    """A device whose calls go on when the run chooses them."""

    def __init__(
        self,
        world: OrderWorld,
        name: str,
        size: int,
        *,
        content: bytes | None = None,
        is_temp: bool = False,
    ) -> None:
        rng = random.Random(0)
        super().__init__(
            world.loop, rng, world.checkers, name, size, Profile(), content=content, is_temp=is_temp
        )
        self._world = world
        self.actors: dict[Call, str] = {}
        """On whose behalf each call was made."""

    def _answers_now(self, chance: float) -> bool:
        return self._world.answers_now(self)

    def clones(self, source: SimDevice, offset: int, length: int) -> bool:
        return self._world.scenario.clones != NEVER

    def _refuses_clone(self) -> bool:
        return self._world.scenario.clones == REFUSED

    def _now(self, call: Call) -> None:
        """A call at once; it may fail at once, too."""
        self.actors[call] = ACTOR.get()
        call.cuts = self._cuts(call)
        if self.can_fail(call) and self._world.fails_now(self):
            self.fail(call)
            raise OSError(call.error, f"simulated: {self.name}: {call}")
        super()._now(call)

    async def _later(self, call: Call) -> Call:
        self.actors[call] = ACTOR.get()
        call.future = self._loop.create_future()
        call.cuts = self._cuts(call)
        if self._world.scenario.hangs_here(self.name, call, ACTOR.get()):
            call.hung = True
            self.hung_count += 1
        else:
            self._loop.complete_at(0.0, self._advance, call)
        await call.future
        return call

    def _cuts(self, call: Call) -> list[int]:
        """Ends of the call's pieces, last one first: whole blocks, or half ones in one block."""
        scenario = self._world.scenario
        unit = self.hole_size
        if not scenario.pieces:
            return [call.end]
        if scenario.halves and call.length <= unit:
            unit //= 2
        start = call.offset - call.offset % unit + unit
        return [*range(start, call.end, unit), call.end][::-1]

    def can_fail(self, call: Call) -> bool:
        """May the call fail now, by the scenario?"""
        return self._world.failures_left > 0 and self._world.scenario.fails_here(
            self.name, call, self.actors[call]
        )

    def is_last(self, call: Call) -> bool:
        """Does the next piece end the call?"""
        return len(call.cuts) <= (0 if self._world.scenario.ends_apart else 1)

    def _advance(self, call: Call) -> None:
        """The next piece lands; the last one ends the call."""
        last = self.is_last(call)
        if call.cuts:
            cut = call.cuts.pop()
            start = call.offset + call.landed
            self._land(call, start, cut - start)
            call.landed = cut - call.offset
        if last:
            self._end(call)
        else:
            self._loop.complete_at(0.0, self._advance, call)

    def fail(self, call: Call) -> None:
        """The call fails now: garbage in the next piece, the pieces after it untouched."""
        self._world.failures_left -= 1
        call.fails, call.error = True, errno.EIO
        if call.cuts and call.kind in CHANGES and call.kind != "trim":
            start, end = call.offset + call.landed, call.cuts[-1]
            self.content[start:end] = bytes([GARBAGE]) * (end - start)
            self._take_space(start, end)
            self._watcher.call_landed(self, call, start, end - start)
        self._end(call)
