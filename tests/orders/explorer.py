"""Every order of a scenario's events, depth first, by replaying lists of choices.

A coroutine cannot be copied, so the way back to a fork is to run once more from the beginning with
the same choices up to there. Runs end early (``prune``) where they come to a state that another run
has been in: what can follow it is, or will be, explored from there. How many orders there are is
counted on the graph of states, without going through each of them.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from dataclasses import dataclass, field

from tests.simulation import engine

from .choices import Choices, following
from .key import key_of
from .scenario import Scenario
from .world import OrderWorld

END = -1
"""The end of a run, where a state has it among what follows it."""
SECONDS_MAX = 120.0
"""Of one scenario."""
COLLECT_EVERY = 512
"""Runs between two collections of garbage."""


@dataclass
class Exploration:
    """What came of exploring a scenario."""

    scenario: Scenario
    states: int = 0
    transitions: int = 0
    runs: int = 0
    orders: int = 0
    """Ways from the beginning to an end."""
    depth_max: int = 0
    outcomes: set[tuple[object, ...]] = field(default_factory=set)
    complete: bool = False
    """Everything was explored: no limit, no violation."""
    violation: str | None = None
    choices: list[int] = field(default_factory=list)
    """The run that violates."""
    spent_s: float = 0.0


class _Graph:
    """States met, and what follows each of them."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self.following: list[list[int]] = []

    def number(self, key: bytes) -> tuple[int, bool]:
        """(the state's number, whether it is new)."""
        number = self._numbers.get(key)
        if number is not None:
            return number, False
        self._numbers[key] = len(self.following)
        self.following.append([])
        return len(self.following) - 1, True

    def orders(self) -> int:
        """Ways from the first state to an end."""
        ways: dict[int, int] = {END: 1}
        stack = [0]
        while stack:
            node = stack[-1]
            todo = [n for n in self.following[node] if n not in ways] if node not in ways else []
            if todo:
                assert len(stack) < 100_000, "an order of events goes round in circles"
                stack += todo
                continue
            ways.setdefault(node, sum(ways[n] for n in self.following[node]))
            stack.pop()
        return ways[0]


class _Explorer:
    def __init__(self, scenario: Scenario, under_test: engine.Engine, *, prune: bool) -> None:
        self.scenario = scenario
        self.engine = under_test
        self.prune = prune
        self.graph = _Graph()
        self.result = Exploration(scenario)
        self._given: list[int] = []
        self._counts: list[int] = []
        self._nodes: list[int] = []
        """For each choice of the last run, the state in which it was made, or the last before."""
        self._node: int | None = None
        self._choices = Choices()

    def run(self) -> OrderWorld:
        """One run with the choices given; what it met goes into the graph."""
        choices = self._choices = Choices(self._given, self._counts)
        self._node = self._nodes[len(self._given) - 1] if self._given else None
        del self._nodes[len(self._given) :]
        world = OrderWorld(self.scenario, self.engine, choices)
        result = self.result
        result.runs += 1
        if world.run_order(self._at_choice):
            if world.found is None:
                result.outcomes.add(outcome(world))
            if self._node is not None:
                self._follow(END)
        self._mark()
        result.depth_max = max(result.depth_max, len(choices.taken))
        return world

    def _mark(self) -> None:
        """Choices made since the last state belong to it."""
        missing = len(self._choices.taken) - len(self._nodes)
        self._nodes += [-1 if self._node is None else self._node] * missing

    def _follow(self, node: int) -> None:
        assert self._node is not None
        self.graph.following[self._node].append(node)

    def _at_choice(self, world: OrderWorld) -> bool:
        self._mark()
        number, new = self.graph.number(key_of(world))
        if self._node is not None:
            self._follow(number)
        self._node = number
        return new or not self.prune

    def advance(self) -> bool:
        """On to the next list of choices; False after the last one."""
        choices = self._choices
        following_choices = following(choices.taken, choices.counts)
        if following_choices is None:
            return False
        self._given = following_choices
        self._counts = choices.counts[: len(following_choices)]
        return True


def explore(
    scenario: Scenario,
    under_test: engine.Engine | None = None,
    *,
    prune: bool = True,
    states_max: int | None = None,
    seconds_max: float = SECONDS_MAX,
) -> Exploration:
    """Explore a scenario until everything was seen, a checker finds something, or a limit."""
    explorer = _Explorer(scenario, under_test or engine.real(), prune=prune)
    result = explorer.result
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while True:
            world = explorer.run()
            if world.found is not None:
                result.violation = world.found
                result.choices = world.choices.taken
                break
            if not explorer.advance():
                result.complete = True
                break
            result.states = len(explorer.graph.following)
            if states_max is not None and result.states >= states_max:
                break
            if time.perf_counter() - began > seconds_max:
                break
            if result.runs % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    result.states = len(explorer.graph.following)
    result.transitions = sum(map(len, explorer.graph.following))
    result.spent_s = time.perf_counter() - began
    if result.complete:
        if not result.states:
            result.orders = result.runs
        else:
            result.orders = explorer.graph.orders() if prune else result.runs
    return result


def outcome(world: OrderWorld) -> tuple[object, ...]:
    """What a run came to, as guests, clients and the disks see it."""
    return (
        tuple((actor.name, tuple(actor.answers)) for actor in world.actors),
        tuple(hash(bytes(device.content)) for device in world.devices),
        tuple(
            (w.name, w.fleece.broken, w.fleece.finished, w.fleece.access.bits.tobytes(),
             w.fleece.done.bits.tobytes(), w.fleece.copy.bits.tobytes())
            for w in world.checkers.watches
        ),
    )  # fmt: skip


def shortest(
    scenario: Scenario, under_test: engine.Engine | None = None, *, states_max: int = 200_000
) -> Exploration:
    """Breadth first, for a violation with the fewest choices: the trace to read."""
    under_test = under_test or engine.real()
    result = Exploration(scenario)
    seen: set[bytes] = set()
    queue: deque[list[int]] = deque([[]])
    began = time.perf_counter()
    while queue and len(seen) < states_max:
        given = queue.popleft()
        fork: list[int] = []

        def at_choice(world: OrderWorld, fork: list[int] = fork) -> bool:
            key = key_of(world)
            if key not in seen:
                seen.add(key)
                fork.append(len(world.events()))
            return False

        choices = Choices(given)
        world = OrderWorld(scenario, under_test, choices)
        ended = world.run_order(at_choice)
        result.runs += 1
        if ended and world.found is not None:
            result.violation, result.choices = world.found, choices.taken
            break
        for position in range(len(given), len(choices.taken)):
            # Choices inside of an event: each way of theirs is a way of its own.
            queue.extend(
                [*choices.taken[:position], way] for way in range(1, choices.counts[position])
            )
        if fork:
            queue.extend([*choices.taken, way] for way in range(fork[0]))
    result.states = len(seen)
    result.spent_s = time.perf_counter() - began
    return result


def replay(
    scenario: Scenario, choices: list[int], under_test: engine.Engine | None = None
) -> tuple[list[str], str | None]:
    """The trace of one run, event by event, and what a checker found."""
    world = OrderWorld(scenario, under_test or engine.real(), Choices(choices), tracing=True)
    world.run_order(lambda _: True)
    return world.trace, world.found
