"""Actors, and what each of their steps is: a request, an arming.

Requests are the simulation's, with the checks of their own replies (tests/simulation/requests.py).
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

from tests.simulation import requests
from tests.simulation.calls import REQUEST
from tests.simulation.plan import SessionPlan

from .devices import OrderDevice
from .scenario import CLUSTER, Step

if TYPE_CHECKING:
    from .world import OrderWorld


class Actor:
    """How far somebody has come in their list of steps."""

    def __init__(self, name: str, steps: tuple[Step, ...]) -> None:
        self.name = name
        self.steps = steps
        self.made = 0
        self.task: asyncio.Task[Any] | None = None
        self.answers: list[object] = []

    @property
    def busy(self) -> bool:
        return self.task is not None and not self.task.done()


def may_begin(world: OrderWorld, actor: Actor) -> bool:
    """Can the actor's next step begin now?"""
    if actor.busy or actor.made == len(actor.steps):
        return False
    step = actor.steps[actor.made]
    if step.kind == "cancel":
        return any(other.name == step.of and other.busy for other in world.actors)
    if step.kind == "finish":
        return step.of in world.sessions
    if step.kind in ("read", "status", "release", "sent"):
        return world.watch(step) is not None
    return True


async def make(world: OrderWorld, actor: Actor, step: Step) -> None:
    """The actor makes the step, to its end."""
    try:
        actor.answers.append(await _request(world, actor, step))
    except asyncio.CancelledError:
        # The guest that sent it is gone: its request waits for nobody's sake any more.
        for disk in world.disks:
            disk.pending[:] = [r for r in disk.pending if r is not REQUEST.get()]
        raise


async def _request(world: OrderWorld, actor: Actor, step: Step) -> object:
    offset, length = int(step.first * CLUSTER), int(step.count * CLUSTER)
    if step.kind == "arm":
        return await _arm(world, step.of)
    if step.kind == "pause":
        return await asyncio.sleep(step.first)
    disk = next(disk for disk in world.disks if disk.name == step.disk)
    length = min(length, disk.size - offset)
    if step.kind in ("write", "zero", "discard"):
        kind = "trim" if step.kind == "discard" else step.kind
        world.rng.fast = step.fast
        data = bytes([_fill(world, actor)]) * length if kind == "write" else None
        await requests.guest_change(world, disk, kind, offset, length, data)
        return REQUEST.get().failed  # type: ignore[union-attr]
    if step.kind == "look":
        return await requests.guest_read(world, disk, offset, length)
    if step.kind == "survey":
        return await requests.guest_status(world, disk, offset, length)
    watch = world.watch(step)
    assert watch is not None
    if step.kind == "read":
        return await requests.client_read(world, watch, offset, length) is not None
    if step.kind == "status":
        return await requests.client_status(world, watch, offset, length)
    if step.kind == "sent":
        return actor.answers[-1] and requests.reply_left(world, watch, offset, length)
    assert step.kind == "release", f"no such step: {step.kind}"
    return await requests.client_trim(world, watch, offset, length)


def _fill(world: OrderWorld, actor: Actor) -> int:
    return 0x80 + 8 * world.actors.index(actor) + actor.made if actor in world.actors else 0x7F


async def _arm(world: OrderWorld, name: str) -> bool:
    plan = world.plans[name]
    disks = [world.disks[index] for index in plan.disks]
    temps: list[OrderDevice] = []

    async def make_temp(engine_disk: Any, cluster_size: int, session_id: str) -> OrderDevice:
        temps.append(world.make_temp(plan, engine_disk, cluster_size))
        if len(temps) == len(disks):
            # In this very step the engine begins to hold the guests.
            world.armings_pending.append(plan)
            for disk in disks:
                disk.hold()
        return temps[-1]

    began = world.loop.time()
    try:
        world.sessions[name] = await world.arm(plan, disks, make_temp)
    except OSError as error:
        _check_arming_failed(world, plan, temps, error, world.loop.time() - began)
        return False
    finally:
        world.armings_pending.remove(plan)
        for disk in disks:
            disk.release_hold()
    world.checkers.after_step()
    return True


def _check_arming_failed(
    world: OrderWorld, plan: SessionPlan, temps: list[OrderDevice], error: OSError, spent_s: float
) -> None:
    world.log(f"arming {plan.name} failed: {error}")
    if error.errno != errno.ETIMEDOUT or spent_s < plan.deadline_s:
        world.stop_with(f"X: arming {plan.name} failed without a cause: {error}")
    if any(not temp.closed for temp in temps):
        world.stop_with(f"S: arming {plan.name} failed and left a temp image open")
    if any(fleece.temp in temps for disk in world.disks for fleece in disk.engine_disk.fleeces):
        world.stop_with(f"B: arming {plan.name} failed and left a fleece installed")
