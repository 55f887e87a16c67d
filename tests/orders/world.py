"""One run of a scenario: the real engine, simulated devices and checkers, and a list of choices.

Between two callbacks of the loop, one of these comes, whichever the run chooses:

    run     the callback that has been ready for longest
    piece   a device call lands its next piece                 (only when nobody is ready: a piece
                                                               that does not end its call is seen
                                                               by nobody before)
    end     a device call lands its last piece and ends, or fails and leaves garbage
    time    passes until the next timer                        (only when nobody is ready)
    timer   a timer that is due fires; what comes from outside may come before it
    begin   an actor makes its next step

A real loop has the same freedom: whatever comes from outside is queued behind what was ready when
it came, and before what becomes ready later.
"""

from __future__ import annotations

from asyncio import events
from collections.abc import Callable
from typing import Any

from tests.simulation import engine
from tests.simulation.calls import Call, Profile
from tests.simulation.checkers import Checkers, Violation
from tests.simulation.history import History
from tests.simulation.loop import Spinning
from tests.simulation.plan import DiskPlan, SessionPlan
from tests.simulation.waits import WaitChecker
from tests.simulation.watch import FleeceWatch
from tests.simulation.world import SimDisk, World

from .actors import Actor, make, may_begin
from .choices import Choices
from .devices import ACTOR, OrderDevice
from .loop import OrderLoop
from .scenario import ALWAYS, CLUSTER, EITHER, Scenario, Session, Step

STEPS_MAX = 5_000
"""Events of one run; more means that somebody is spinning."""

Event = tuple[str, Callable[[], None]]
"""(what it is, what it does)."""
Observer = Callable[["OrderWorld"], bool]
"""Called wherever there is a choice between events; False ends the run here."""


class _Middle:
    """Stands for the random numbers of a request's details: never the rare case."""

    def __init__(self) -> None:
        self.fast = False

    def random(self) -> float:
        return 0.1 if self.fast else 0.5


class OrderWorld(World):
    """What a World is to checkers and requests, with choices where that one has a seed."""

    def __init__(
        self,
        scenario: Scenario,
        under_test: engine.Engine,
        choices: Choices,
        *,
        tracing: bool = False,
    ) -> None:
        # Not World's own: that one draws a plan from a seed.
        self.scenario = scenario
        self.engine = under_test
        self.choices = choices
        self.tracing = tracing
        self.trace: list[str] = []
        self.found: str | None = None
        self.failures_left = scenario.failures
        self.loop = OrderLoop()
        self.rng = _Middle()
        self.checkers = Checkers(self)
        self.met = self.checkers.met
        self.devices: list[OrderDevice] = []
        self.plan_of_temp = {}
        self.clients_pending = []
        self.armings_pending = []
        self.sessions: dict[str, Any] = {}
        self.plans = {session.name: self._plan(session) for session in scenario.sessions}
        self._moment = 0
        self._preparing = True
        self._waits = WaitChecker(self)
        self.disks = [self._make_disk(number) for number in range(len(scenario.disks))]
        self.disk_of = {disk.device: disk for disk in self.disks}
        self.actors = [Actor(name, steps) for name, steps in scenario.actors.items()]

    # the world's parts

    def _make_disk(self, number: int) -> SimDisk:  # type: ignore[override]
        scenario = self.scenario
        name = scenario.disks[number]
        size = int(scenario.clusters * CLUSTER)
        content = bytearray(size)
        half = CLUSTER // 2
        for offset in range(0, size, half):
            if offset // CLUSTER not in scenario.zeroes:
                end = min(size, offset + half)
                content[offset:end] = bytes([0x40 + number * 16 + offset // half]) * (end - offset)
        device = OrderDevice(self, name, size, content=bytes(content))
        self.devices.append(device)
        plan = DiskPlan(name, size, CLUSTER, bytes(content), Profile(), 0, 0, 0, 0.0, 0.0)
        disk = self.engine.disk(name, device)
        return SimDisk(plan, device, disk, History(bytes(content)), self.loop)

    def _plan(self, session: Session) -> SessionPlan:
        return SessionPlan(
            name=session.name,
            disks=tuple(self.scenario.disks.index(disk) for disk in session.disks),
            arms_at_s=0.0,
            lives_s=None,
            finish_failed=False,
            on_cbw_error=session.policy,
            cbw_timeout_s=session.timeout_s,
            temp_limit_clusters=session.limit,
            cluster_size=CLUSTER,
            temp_profile=Profile(),
            make_temp_fails=False,
            deadline_s=session.deadline_s,
            pulls=0,
            pull_trims=0.0,
            trimmers=0,
            mappers=0,
            vanish_chance=0.0,
        )

    def make_temp(self, plan: SessionPlan, engine_disk: Any, cluster_size: int) -> OrderDevice:  # type: ignore[override]
        size = -(-engine_disk.size // cluster_size) * cluster_size
        temp = OrderDevice(self, f"temp {engine_disk.name}@{plan.name}", size, is_temp=True)
        self.devices.append(temp)
        self.plan_of_temp[temp] = plan
        return temp

    def watch(self, step: Step) -> FleeceWatch | None:
        """What the checkers know about the fleece that a step is for; None: not armed (yet)."""
        name = f"{step.disk}@{step.of}"
        return next((watch for watch in self.checkers.watches if watch.name == name), None)

    # what requests and checkers ask for

    def tick(self) -> int:
        self._moment += 1
        return self._moment

    def tries_now(self) -> bool:
        return self.scenario.now != "never"

    def answers_now(self, device: OrderDevice) -> bool:
        """Does the device answer a ``*_now`` at once?"""
        if self.scenario.now != EITHER or self._preparing:
            return self.scenario.now == ALWAYS
        answer = self.choices.choose(2) == 1
        self.log(f"    {device.name}: {'now' if answer else 'later'}")
        return answer

    def fails_now(self, device: OrderDevice) -> bool:
        """Does a call that the device answers at once fail?"""
        return not self._preparing and self.choices.choose(2) == 1

    def react(self, device: Any, call: Call) -> None:
        """Nobody reacts: actors act whenever they are chosen."""

    def log(self, text: str) -> None:
        if self.tracing:
            self.trace.append(text)

    # what may come next

    def events(self) -> list[Event]:
        """All that may come next; an order of events is a way through these lists."""
        loop = self.loop
        found: list[Event] = []
        ready = loop.ready()
        timer = loop.next_timer()
        due = timer is not None and timer.when() <= loop.time()
        quiet = not ready and not (due and self.scenario.every_step)
        if ready:
            found.append(("run", loop.run_next))
            if not self.scenario.every_step:
                return found
        for device in self.devices:
            for call in device.calls:
                advance = loop.completions.get(call)
                if advance is None:
                    continue
                if quiet or device.is_last(call):
                    found.append(("device", lambda c=call, a=advance: self._advance(c, a)))
                if device.can_fail(call):
                    found.append(("failure", lambda d=device, c=call: self._fail(d, c)))
        for actor in self.actors:
            if may_begin(self, actor):
                found.append(("begin", lambda a=actor: self._begin(a)))
        if due and self.scenario.every_step:
            found.append(("timer", loop.fire))
        elif timer is not None and quiet:
            found.append(("time", self._let_time_pass))
        return found

    def _advance(self, call: Call, advance: Callable[..., object]) -> None:
        del self.loop.completions[call]
        advance(call)

    def _fail(self, device: OrderDevice, call: Call) -> None:
        del self.loop.completions[call]
        device.fail(call)

    def _let_time_pass(self) -> None:
        self.loop.let_time_pass()
        self.log(f"time passes: {self.loop.time():g} s")
        if not self.scenario.every_step:
            self.loop.fire()

    def _begin(self, actor: Actor) -> None:
        step = actor.steps[actor.made]
        actor.made += 1
        self.log(f"{actor.name}: {step}")
        if step.kind == "finish":
            self.sessions[step.of].finish()
        elif step.kind == "cancel":
            other = next(other for other in self.actors if other.name == step.of)
            assert other.task is not None
            other.task.cancel()
        else:
            token = ACTOR.set(actor.name)
            actor.task = self.loop.start(make(self, actor, step), actor.name)
            ACTOR.reset(token)

    # the run

    def run_order(self, observer: Observer) -> bool:
        """Run to the end, or to where the observer ends it. True: it came to its end.

        What a checker found is in ``found`` then.
        """
        previous = events._get_running_loop()
        events._set_running_loop(self.loop)
        try:
            with self.engine.with_limits(self.scenario.limits):
                self._prepare()
                return self._run(observer)
        except Violation as violation:
            self.found = self.found or str(violation)
        except Spinning as spinning:
            self.found = f"L: {spinning}"
        finally:
            events._set_running_loop(previous)
            self.loop.cancel_everything()
        return True

    def _run(self, observer: Observer) -> bool:
        choices = self.choices
        while True:
            possible = self.events()
            if not possible:
                break
            if not choices.replaying:
                if self._is_quiet():
                    self._waits.on_quiet()
                if len(possible) > 1 and not observer(self):
                    return False
            possible[choices.choose(len(possible))][1]()
            self._after_event()
        self._waits.on_quiet()
        self.checkers.at_end()
        self._check_actors_at_end()
        return True

    def _is_quiet(self) -> bool:
        timer = self.loop.next_timer()
        return not self.loop.ready() and (timer is None or timer.when() > self.loop.time())

    def _prepare(self) -> None:
        """Arm the sessions, make the first steps, each to its end, in the order written."""
        for session in self.scenario.sessions:
            if session.armed:
                self._to_its_end(Actor("prepare", (Step("arm", of=session.name),)))
        for step in self.scenario.prepare:
            self._to_its_end(Actor("prepare", (step,)))
        self._preparing = False
        self.trace.clear()

    def _to_its_end(self, actor: Actor) -> None:
        self._begin(actor)
        while possible := [e for e in self.events() if e[0] in ("run", "device")]:
            possible[0][1]()
            self._after_event()
        assert not actor.busy, f"{actor.steps[0]} does not come to its end"

    def _after_event(self) -> None:
        if self.loop.steps > STEPS_MAX:
            raise Spinning(f"{STEPS_MAX} steps; waiting: {self.loop.who_waits()}")
        if self.found is not None:
            raise Violation(self.found)
        if self.loop.failures:
            self.stop_with(f"X: a callback failed: {self.loop.failures[0]!r}")
        self.checkers.after_step()
        for actor in self.actors:
            task = actor.task
            if task is not None and task.done() and not task.cancelled():
                failure = task.exception()
                if failure is not None:
                    raise Violation(f"X: {actor.name} failed: {failure!r}")

    def _check_actors_at_end(self) -> None:
        """Without a call that hangs for ever, everybody has come to their end."""
        if any(device.calls for device in self.devices):
            return
        if any(not task.done() for task in self.loop.tasks):
            self.stop_with(f"L: tasks are left over: {self.loop.who_waits()}")
