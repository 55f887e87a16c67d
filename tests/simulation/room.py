"""A simulated file system: all temp images of a world are on it, and somebody else's files.

It says how much is free at one moment, and the answer comes later. What the engine then charges is
held against that answer: never more than it left above the reserve.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from .devices import SimDevice
from .plan import RoomPlan

if TYPE_CHECKING:
    from .watch import FleeceWatch
    from .world import World

HANGS_S = 30.0
LOOKS_MAX = 200
"""Else a session that nobody finishes would be looked at for ever."""


class SimRoom:
    """The file system."""

    def __init__(self, world: World, plan: RoomPlan) -> None:
        self.plan = plan
        self.others = 0
        """Bytes that somebody else holds."""
        self.temps: list[SimTempInRoom] = []
        self._world = world

    def free(self) -> int:
        """Bytes."""
        held = sum(temp.used_bytes() for temp in self.temps if not temp.closed)
        return max(0, self.plan.size - self.others - held)

    async def use(self) -> None:
        """Somebody else takes space, and gives it back."""
        rng = random.Random(f"others {self._world.plan.seed}")
        for _ in range(self.plan.others):
            await asyncio.sleep(rng.random() * self.plan.pause_s)
            step = self.plan.unit * rng.randrange(1, 4)
            if rng.random() < 0.5:
                self.others += min(step, self.free())
            else:
                self.others -= min(step, self.others)

    async def look(self, watch: FleeceWatch) -> None:
        """What the server does once a second."""
        for _ in range(LOOKS_MAX):
            await asyncio.sleep(self.plan.look_s)
            if not watch.dead:
                await watch.state.room.look()


class SimTempInRoom(SimDevice):
    """A temp image there: storage.device.Roomy."""

    def __init__(self, *arguments: Any, filesystem: SimRoom, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.filesystem = filesystem
        self.answered_at = -1.0
        """When the last answer came."""
        self.known = 0
        """Bytes free as of the last answer, when its question was asked,"""
        self.charged = 0
        """and clusters charged since then."""
        self.charged_asking = 0
        """Those charged since the question that has no answer yet."""
        self.questions = 0
        self.asking = False
        """A question is on its way: the engine asks one at a time."""
        self._random = random.Random(f"room {self.name}")
        filesystem.temps.append(self)

    async def room(self) -> tuple[int, int]:
        plan = self.filesystem.plan
        free = self.filesystem.free()
        self.questions += 1
        self.charged_asking = 0
        if self.questions > 1:  # at arming it goes on in this step
            self.asking = True
            await asyncio.sleep(self._random.random() * plan.latency_s)
            if self._random.random() < plan.hangs:
                await asyncio.sleep(HANGS_S)
            self.asking = False
        self.answered_at = self._loop.time()
        self.known, self.charged = free, self.charged_asking
        return free, plan.size

    def note_charged(self, clusters: int) -> None:
        """So many more are in use."""
        self.charged += clusters
        self.charged_asking += clusters

    def _has_no_space_for(self, offset: int, length: int) -> bool:
        first, end = offset // self.hole_size, -(-(offset + length) // self.hole_size)
        return self.space[first:end].count(0) * self.hole_size > self.filesystem.free()
