"""Checkers in orders of events that seeds meet seldom: nothing reported falsely, nothing missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import engine, mutations
from .calls import Call, Profile
from .devices import SimDevice
from .plan import DiskPlan, Plan, SessionPlan
from .planted import PLANTED
from .requests import guest_change
from .world import World

CLUSTER = 4096
IGNORES_THE_HOLD = mutations.load(
    next(
        bug
        for bug in PLANTED
        if bug.name == "a guest write in more than one step ignores an arming's hold"
    )
)
SESSION = SessionPlan(
    name="s",
    disks=(0,),
    arms_at_s=0.0,
    lives_s=None,
    finish_failed=False,
    on_cbw_error="break-snapshot",
    cbw_timeout_s=20.0,
    temp_limit_clusters=None,
    cluster_size=CLUSTER,
    temp_profile=Profile(),
    make_temp_fails=False,
    deadline_s=5.0,
    pulls=0,
    pull_trims=0.0,
    trimmers=0,
    mappers=0,
    vanish_chance=0.0,
)


class OneDisk(World):
    """A world in which only those act whom the test lets act, in the order in which it does."""

    def __init__(self, under_test: engine.Engine) -> None:
        disk = DiskPlan("vda", 4 * CLUSTER, CLUSTER, b"a" * 4 * CLUSTER, Profile(), 0, 0, 0, 0, 0)
        super().__init__(Plan(0, "calm", 0.0, (disk,), (), {}, 0.0, 0), under_test)
        self.at_hold: list[tuple[int, int]] = []
        """Of each arming: (active writes that are counted, device calls in flight) at its hold."""

    def write(self, cluster: int) -> None:
        """A guest's write of one cluster, in a task of its own."""
        change = guest_change(
            self, self.disks[0], "write", cluster * CLUSTER, CLUSTER, b"b" * CLUSTER
        )
        self.spawn(change, "guest")

    def begin(self) -> None:
        """A session is armed, in a task of its own; the first step of it holds the guests."""
        self.spawn(self._arm(), "controller")

    async def _arm(self) -> None:
        disk = self.disks[0]

        async def make_temp(engine_disk: object, cluster_size: int, session_id: str) -> SimDevice:
            disk.hold()
            self.at_hold.append((disk.engine_disk.active_writes, len(disk.device.calls)))
            return self.make_temp(SESSION, engine_disk, cluster_size)

        try:
            await self.arm(SESSION, [disk], make_temp)
        finally:
            disk.release_hold()
        self.checkers.after_step()


def counted_but_not_begun(world: OneDisk) -> None:
    """The hold comes between the step that counts a write and the one that begins its call."""
    world.write(0)
    world.begin()
    world.write(1)


def ended_but_still_counted(world: OneDisk) -> None:
    """The hold comes between the end of a write's call and the step that counts it no more."""
    watch_end = world.checkers.call_ended

    def call_ended(device: SimDevice, call: Call) -> None:
        watch_end(device, call)
        world.checkers.call_ended = watch_end  # type: ignore[method-assign]
        world.begin()
        world.write(1)

    world.checkers.call_ended = call_ended  # type: ignore[method-assign]
    world.write(0)


MOMENTS = [counted_but_not_begun, ended_but_still_counted]
"""At the hold of both, one write is counted, and no call is in flight."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_write_that_arming_waits_for_may_begin_under_its_hold(
    moment: Callable[[OneDisk], None],
) -> None:
    world = OneDisk(engine.real())
    moment(world)
    outcome = world.run()
    assert outcome.violation is None
    assert world.at_hold == [(1, 0)]
    assert outcome.met["fleeces armed"] == 1
    assert world.disks[0].device.content == b"b" * 2 * CLUSTER + b"a" * 2 * CLUSTER


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_write_that_came_under_the_hold_may_not_begin_under_it(
    moment: Callable[[OneDisk], None],
) -> None:
    world = OneDisk(IGNORES_THE_HOLD)
    moment(world)
    outcome = world.run()
    assert world.at_hold == [(1, 0)]
    assert outcome.violation == "T0: write 4096+4096 of vda began while an arming holds guests"
