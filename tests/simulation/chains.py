"""``python -m tests.simulation.chains --seeds N``: chains of backups, over lives of a server.

Guests write; sessions with bitmaps come, in all modes, succeed, fail and break; the server is
killed at any point (kills.py), and what it left is taken up again. Checkers are those of the other
simulation, and checker C (chain_checker.py).
"""

from __future__ import annotations

import argparse
import errno
import itertools
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.arguments import positive

from . import actors, engine, plan
from .chain_checker import ChainChecker, Contents
from .checkers import Checkers, Violation
from .devices import SimDevice
from .history import History
from .kills import Image, Killer, falling, left_by
from .loop import Spinning
from .plan import DiskPlan, Plan, SessionPlan
from .sim_store import BitmapEntry, Disk, OwnEntry, SessionEntry, SimStore
from .watch import FleeceWatch
from .world import SimDisk, World

BITMAP = "chain"
LIVES_MAX = 4
EXPECTED = (errno.EBUSY, errno.ENOENT, errno.EINVAL, errno.ENOSPC, errno.ETIMEDOUT)
"""Why a session with a bitmap may not begin."""


class Killed(Exception):
    """The server is dead; nothing of it counts any more."""


@dataclass
class Left:
    """What a life leaves to the next: on disk, and in the checkers' memory."""

    images: dict[str, Image] = field(default_factory=dict)
    temps: dict[tuple[str, str], Image] = field(default_factory=dict)
    disk: Disk = field(default_factory=Disk)
    histories: dict[str, History] = field(default_factory=dict)
    reads: dict[str, list[Any]] = field(default_factory=dict)
    contents: Contents = field(default_factory=dict)
    watches: dict[tuple[str, str], FleeceWatch] = field(default_factory=dict)
    ticks: int = 1


class ChainCheckers(Checkers):
    """The checkers of a life, with checker C among them."""

    def call_began(self, device: SimDevice, call: Any) -> None:
        if not device.is_temp:
            self.world.chain.began(self.world.disk_of[device], call)  # type: ignore[attr-defined]
        super().call_began(device, call)

    def call_landed(self, device: SimDevice, call: Any, offset: int, length: int) -> None:
        if not device.is_temp and length:
            disk = self.world.disk_of[device]
            self.world.chain.began(disk, call, landed=True)  # type: ignore[attr-defined]
        super().call_landed(device, call, offset, length)

    def call_ended(self, device: SimDevice, call: Any) -> None:
        killer = self.world.killer  # type: ignore[attr-defined]
        if call.fails and killer is not None:
            killer.event("failure")
        super().call_ended(device, call)


class Life(World):
    """One life of the server: from what was left, until it is killed or has nothing to do."""

    def __init__(
        self,
        plan: Plan,
        under_test: engine.Engine,
        left: Left,
        number: int,
        killer: Killer | None,
        *,
        tracing: bool,
    ) -> None:
        self.before = left
        self.number = number
        self.killer = killer
        self.left: Left | None = None
        self._killed_at = 0
        self._told: dict[FleeceWatch, bytes] = {}
        """What had been acknowledged as freed when the kill came."""
        self.active: dict[str, Any] = {}
        """Sessions that are armed and not finished, by id."""
        self.arming: set[str] = set()
        self.temp_of: dict[tuple[str, str], SimDevice] = {}
        super().__init__(plan, under_test, tracing=tracing)
        self.checkers = ChainCheckers(self)
        self.met = self.checkers.met
        for device in self.devices:
            device._watcher = self.checkers
        self._ticks = itertools.count(left.ticks)
        self.rng = random.Random(f"life {plan.seed} {number}")
        described = left.disk.description
        self.chain = ChainChecker(self, left.contents, dict(described.last_good))
        self.store = SimStore(self, left.disk, killer, random.Random(f"store {plan.seed} {number}"))
        if killer is not None:
            killer.on_kill = self._on_kill

    # disks

    def _make_disk(self, plan: DiskPlan) -> SimDisk:
        disk = super()._make_disk(plan)
        image = self.before.images.get(plan.name)
        if image is not None:
            disk.device.content[:] = image.content
            disk.device.space[:] = image.space
        disk.history = self.before.histories.setdefault(plan.name, History(plan.content))
        disk.reads_seen = self.before.reads.setdefault(plan.name, [])
        hold, release_hold = disk.engine_disk.hold, disk.engine_disk.release_hold

        def holding() -> None:
            hold()
            disk.hold()

        def releasing() -> None:
            disk.release_hold()
            release_hold()

        disk.engine_disk.hold, disk.engine_disk.release_hold = holding, releasing
        return disk

    def by_name(self, name: str) -> SimDisk:
        return next(disk for disk in self.disks if disk.name == name)

    # the life

    def live(self) -> str | None:
        """Until the kill, or until nothing is left to do; the violation that was found."""
        self.spawn(self._start(), "start")
        if self.killer is not None:
            killer = self.killer
            self.loop.call_at(self.rng.random() * 0.6, killer.event, "time")
        with falling(self.killer, self.engine), self.engine.with_limits(self.plan.limits):
            try:
                self.loop.run_until_idle()
                if self.left is not None:
                    raise Killed
                self.checkers.at_end()
                self.chain.check("the end")
                self._check_tasks_at_end()
            except Killed:
                self._keep_memory()
            except Violation as violation:
                self.found = self.found or str(violation)
            except Spinning as spinning:
                self.found = f"L: {spinning}"
            found = self.found
            if self.killer is not None:
                self.killer.on_kill = None
            self.loop.cancel_everything()
        return found

    def _after_step(self) -> None:
        if self.left is not None:
            raise Killed
        super()._after_step()
        self.chain.after_step()
        if self.killer is not None:
            self.killer.point()

    def _on_kill(self) -> None:
        """In the middle of a step: what is on disk now is what the next life finds."""
        rng = self.rng
        self.log("KILLED")
        self._killed_at = self.tick()
        self._told = {watch: bytes(watch.freed) for watch in self.checkers.watches}
        self.left = Left(
            images={disk.name: left_by(disk.device, rng) for disk in self.disks},
            # Where the start had not come to some session yet, its temp image is as it was.
            temps=self.before.temps
            | {key: left_by(temp, rng) for key, temp in self.temp_of.items()},
            disk=self.store.disk.copy(),
        )
        in_flight = sum(disk.engine_disk.active_writes for disk in self.disks)
        self.met["kills"] += 1
        self.met["kills with active writes in flight"] += in_flight > 0
        self.met["kills with copies in flight"] += any(
            watch.state.copies for watch in self.checkers.live
        )
        self.met["kills while a session is armed"] += bool(self.arming)
        self.met["kills between finish and its commit"] += any(
            session.state == "finished" for session, _ in self.store._sessions.values()
        )

    def _keep_memory(self) -> None:
        left = self.left
        assert left is not None, "there was a kill"
        # What the dead server's last step still told anybody has not been told.
        for history in self.before.histories.values():
            for write in history.writes:
                if write.replied > self._killed_at:
                    write.replied, write.failed = math.inf, False
        for watch, freed in self._told.items():
            watch.freed[:] = freed
        for reads in self.before.reads.values():
            reads[:] = [seen for seen in reads if seen.ended <= self._killed_at]
        left.histories = self.before.histories
        left.reads = self.before.reads
        left.contents = self.chain.contents
        left.watches = dict(self.before.watches)
        for watch in self.checkers.watches:
            session_id = f"id of {watch.plan.name}"
            left.watches[session_id, watch.disk.name] = watch
        left.ticks = self.tick()

    # the start of a life

    async def _start(self) -> None:
        described = self.store.disk.description
        crashed = self.store.disk.crashed
        if described.bitmaps and self.rng.random() < 0.12:
            crashed = self.store.disk.crashed = True
            self.met["crashes of the machine"] += 1
        for entry in described.bitmaps:
            self.by_name(entry.disk).engine_disk.add_bitmap(self._bitmap(entry, crashed))
        for session in described.sessions:
            await self._take_up(session, crashed)
        self.chain.check("the start")
        await self.store.commit()
        for disk in self.disks:
            for number in range(disk.plan.guests):
                self.spawn(
                    actors.guest(self, disk, disk.plan, number + 10 * self.number),
                    f"guest {disk.name} {number}",
                )
        for session in list(self.active.values()):
            self.spawn(self._end(session, random.Random(session.name)), f"end {session.name}")
        for number in range(2):
            self.spawn(self._nightly(number), f"nightly {number}")

    def _bitmap(self, entry: BitmapEntry, crashed: bool) -> Any:
        lost = entry.lost
        if crashed:
            lost = "the machine crashed"
            buffer = self.store.disk.recording[entry.disk, entry.id]
            buffer[:] = self.rng.randbytes(len(buffer))
        return self.engine.modules["recording"].RecordingBitmap(
            entry.name,
            self.by_name(entry.disk).size,
            entry.granularity,
            bitmap_id=entry.id,
            bits=self.store.recording_bits(entry.disk, entry.id),
            since=entry.since,
            lost=lost,
        )

    async def _take_up(self, entry: SessionEntry, crashed: bool) -> None:
        resume = self.engine.modules["resume"]
        plan = entry.plan
        remains = []
        for fleece in entry.fleeces:
            disk = self.by_name(fleece.disk)
            temp = self.make_temp(plan, disk.engine_disk, fleece.cluster_size)
            image = self.before.temps[entry.id, disk.name]
            temp.content[:], temp.space[:] = image.content, image.space
            self.temp_of[entry.id, disk.name] = temp
            file = self.store.disk.fleeces[entry.id, disk.name]
            if crashed:
                file.broken = file.broken or "the machine crashed"
            own = fleece.own
            remains.append(
                resume.FleeceRemains(
                    disk.engine_disk,
                    fleece.cluster_size,
                    self.store.fleece_bits(entry.id, disk.name),
                    temp,
                    broken=file.broken,
                    own=self._own(disk, own, crashed) if own is not None else None,
                )
            )
        options = self._options(plan)
        session = await resume.resume_session(
            entry.name, options, remains, session_id=entry.id, armed_at=entry.armed_at
        )
        # In this very step: nobody has looked at the fleeces yet.
        self.store.taken_up(session, plan)
        self.active[session.id] = session
        for fleece in session.fleeces:
            self._watch(fleece, session, plan)
        if not crashed:
            self.chain.armed(session)
        else:
            self.chain._own.update({f: f.own.bitmap.bits.copy() for f in session.fleeces})
        self.met["sessions taken up"] += session.state == "active"
        self.met["sessions taken up broken"] += session.state == "broken"

    def _own(self, disk: SimDisk, own: OwnEntry, crashed: bool) -> Any:
        recording = disk.engine_disk.bitmaps.get(own.name)
        if recording is None or recording.id != own.recording.id:
            recording = self._bitmap(own.recording, crashed)
        replaced = self._bitmap(own.replaced, crashed) if own.replaced is not None else None
        return self.engine.modules["resume"].OwnRemains(
            own.name,
            own.mode,
            recording,
            own.since,
            reason=own.reason,
            made=own.made,
            replaced=replaced,
        )

    def _watch(self, fleece: Any, session: Any, plan: SessionPlan) -> None:
        disk = self.by_name(fleece.disk.name)
        watch = FleeceWatch(fleece, disk, plan, self.loop.time())
        watch.t0 = self.chain.contents[disk.name, session.id]
        old = self.before.watches.get((session.id, disk.name))
        if old is not None:
            watch.asked, watch.freed = old.asked, old.freed
            watch.punch_failed, watch.read_once = old.punch_failed, old.read_once
            watch.access_seen = old.access_seen
            if old.fleece.finished:
                # Finished, and the description did not say so yet: released in part or whole.
                watch.asked[:] = b"\x01" * len(watch.asked)
                self.met["sessions taken up that had been finished"] += 1
        if watch.dead:
            watch.dead_at = self.loop.time()
        else:
            self.checkers.live.append(watch)
            self.checkers._check_partition(watch)
        self.checkers.watches.append(watch)
        self.checkers.by_temp[watch.temp] = watch
        disk.watches.append(watch)
        disk.fleeces_seen = list(disk.engine_disk.fleeces)

    # sessions

    def _options(self, plan: SessionPlan) -> Any:
        return self.engine.session_options(
            on_cbw_error=plan.on_cbw_error,
            cbw_timeout_s=plan.cbw_timeout_s,
            temp_limit=None,
            cluster_size=plan.cluster_size,
        )

    async def _nightly(self, number: int) -> None:
        rng = random.Random(f"nightly {self.plan.seed} {self.number} {number}")
        for index in range(rng.randrange(1, 5)):
            await _sleep(rng, 0.12)
            mode = rng.choices(("use-or-new", "use", "new", "keep"), (4, 2, 2, 2))[0]
            base = rng.choice(self.plan.sessions)
            session = await self._begin(
                replace(base, name=f"{mode}-{self.number}-{number}-{index}"), mode, rng
            )
            if session is not None:
                await self._end(session, rng)

    async def _begin(self, plan: SessionPlan, mode: str, rng: random.Random) -> Any:
        session_id = f"id of {plan.name}"
        disks = [self.disks[index] for index in plan.disks]
        request = self.engine.modules["recording"].BitmapRequest(
            BITMAP, mode, rng.choice((4096, 8192, 65536))
        )

        async def make_temp(engine_disk: Any, cluster_size: int, session_id: str) -> SimDevice:
            await _sleep(rng, 0.005)
            temp = self.make_temp(plan, engine_disk, cluster_size)
            self.temp_of[session_id, engine_disk.name] = temp
            return temp

        self.store.plans[session_id] = plan
        self.arming.add(session_id)
        try:
            session = await self.arm(plan, disks, make_temp, bitmap=request, store=self.store)
        except OSError as error:
            self.log(f"{plan.name} did not begin: {error}")
            self.met["sessions refused"] += 1
            if error.errno not in EXPECTED:
                self.checkers.violation(f"X: {plan.name} was refused with {error!r}")
            return None
        finally:
            self.arming.discard(session_id)
        self.active[session.id] = session
        self.met[f"sessions armed: {mode}"] += 1
        self.checkers.after_step()
        self.chain.armed(session)
        return session

    async def _end(self, session: Any, rng: random.Random) -> None:
        for fleece in session.fleeces:
            watch = self.checkers.by_temp[fleece.temp]
            plan = watch.plan
            for actor, count in (
                (actors.pull, plan.pulls),
                (actors.trimmer, plan.trimmers),
                (actors.reader_once, plan.readers_once),
            ):
                for number in range(count):
                    name = f"{actor.__name__} {watch.name}"
                    self.spawn(actor(self, watch, plan, number + 10 * self.number), name)
        await _sleep(rng, rng.choice((0.02, 0.2)))
        if self.killer is not None:
            self.killer.event("finish")
        asked = rng.random() < 0.5
        failed = asked or any(fleece.broken is not None for fleece in session.fleeces)
        session.finish(failed=asked)
        del self.active[session.id]
        self.chain.finished(session, failed=failed)
        self.met["sessions failed" if session.failed else "sessions that succeeded"] += 1
        self.log(f"{session.name} was finished, failed: {session.failed}")
        await self.store.commit(removing=session)
        await session.wait_closed()


async def _sleep(rng: random.Random, longest_s: float) -> None:
    await actors.asyncio.sleep(rng.random() * longest_s)


# -- seeds ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the lives of one seed came to."""

    seed: int
    violation: str | None
    met: Counter[str]
    steps: int
    trace: list[str]


def draw(seed: int) -> Plan:
    """Small disks and many sessions; devices fail, and none hangs."""
    rng = random.Random(f"chains {seed}")
    disks = tuple(
        replace(
            plan._disk(random.Random(f"chain disk {seed} {number}"), "chains", number, 1),
            requests=rng.randrange(8, 30),
            think_s=rng.choice((0.005, 0.02, 0.05)),
        )
        for number in range(rng.choice((1, 1, 2)))
    )
    disks = tuple(replace(d, profile=replace(d.profile, hang={}, slow_chance=0.0)) for d in disks)
    clones = plan._clones(random.Random(f"sharing {seed}"))
    limits = {"CLONE_LENGTH_MIN": disks[0].unit} if clones["clones"] else {}
    sessions = []
    for number in range(4):
        kind = rng.choice(("calm", "failing temp"))
        dice = random.Random(f"chain session {seed} {number}")
        drawn = plan._session(dice, kind, number, disks, clones)
        sessions.append(
            replace(
                drawn,
                cbw_timeout_s=rng.choice((0.0, 20.0)),
                temp_limit_clusters=None,
                on_cbw_error=rng.choice(("break-snapshot", "break-snapshot", "break-guest-write")),
            )
        )
    now_chance = rng.choice((0.0, 0.5, 1.0))
    return Plan(seed, "chains", now_chance, disks, tuple(sessions), limits, 0.1, 30)


def _killer(seed: int, life: int) -> Killer:
    rng = random.Random(f"killer {seed} {life}")
    event, numbers, points = rng.choice(
        (
            ("time", 1, 16),
            ("commit", 4, 16),
            ("finish", 1, 40),
            ("finish", 4, 40),
            ("failure", 3, 24),
            ("store", 400, 1),
            ("clear", 40, 3),
            ("release", 16, 2),
            ("release", 16, 2),
        )
    )
    return Killer(event, rng.randint(1, numbers), rng.randint(1, points), rng)


def run(seed: int, under_test: engine.Engine | None = None, *, tracing: bool = False) -> Outcome:
    """The lives of one seed. A pure function of the seed and the engine."""
    drawn = draw(seed)
    under_test = under_test or engine.real()
    left = Left()
    met: Counter[str] = Counter()
    trace: list[str] = []
    steps = 0
    lives = random.Random(f"lives {seed}").randrange(2, LIVES_MAX + 1)
    for number in range(lives):
        killer = _killer(seed, number) if number + 1 < lives else None
        life = Life(drawn, under_test, left, number, killer, tracing=tracing)
        found = life.live()
        met.update(life.met)
        met["lives"] += 1
        steps += life.loop.steps
        trace += [f"life {number}", *life.trace]
        if found is not None:
            return Outcome(seed, found, met, steps, trace)
        if life.left is None:
            break
        left = life.left
    return Outcome(seed, None, met, steps, trace)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.chains", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=500, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this seed alone, and print what happened")
    options = parser.parse_args(arguments)
    seeds = range(options.start, options.start + options.seeds)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    began = time.perf_counter()
    met: Counter[str] = Counter()
    found = []
    steps = 0
    for seed in seeds:
        outcome = run(seed, tracing=options.seed is not None)
        met.update(outcome.met)
        steps += outcome.steps
        for line in outcome.trace if options.seed is not None else ():
            print(line)
        if outcome.violation is not None:
            found.append(f"seed {seed}: {outcome.violation}")
            print(found[-1], flush=True)
    for what, count in sorted(met.items()):
        print(f"{count:9,}  {what}")
    print(f"{len(seeds)} seeds, {steps:,} steps, {time.perf_counter() - began:.1f} s")
    print(found[0] if found else "no violation")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
