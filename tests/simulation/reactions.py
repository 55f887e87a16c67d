"""Somebody does the wrong thing at the right moment: while a device call is in flight.

Actors that draw their moments at random seldom meet a call of a few milliseconds. So a call that
begins may provoke a request about its own range, which comes while the call lasts: a TRIM of what
a copy writes, a guest write to what a backup reads, the end of the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from . import requests
from .calls import CHANGES, Call
from .devices import SimDevice
from .history import GuestWrite

if TYPE_CHECKING:
    from .watch import FleeceWatch
    from .world import SimDisk, World

Reaction = tuple[int, str]
"""(weight, what is done)."""

TO_TEMP_WRITE: tuple[Reaction, ...] = (
    (8, "trim"), (3, "trim a part"), (1, "read"), (2, "write"), (1, "finish"),
)  # fmt: skip
TO_FAILING_TEMP_WRITE: tuple[Reaction, ...] = ((8, "trim"), (1, "trim a part"), (1, "write"))
TO_TEMP_READ: tuple[Reaction, ...] = ((6, "trim"), (1, "trim a part"), (1, "finish"))
TO_TEMP_TRIM: tuple[Reaction, ...] = (
    (3, "trim"), (1, "read"), (5, "write elsewhere"), (1, "finish"),
)  # fmt: skip
TO_FROZEN_READ: tuple[Reaction, ...] = (
    (4, "write"), (3, "trim"), (2, "trim a part"), (2, "zero"), (1, "finish"),
    (4, "write a part, trim another"),
)  # fmt: skip
TO_COPY_READ: tuple[Reaction, ...] = (
    (4, "trim"), (2, "trim a part"), (4, "read"), (2, "write"), (1, "status"), (1, "finish"),
)  # fmt: skip
TO_STATUS: tuple[Reaction, ...] = ((5, "zero"), (3, "trim"), (1, "discard"), (1, "write"))
TO_GUEST_CHANGE: tuple[Reaction, ...] = ((4, "read"), (2, "status"), (1, "trim"), (2, "write"))


def react(world: World, device: SimDevice, call: Call) -> None:
    """Have somebody react to the call, at a moment at which it is likely still in flight."""
    target = _target(world, device, call)
    if target is None:
        return
    disk, watch, table = target
    rng = world.rng
    what = rng.choices([name for _, name in table], [weight for weight, _ in table])[0]
    offset, length = call.offset, call.length
    if watch is not None:
        offset, length = _clusters(watch, call)
    if not length:
        return
    world.reactions_left -= 1
    delay_s = rng.choice((0.0, rng.random())) * device.profile.latency_max_s
    if what == "trim a part" and watch is not None:
        first, end = watch.span(offset, length)
        offset = rng.randrange(first, end) << watch.shift
        length = min(1 << watch.shift, watch.size - offset)
        what = "trim"
    if what == "write elsewhere":
        offset, length = rng.randrange(disk.size), disk.plan.unit
        what = "write"
    if what == "write a part, trim another" and watch is not None:
        first, end = watch.span(offset, length)
        part, other = rng.randrange(first, end), rng.randrange(first, end)
        size = 1 << watch.shift
        data = rng.randbytes(min(size, disk.size - part * size))
        world.spawn(
            requests.guest_change(world, disk, "write", part * size, len(data), data),
            "reaction: write a part",
        )
        offset, length = other * size, min(size, watch.size - other * size)
        delay_s += 2 * device.profile.latency_max_s * rng.random()
        what = "trim"
    length = min(length, disk.size - offset)
    coro = _after(delay_s, lambda: _action(world, disk, watch, what, offset, length))
    world.met["reactions"] += 1
    world.spawn(coro, f"reaction: {what}")


def _target(
    world: World, device: SimDevice, call: Call
) -> tuple[SimDisk, FleeceWatch | None, tuple[Reaction, ...]] | None:
    """The disk, a fleece that is alive, and what may be done; None: nobody reacts."""
    if device.is_temp:
        temp_watch = world.checkers.by_temp.get(device)
        if temp_watch is None or temp_watch.dead:
            return None
        tables = {"read": TO_TEMP_READ, "trim": TO_TEMP_TRIM}
        table = TO_FAILING_TEMP_WRITE if call.fails else TO_TEMP_WRITE
        return temp_watch.disk, temp_watch, tables.get(call.kind, table)
    disk = world.disk_of[device]
    live = [watch for watch in disk.watches if not watch.dead]
    if not live or call.kind == "flush":
        return None
    watch = getattr(call.request, "watch", None)
    if watch is None:
        watch = world.rng.choice(live)
        is_copy = call.kind not in CHANGES and isinstance(call.request, GuestWrite)
        if call.kind == "read" and not is_copy:
            return None
        return disk, watch, TO_COPY_READ if is_copy else TO_GUEST_CHANGE
    return disk, watch, TO_STATUS if call.kind == "extents" else TO_FROZEN_READ


def _clusters(watch: FleeceWatch, call: Call) -> tuple[int, int]:
    """The call's range, widened to whole clusters of the disk."""
    first, end = watch.span(call.offset, call.length)
    offset = first << watch.shift
    return offset, max(0, min(end << watch.shift, watch.size) - offset)


async def _after(delay_s: float, action: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    await asyncio.sleep(delay_s)
    await action()


async def _action(
    world: World, disk: SimDisk, watch: FleeceWatch | None, what: str, offset: int, length: int
) -> None:
    if what == "write":
        data = world.rng.randbytes(length)
        await requests.guest_change(world, disk, "write", offset, length, data)
    elif what in ("zero", "discard"):
        kind = "trim" if what == "discard" else what
        await requests.guest_change(world, disk, kind, offset, length, None)
    elif watch is None or watch.dead:
        return
    elif what == "trim":
        await requests.client_trim(world, watch, offset, length)
    elif what == "read":
        await requests.client_read(world, watch, offset, length)
    elif what == "status":
        await requests.client_status(world, watch, offset, length)
    elif watch.session is not None and world.rng.random() < 0.3:
        watch.session.finish()
