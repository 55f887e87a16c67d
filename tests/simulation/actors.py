"""Who is in a simulated world: guests, backup clients, and the one who arms and ends.

An actor draws from a generator of its own. It awaits its requests, or (a vanishing client) stops
awaiting them: then they go on without it, as on a server whose client's connection broke.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random
from typing import TYPE_CHECKING

from . import requests
from .devices import SimDevice

if TYPE_CHECKING:
    from .plan import DiskPlan, SessionPlan
    from .watch import FleeceWatch
    from .world import SimDisk, World

SMALL = (1, 37, 511, 512, 513, 4095)


def draw_range(rng: random.Random, size: int, unit: int) -> tuple[int, int]:
    """(offset, length) inside the disk: clusters, parts of clusters, odd bytes, its end."""
    clusters = -(-size // unit)
    first = rng.randrange(clusters) if rng.random() < 0.5 else rng.randrange(min(clusters, 3))
    luck = rng.random()
    if luck < 0.45:
        offset, length = first * unit, unit * rng.choice((1, 1, 1, 2, 3, 5))
    elif luck < 0.65:
        half = unit // 2
        offset = first * unit + rng.choice((0, half))
        length = half * rng.choice((1, 1, 2, 3))
    elif luck < 0.85:
        offset, length = first * unit + rng.randrange(unit), rng.choice((*SMALL, unit, unit + 1))
    elif luck < 0.95:
        offset, length = 0, size
    else:
        length = min(size, rng.choice((*SMALL, unit)))
        offset = size - length
    offset = min(offset, size - 1)
    return offset, max(1, min(length, size - offset))


async def guest(world: World, disk: SimDisk, plan: DiskPlan, number: int) -> None:
    """A guest that writes, zeroes, discards, reads and flushes, ``depth`` requests at a time."""
    rng = random.Random(f"guest {world.plan.seed} {plan.name} {number}")
    in_flight: set[asyncio.Task[None]] = set()
    discards = rng.choice((0.0, 0.15, 0.3))
    for _ in range(plan.requests):
        if len(in_flight) >= plan.depth:
            if rng.random() < plan.vanish_chance:
                world.met["clients vanished"] += 1
                in_flight.clear()
                continue
            _, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(rng.random() * plan.think_s)
        offset, length = draw_range(rng, disk.size, plan.unit)
        luck = rng.random()
        if luck < 0.12:
            call = requests.guest_read(world, disk, offset, length)
        elif luck < 0.14:
            call = requests.guest_flush(world, disk)
        elif luck < 0.14 + discards:
            kind = rng.choice(("zero", "zero", "trim"))
            call = requests.guest_change(world, disk, kind, offset, length, None)
        else:
            data = rng.randbytes(length)
            call = requests.guest_change(world, disk, "write", offset, length, data)
        in_flight.add(world.spawn(call, f"guest {disk.name} {number}"))


async def guest_mapper(world: World, disk: SimDisk, plan: DiskPlan) -> None:
    """A guest that asks which parts of its disk are zero, while others change it."""
    rng = random.Random(f"guest mapper {world.plan.seed} {plan.name}")
    for _ in range(rng.randrange(6)):
        await asyncio.sleep(rng.random() * rng.choice((0.005, 0.05, 0.2)))
        offset, length = draw_range(rng, disk.size, plan.unit)
        await requests.guest_status(world, disk, offset, length)


async def pull(world: World, watch: FleeceWatch, plan: SessionPlan, number: int) -> None:
    """A backup: reads everything once, and releases what it has (or not)."""
    rng = random.Random(f"pull {world.plan.seed} {watch.name} {number}")
    step = rng.choice((512, 1000, 4096, 16384, 65536, 1 << 20))
    step = max(step, watch.size // 24)
    depth = rng.choice((1, 1, 3))
    reads: list[asyncio.Task[None]] = []

    async def one(offset: int, length: int) -> None:
        data = await requests.client_read(world, watch, offset, length)
        if data is not None and rng.random() < plan.pull_trims:
            await requests.client_trim(world, watch, offset, length)

    for offset in range(0, watch.size, step):
        if watch.dead or rng.random() < plan.vanish_chance:
            world.met["clients vanished"] += not watch.dead
            return
        length = min(step, watch.size - offset)
        reads.append(world.spawn(one(offset, length), f"pull {watch.name} {number}"))
        if len(reads) >= depth:
            await asyncio.wait([reads.pop(0)])
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.1)


async def trimmer(world: World, watch: FleeceWatch, plan: SessionPlan, number: int) -> None:
    """Releases ranges at random: whole, in parts, again, and with odd edges."""
    rng = random.Random(f"trimmer {world.plan.seed} {watch.name} {number}")
    unit = 1 << watch.shift
    for _ in range(rng.randrange(1, 8)):
        await asyncio.sleep(rng.random() * rng.choice((0.005, 0.03, 0.2)))
        if watch.dead:
            return
        offset, length = draw_range(rng, watch.size, unit)
        if length == watch.size and rng.random() < 0.8:
            length = min(unit, watch.size)
        if rng.random() < 0.1:
            length = max(length, 3 * unit)
            length = min(length, watch.size - offset)
        call = requests.client_trim(world, watch, offset, length)
        task = world.spawn(call, f"trimmer {watch.name} {number}")
        if rng.random() < 0.6 and rng.random() >= plan.vanish_chance:
            await asyncio.wait([task])


async def reader_once(world: World, watch: FleeceWatch, plan: SessionPlan, number: int) -> None:
    """A client whose READs release: in order or at random, some at a time, with replies that leave
    late or, since it has vanished, never."""
    rng = random.Random(f"reader once {world.plan.seed} {watch.name} {number}")
    unit = 1 << watch.shift
    step = unit * rng.choice((1, 1, 2, 5)) if rng.random() < 0.7 else rng.choice((512, unit + 512))
    step = max(step, watch.size // 24)
    ranges = [(at, min(step, watch.size - at)) for at in range(0, watch.size, step)]
    if rng.random() < 0.4:
        ranges = [draw_range(rng, watch.size, unit) for _ in range(rng.randrange(1, 10))]
    depth = rng.choice((1, 2, 4))
    slow_s = rng.choice((0.0, 0.002, 0.03))
    lost = rng.choice((0.0, 0.0, 0.2))
    reads: list[asyncio.Task[None]] = []

    async def one(offset: int, length: int) -> None:
        if await requests.client_read(world, watch, offset, length) is None:
            return
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * slow_s)
        if rng.random() < lost:
            world.met["replies that never left"] += 1
        else:
            requests.reply_left(world, watch, offset, length)

    for offset, length in ranges:
        if watch.dead or rng.random() < plan.vanish_chance:
            return
        reads.append(world.spawn(one(offset, length), f"reader once {watch.name} {number}"))
        if len(reads) >= depth:
            await asyncio.wait([reads.pop(0)])
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.05)


async def mapper(world: World, watch: FleeceWatch, plan: SessionPlan, number: int) -> None:
    """Asks for block status, and reads what it was told is data."""
    rng = random.Random(f"mapper {world.plan.seed} {watch.name} {number}")
    for _ in range(rng.randrange(2, 8)):
        await asyncio.sleep(rng.random() * rng.choice((0.005, 0.05)))
        if watch.dead:
            return
        offset, length = draw_range(rng, watch.size, 1 << watch.shift)
        if rng.random() < 0.5:
            await requests.client_status(world, watch, offset, length)
        else:
            await requests.client_read(world, watch, offset, length)


async def controller(world: World, plan: SessionPlan) -> None:
    """Arms a session, starts its clients, and finishes it."""
    rng = random.Random(f"controller {world.plan.seed} {plan.name}")
    await asyncio.sleep(plan.arms_at_s)
    disks = [world.disks[index] for index in plan.disks]
    temps: list[SimDevice] = []
    held_since = math.inf

    async def make_temp(engine_disk: object, cluster_size: int, session_id: str) -> SimDevice:
        nonlocal held_since
        await asyncio.sleep(rng.random() * 0.01)
        if plan.make_temp_fails and len(temps) == len(disks) - 1:
            raise OSError(errno.ENOSPC, "simulated: no room for a temp image")
        temp = world.make_temp(plan, engine_disk, cluster_size)
        temps.append(temp)
        if len(temps) == len(disks):
            # In this very step the engine begins to hold the guests.
            world.armings_pending.append(plan)
            for disk in disks:
                disk.hold()
            held_since = min(disk.held_since for disk in disks)
        return temp

    try:
        session = await world.arm(plan, disks, make_temp)
    except OSError as error:
        _check_arming_failed(world, plan, temps, error, world.loop.time() - held_since)
        return
    finally:
        if plan in world.armings_pending:
            world.armings_pending.remove(plan)
            for disk in disks:
                disk.release_hold()
    world.met["sessions armed"] += 1
    if session.pause_s > plan.deadline_s + 1e-6:
        world.checkers.violation(f"L: arming {plan.name} held guests for {session.pause_s} s")
    world.checkers.after_step()
    watches = [world.checkers.by_temp[fleece.temp] for fleece in session.fleeces]
    for watch in watches:
        watch.session = session
        if world.room is not None and plan.reserve_clusters:
            world.spawn(world.room.look(watch), f"room of {watch.name}")
        for actor, count in (
            (pull, plan.pulls),
            (trimmer, plan.trimmers),
            (mapper, plan.mappers),
            (reader_once, plan.readers_once),
        ):
            for number in range(count):
                world.spawn(actor(world, watch, plan, number), f"{actor.__name__} {watch.name}")
    if plan.lives_s is None:
        return
    await asyncio.sleep(plan.lives_s)
    session.finish(failed=plan.finish_failed)
    world.met["sessions finished"] += 1
    if any(not watch.fleece.finished for watch in watches):
        world.checkers.violation(f"X: {plan.name} was finished on some of its disks only")


def _check_arming_failed(
    world: World, plan: SessionPlan, temps: list[SimDevice], error: OSError, held_s: float
) -> None:
    world.met["armings failed"] += 1
    world.log(f"arming {plan.name} failed: {error}")
    violation = world.checkers.violation
    # Held by this arming, or by another before it.
    timed_out = error.errno == errno.ETIMEDOUT and held_s > plan.deadline_s - 1e-6
    no_room = error.errno == errno.ENOSPC and plan.reserve_clusters and world.room is not None
    if no_room:
        world.met["armings without room"] += 1
    if not timed_out and not plan.make_temp_fails and not no_room:
        violation(f"X: arming {plan.name} failed without a cause: {error}")
    if any(not temp.closed for temp in temps):
        violation(f"S: arming {plan.name} failed and left a temp image open")
    if any(fleece.temp in temps for disk in world.disks for fleece in disk.engine_disk.fleeces):
        violation(f"B: arming {plan.name} failed and left a fleece installed")
