"""Planted bugs against every order: which scenario catches each, after how many states.

The bugs are those of the simulation (tests/simulation/planted.py) but for those of room.py, which
are about seconds and bytes, and not about orders; wrong readings of the rules that
were once tried on an executable model of them, and some that need an order of events so particular
that seeds seldom meet it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.simulation import engine, mutations
from tests.simulation.planted import PLANTED, ROOM, PlantedBug

from .explorer import explore
from .scenario import Scenario
from .scenarios import SCENARIOS

STATES_MAX = 20_000
"""States of one scenario within which a bug must be caught."""
BUDGETS = (150, 2_000)
"""States at first: many scenarios a little, before one of them thoroughly."""

ORDERS_ONLY = (
    PlantedBug(
        "a cancelled guest write is no longer in flight",
        "disk",
        (
            (
                "        await asyncio.shield(task)\n",
                "        try:\n"
                "            await asyncio.shield(task)\n"
                "        except asyncio.CancelledError:\n"
                "            task.remove_done_callback(self._active_ended)\n"
                "            self._active_ended(task)\n"
                "            raise\n",
            ),
        ),
    ),
    PlantedBug(
        "block status looks at access again after each window, not after the last",
        "snapshot_access",
        (
            (
                "        extents = await windowed_status("
                "self._window_status, offset, length, one=one)\n"
                "        if self._state.dead:\n            raise self._state.death()\n"
                "        return self._unreadable_as_data(offset, extents)\n",
                "        async def window(start: int, run: int) -> list[Extent]:\n"
                "            return self._unreadable_as_data("
                "start, await self._window_status(start, run))\n\n"
                "        return await windowed_status(window, offset, length, one=one)\n",
            ),
        ),
    ),
    PlantedBug(
        "block status does not look at the session's end after its last turn",
        "snapshot_access",
        (
            (
                "        if self._state.dead:\n            raise self._state.death()\n"
                "        return self._unreadable",
                "        return self._unreadable",
            ),
        ),
    ),
    PlantedBug(
        "block status freezes nothing in its second window",
        "snapshot_access",
        (
            (
                "request = state.frozen_reads.add(FrozenRead(first + low, first + high, "
                "asked[low:high]))",
                "asks = asked[low:high] if offset == 0 else asked[low:high] ^ asked[low:high]\n"
                "            request = state.frozen_reads.add("
                "FrozenRead(first + low, first + high, asks))",
            ),
        ),
    ),
    PlantedBug(
        "block status that has lost a part holds up nobody",
        "state",
        (("& access[low:high]).any()", "& access[low:high]).all()"),),
    ),
    PlantedBug(
        "arming looks for active writes once",
        "session",
        (
            (
                "    while busy := [disk for disk in disks if disk.active_writes]:\n",
                "    if busy := [disk for disk in disks[:1] if disk.active_writes]:\n",
            ),
        ),
    ),
    PlantedBug(
        "an active write counts only once its call begins",
        "disk",
        (
            (
                "        task = asyncio.get_running_loop().create_task("
                'call, name=f"active write to {self.name}")\n'
                "        self.active_writes += 1\n",
                "        async def counted() -> None:\n"
                "            self.active_writes += 1\n"
                "            await call\n\n"
                "        task = asyncio.get_running_loop().create_task("
                'counted(), name=f"active write to {self.name}")\n',
            ),
        ),
    ),
    PlantedBug(
        "holds do not count",
        "disk",
        (("        self._holds -= 1\n", "        self._holds = 0\n"),),
    ),
    PlantedBug(
        "arming that failed keeps its hold",
        "session",
        (
            ("                let_go.callback(disk.release_hold)\n", ""),
            (
                "        session.pause_s = loop.time() - started\n",
                "        for disk in disks:\n            disk.release_hold()\n"
                "        session.pause_s = loop.time() - started\n",
            ),
        ),
    ),
    PlantedBug(
        "the end of a copy starts no queued copy",
        "block_copy",
        (
            (
                "        self._tasks.discard(task)\n        self._start_queued()\n",
                "        self._tasks.discard(task)\n",
            ),
        ),
    ),
    PlantedBug(
        "a failed punch counts as freed",
        "block_copy",
        (
            (
                "        except OSError as error:\n            request.error = OSError(",
                "        except OSError as error:\n"
                "            state.uncharge(first, end)\n            request.error = OSError(",
            ),
        ),
    ),
    PlantedBug(
        "TRIM does its work in the client's own task",
        "block_copy",
        (
            (
                "        while not request.ended and not state.dead:\n"
                "            await state.trims.wait(first, end)\n",
                "        try:\n"
                "            while not request.ended and not state.dead:\n"
                "                await state.trims.wait(first, end)\n"
                "        except asyncio.CancelledError:\n"
                "            task.cancel()\n"
                "            raise\n",
            ),
        ),
    ),
    PlantedBug(
        "a copy in one step ignores that it could not write",
        "block_copy",
        (
            (
                "                        if not state.target.pwrite_now(offset, data):\n"
                "                            return False\n",
                "                        state.target.pwrite_now(offset, data)\n",
            ),
        ),
    ),
    PlantedBug(
        "a guest write goes through its fleeces only until the first is ready",
        "disk",
        (
            (
                "            for done in asyncio.as_completed(tasks):\n"
                "                await done\n",
                "            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)\n",
            ),
        ),
    ),
)

FROM_THE_MODEL = (
    PlantedBug(
        "a guest's timer starts anew when the copy has ended",
        "copy_before_write",
        (
            (
                "            while not state.dead and state.frozen(first, end):\n",
                "            if deadline is not None:\n"
                "                deadline = loop.time() + state.cbw_timeout_s\n"
                "            while not state.dead and state.frozen(first, end):\n",
            ),
        ),
    ),
    PlantedBug(
        "a timeout forgets the copy and makes its clusters dirty again",
        "copy_before_write",
        (
            (
                "state.stats.timeouts += 1",
                "state.stats.timeouts += 1\n"
                "        for copy in list(state.copies):\n"
                "            if not state.temp_writes.overlapping(copy.first, copy.end):\n"
                "                live = state.access.bits[copy.first : copy.end]\n"
                "                state.copy.bits[copy.first : copy.end] |= live\n"
                "                state.copies.remove(copy)",
            ),
        ),
    ),
    PlantedBug(
        "TRIM waits for the temp writes of copies in flight only",
        "block_copy",
        (
            (
                "            *state.temp_writes.overlapping(first, end),\n",
                "            *[w for w in state.temp_writes.overlapping(first, end)"
                " if any(c.first <= w.first and not c.lost for c in state.copies)],\n",
            ),
        ),
    ),
    PlantedBug(
        "temp_limit counts copies, and gives back what failed or was cancelled",
        "block_copy",
        (
            (
                "        state.guests.wake(copy.first, copy.end)\n\n    # -- release",
                "        if error is not None or copy.lost:\n"
                "            state.uncharge(copy.first, copy.end)\n"
                "        state.guests.wake(copy.first, copy.end)\n\n    # -- release",
            ),
        ),
    ),
    PlantedBug(
        "a finish does not wake the guests",
        "state",
        (
            (
                "        self.dead = True\n        self.release(0, self.clusters)\n"
                "        self.guests.wake_all()\n",
                "        self.dead = True\n"
                "        if self.finished:\n"
                "            for bitmap in (self.access, self.copy, self.done):\n"
                "                bitmap.bits.setall(0)\n"
                "        else:\n"
                "            self.release(0, self.clusters)\n"
                "            self.guests.wake_all()\n",
            ),
        ),
    ),
)

BUGS = (*(bug for bug in PLANTED if bug not in ROOM), *FROM_THE_MODEL, *ORDERS_ONLY)


@dataclass(frozen=True)
class Catch:
    """How a planted bug fared."""

    bug: PlantedBug
    scenario: Scenario | None
    """The one that caught it; None: it was not caught."""
    states: int
    """Of that scenario, until it was caught; of all, when it was not."""
    violation: str | None
    choices: tuple[int, ...] = ()


def planted(name: str) -> engine.Engine:
    """The engine with a bug in it; a part of its name will do. ValueError unless it is one."""
    matching = [bug for bug in BUGS if bug.name == name]
    matching = matching or [bug for bug in BUGS if name in bug.name]
    if len(matching) != 1:
        names = "\n  ".join(bug.name for bug in matching or BUGS)
        raise ValueError(
            f"{name!r} names {len(matching)} planted bugs, not one; there are\n  {names}"
        )
    return mutations.load(matching[0])


def hunt(
    bug: PlantedBug,
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
    states_max: int = STATES_MAX,
) -> Catch:
    """Explore scenarios with the bug in the engine until a checker catches it."""
    mutant = mutations.load(bug)
    spent = 0
    finished: set[str] = set()
    coarse = [replace(scenario, every_step=False) for scenario in scenarios]
    fine = [replace(scenario, every_step=True) for scenario in scenarios]
    for budget in (*BUDGETS, states_max):
        for scenario in (*coarse, *fine):
            identity = f"{scenario.name} {scenario.every_step}"
            if identity in finished:
                continue
            result = explore(scenario, mutant, states_max=budget)
            if result.violation is not None:
                choices = tuple(result.choices)
                return Catch(bug, scenario, result.states, result.violation, choices)
            if result.complete:
                finished.add(identity)
                spent += result.states
    return Catch(bug, None, spent, None)


def table(states_max: int) -> int:
    """Hunt every planted bug; print the table of docs/testing.md."""
    missed = 0
    print("| planted bug | in | checker | scenario | after states |")
    print("| --- | --- | --- | --- | --- |")
    for bug in BUGS:
        catch = hunt(bug, states_max=states_max)
        if catch.scenario is None or catch.violation is None:
            missed += 1
            print(f"| {bug.name} | {bug.module} | **nothing** | - | {catch.states:,} |", flush=True)
            continue
        letter = catch.violation.split(":")[0]
        steps = ", every step" if catch.scenario.every_step else ""
        where = f"`{catch.scenario.name}`{steps}"
        print(f"| {bug.name} | {bug.module} | {letter} | {where} | {catch.states:,} |", flush=True)
    return 1 if missed else 0
