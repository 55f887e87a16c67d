"""A world of one seed: the engine on a virtual loop, simulated devices, actors and checkers."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import actors, engine, reactions
from .calls import Call
from .checkers import Checkers, Violation
from .devices import SimDevice
from .history import History
from .loop import Spinning, VirtualLoop
from .plan import DiskPlan, Plan, SessionPlan, draw
from .requests import ClientRequest, GuestRead, GuestRequest
from .room import SimRoom, SimTempInRoom
from .waits import WaitChecker
from .watch import FleeceWatch


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    kind: str
    violation: str | None
    met: Counter[str]
    steps: int
    virtual_s: float
    trace: list[str]


@dataclass(eq=False)
class SimDisk:
    """A disk of the engine, its device, and what the checkers remember of both."""

    plan: DiskPlan
    device: SimDevice
    engine_disk: Any
    history: History
    loop: VirtualLoop
    fleeces_seen: list[Any] = field(default_factory=list)
    watches: list[FleeceWatch] = field(default_factory=list)
    pending: list[GuestRequest] = field(default_factory=list)
    reads_seen: list[GuestRead] = field(default_factory=list)
    holds: int = 0
    """Armings that hold this disk's guests now."""
    counted: set[asyncio.Task[Any]] = field(default_factory=set)
    """Active writes that the engine had started, and so waits for, when the guests were held."""
    held_since: float = 0.0
    held_before_s: float = 0.0

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def size(self) -> int:
        return self.plan.size

    def hold(self) -> None:
        if not self.holds:
            self.held_since = self.loop.time()
            self.counted = set(self.engine_disk._active_calls)
        self.holds += 1

    def release_hold(self) -> None:
        self.holds -= 1
        if not self.holds:
            self.held_before_s = self.held_s(ended=True)
            self.counted = set()

    def may_change(self) -> bool:
        """Whether the task that runs may call the device to change it.

        The engine counts an active write in the step that starts it; its call begins when the
        task made for it has its turn. A hold that comes in between does not hold that one.
        """
        return not self.holds or asyncio.current_task(self.loop) in self.counted

    def held_s(self, *, ended: bool = False) -> float:
        """Seconds of virtual time in which an arming held this disk's guests."""
        if self.holds or ended:
            return self.held_before_s + self.loop.time() - self.held_since
        return self.held_before_s


class World:
    """Everything of one run. Nothing here outlives it."""

    def __init__(self, plan: Plan, under_test: engine.Engine, *, tracing: bool = False) -> None:
        self.plan = plan
        self.engine = under_test
        self.tracing = tracing
        self.rng = random.Random(f"world {plan.seed}")
        self.loop = VirtualLoop(random.Random(f"loop {plan.seed}"))
        self.trace: list[str] = []
        self.found: str | None = None
        self.checkers = Checkers(self)
        self.met = self.checkers.met
        self.devices: list[SimDevice] = []
        self.plan_of_temp: dict[SimDevice, SessionPlan] = {}
        self.clients_pending: list[ClientRequest] = []
        self.armings_pending: list[SessionPlan] = []
        self.reactions_left = plan.reactions_max
        self.room = None if plan.room is None else SimRoom(self, plan.room)
        self._ticks = itertools.count(1)
        self._names: Counter[str] = Counter()
        self.disks = [self._make_disk(disk) for disk in plan.disks]
        self.disk_of = {disk.device: disk for disk in self.disks}
        self.loop.after_step = self._after_step
        self.loop.on_quiet = WaitChecker(self).on_quiet

    def _make_disk(self, plan: DiskPlan) -> SimDisk:
        device = SimDevice(
            self.loop,
            random.Random(f"device {self.plan.seed} {plan.name}"),
            self.checkers,
            plan.name,
            plan.size,
            plan.profile,
            content=plan.content,
        )
        self.devices.append(device)
        return SimDisk(
            plan, device, self.engine.disk(plan.name, device), History(plan.content), self.loop
        )

    def make_temp(self, plan: SessionPlan, engine_disk: Any, cluster_size: int) -> SimDevice:
        """An empty temp image, as large as the disk rounded up to whole clusters."""
        name = f"temp {engine_disk.name}@{plan.name}"
        kind = SimDevice if self.room is None else partial(SimTempInRoom, filesystem=self.room)
        temp: SimDevice = kind(
            self.loop,
            random.Random(f"device {self.plan.seed} {name}"),
            self.checkers,
            name,
            -(-engine_disk.size // cluster_size) * cluster_size,
            plan.temp_profile,
            is_temp=True,
        )
        self.devices.append(temp)
        self.plan_of_temp[temp] = plan
        return temp

    def arm(
        self,
        plan: SessionPlan,
        disks: list[SimDisk],
        make_temp: Callable[..., Awaitable[Any]],
        **more: Any,
    ) -> Awaitable[Any]:
        limit = plan.temp_limit_clusters
        options = self.engine.session_options(
            on_cbw_error=plan.on_cbw_error,
            cbw_timeout_s=plan.cbw_timeout_s,
            temp_limit=None if limit is None else limit * plan.cluster_size,
            temp_reserve=plan.reserve_clusters * plan.cluster_size,
            cluster_size=plan.cluster_size,
        )
        session: Awaitable[Any] = self.engine.arm(
            plan.name,
            [disk.engine_disk for disk in disks],
            options,
            make_temp,
            clock=self.loop.time,
            deadline_s=plan.deadline_s,
            session_id=f"id of {plan.name}",
            **more,
        )
        return session

    # what actors and checkers use

    def tick(self) -> int:
        """The next moment: grows with every event, where virtual time may stand still."""
        return next(self._ticks)

    def tries_now(self) -> bool:
        return self.rng.random() < self.plan.now_chance

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self._names[name] += 1
        task = self.loop.create_task(coro, name=f"{name} #{self._names[name]}")
        task.add_done_callback(self._actor_ended)
        return task

    def _actor_ended(self, task: asyncio.Task[Any]) -> None:
        failure = task.exception() if not task.cancelled() else None
        if failure is not None and self.found is None:
            self.found = f"X: {task.get_name()} raised {failure!r}"

    def react(self, device: SimDevice, call: Call) -> None:
        """A call began: perhaps somebody does something about its range while it lasts."""
        chance = self.plan.reacts
        if call.fails and chance:
            # Somebody who gives up on what is about to fail: rare, and worth meeting often.
            chance = 0.9
        if self.reactions_left and self.rng.random() < chance:
            reactions.react(self, device, call)

    def log(self, text: str) -> None:
        if self.tracing:
            self.trace.append(f"{self.loop.time() * 1000:11.3f} ms  {text}")

    def stop_with(self, text: str) -> None:
        """A checker found something: the first finding counts, and the run ends."""
        if self.found is None:
            self.found = text
            self.log(f"VIOLATION {text}")
        raise Violation(text)

    # the run

    def _after_step(self) -> None:
        if self.found is not None:
            raise Violation(self.found)
        if self.loop.failures:
            self.stop_with(f"X: a callback failed: {self.loop.failures[0]!r}")
        self.checkers.after_step()

    def run(self) -> Outcome:
        for disk in self.disks:
            for number in range(disk.plan.guests):
                self.spawn(
                    actors.guest(self, disk, disk.plan, number), f"guest {disk.name} {number}"
                )
            if disk.plan.guests:
                mapper = actors.guest_mapper(self, disk, disk.plan)
                self.spawn(mapper, f"guest mapper {disk.name}")
        if self.room is not None:
            self.spawn(self.room.use(), "others")
        for session in self.plan.sessions:
            self.spawn(actors.controller(self, session), f"controller {session.name}")
        try:
            with self.engine.with_limits(self.plan.limits):
                self.loop.run_until_idle()
            self.checkers.at_end()
            self._check_tasks_at_end()
        except Violation as violation:
            self.found = self.found or str(violation)
        except Spinning as spinning:
            self.found = f"L: {spinning}"
        self.loop.cancel_everything()
        return Outcome(
            self.plan.seed,
            self.plan.kind,
            self.found,
            self.met,
            self.loop.steps,
            self.loop.time(),
            self.trace,
        )

    def _check_tasks_at_end(self) -> None:
        """Without a call that hangs for ever, every task has come to its end."""
        if any(device.calls for device in self.devices):
            return
        if any(not task.done() for task in self.loop.tasks):
            self.stop_with(f"L: tasks are left over: {self.loop.who_waits()}")


def run(seed: int, under_test: engine.Engine | None = None, *, tracing: bool = False) -> Outcome:
    """Run one seed. A pure function of the seed and the engine."""
    return World(draw(seed), under_test or engine.real(), tracing=tracing).run()
