"""Requests of guests and backup clients, each with the checks that its own reply allows."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fleecenbd.storage.device import EXTENT_ZERO

from .calls import REQUEST
from .checkers import EPSILON_S
from .history import GuestWrite
from .watch import FleeceWatch

if TYPE_CHECKING:
    from .world import SimDisk, World


MET = {"write": "guest writes", "zero": "guest zeroes", "trim": "guest trims"}


@dataclass(eq=False)
class GuestRequest(GuestWrite):
    """A guest's change, and how long it may wait."""

    sent_at: float = 0.0
    timers_s: float = 0.0
    """Sum of the timers that may cover its wait, one after the other."""
    pieces: int = 1
    untimed: bool = False
    """A fleece without a timer may hold it."""
    device_failed: bool = False
    held_before_s: float = 0.0


@dataclass
class GuestRead:
    """What a guest's READ returned, or what BLOCK_STATUS called zero, for checker G."""

    offset: int
    data: bytes
    began: int
    ended: int = 0
    device_failed: bool = False
    kind: str = "read"

    def __str__(self) -> str:
        return f"a guest's {self.kind} #{self.began}"


@dataclass(eq=False)
class ClientRequest:
    """A request on a fleecing export."""

    kind: str
    watch: FleeceWatch
    offset: int
    length: int
    device_failed: bool = False

    number: int = 0

    @property
    def fleece(self) -> Any:
        return self.watch.fleece

    def __str__(self) -> str:
        return f"{self.kind} #{self.number} {self.offset}+{self.length} of {self.watch.name}"


# guests


async def guest_change(
    world: World, disk: SimDisk, kind: str, offset: int, length: int, data: bytes | None
) -> None:
    """WRITE, WRITE_ZEROES or TRIM of a guest, checked to its reply."""
    live = [watch for watch in disk.watches if watch.dead_at is None]
    timeouts = [watch.plan.cbw_timeout_s for watch in live]
    pieces = 1
    if kind != "write":
        # Worked in pieces, each with its own timer; a TRIM's pieces may be single clusters.
        pieces = 1 + length // min(disk.plan.unit, world.engine.limit("PIECE_LENGTH_MAX"))
    request = GuestRequest(
        kind,
        offset,
        length,
        world.tick(),
        data,
        sent_at=world.loop.time(),
        timers_s=max(timeouts, default=0.0) * pieces,
        pieces=pieces,
        untimed=0.0 in timeouts,
        held_before_s=disk.held_s(),
    )
    REQUEST.set(request)
    disk.history.writes.append(request)
    disk.pending.append(request)
    world.met[MET[kind]] += 1
    world.log(f"{disk.name}: a guest sends {request}")
    try:
        await _change(world, disk, request)
    except OSError as error:
        request.failed = True
        request.replied = world.tick()
        _check_guest_error(world, disk, request, error)
    else:
        request.replied = world.tick()
    disk.pending.remove(request)
    _check_guest_wait(world, disk, request)
    world.log(f"{disk.name}: a guest has its reply to {request.story()}")


async def _change(world: World, disk: SimDisk, request: GuestRequest) -> None:
    engine_disk, offset, length = disk.engine_disk, request.offset, request.length
    if request.kind == "write":
        assert request.data is not None
        if not (world.tries_now() and engine_disk.write_now(offset, request.data)):
            await engine_disk.write(offset, request.data)
    elif request.kind == "trim":
        await engine_disk.trim(offset, length)
    else:
        rng = world.rng
        fast, may_trim = rng.random() < 0.2, rng.random() < 0.7
        try:
            await engine_disk.write_zeroes(offset, length, may_trim=may_trim, fast=fast)
        except OSError as error:
            if not fast or error.errno != errno.ENOTSUP:
                raise
            if request.changes:
                world.checkers.violation(f"G: {request} said ENOTSUP and changed the disk")
            await engine_disk.write_zeroes(offset, length, may_trim=may_trim)


def _check_guest_error(world: World, disk: SimDisk, request: GuestRequest, error: OSError) -> None:
    world.log(f"{disk.name}: {request} failed: {error}")
    if any(change.fails for change in request.changes):
        return
    world.met["guest writes failed for a session's sake"] += 1
    violation = world.checkers.violation
    if request.changes:
        violation(f"G: {request} failed for a session's sake and changed the disk: {error}")
    if error.errno != errno.EIO:
        violation(f"X: {request} failed with errno {error.errno}, not EIO")
    if not any(
        watch.plan.on_cbw_error == "break-guest-write"
        and world.checkers.has_cause(watch, [request])
        for watch in disk.watches
    ):
        violation(f"X: {request} failed without a cause: {error}")


def _check_guest_wait(world: World, disk: SimDisk, request: GuestRequest) -> None:
    now = world.loop.time()
    if request.untimed:
        return
    in_calls = sum(call.ended_at - call.began_at for call in request.changes if call.ended)
    held = disk.held_s() - request.held_before_s
    waited = now - request.sent_at - in_calls - held
    if waited > request.timers_s + EPSILON_S:
        world.checkers.violation(
            f"L: {request} waited {waited:.3f} s; its timers allow {request.timers_s:g} s"
        )


async def guest_read(world: World, disk: SimDisk, offset: int, length: int) -> None:
    """A guest's read of the active image."""
    seen = GuestRead(offset, b"", world.tick())
    REQUEST.set(seen)
    world.met["guest reads"] += 1
    engine_disk = disk.engine_disk
    try:
        data = engine_disk.read_now(offset, length) if world.tries_now() else None
        if data is None:
            data = await engine_disk.read(offset, length)
    except OSError as error:
        if not seen.device_failed:
            world.checkers.violation(f"X: a guest's read failed without a cause: {error}")
        return
    seen.data, seen.ended = bytes(data), world.tick()
    disk.reads_seen.append(seen)


async def guest_status(world: World, disk: SimDisk, offset: int, length: int) -> None:
    """A guest's BLOCK_STATUS of the active image: what it calls zero must read as zeroes."""
    seen = GuestRead(offset, b"", world.tick(), kind="status")
    REQUEST.set(seen)
    world.met["guest status"] += 1
    try:
        extents = await disk.engine_disk.status(offset, length)
    except OSError as error:
        if not seen.device_failed:
            world.checkers.violation(f"X: a guest's status failed without a cause: {error}")
        return
    ended = world.tick()
    position = offset
    for extent_length, flags in extents:
        if flags & EXTENT_ZERO:
            world.met["zero claims to guests"] += 1
            claim = GuestRead(position, bytes(extent_length), seen.began, ended, kind=seen.kind)
            disk.reads_seen.append(claim)
        position += extent_length
    if not offset < position <= offset + length:
        world.checkers.violation(f"X: a guest's status answered {position - offset} bytes")


async def guest_flush(world: World, disk: SimDisk) -> None:
    """A guest's FLUSH."""
    await disk.engine_disk.flush()


# clients of a fleecing export


async def _client(
    world: World, request: ClientRequest, call: Callable[[], Awaitable[Any]]
) -> tuple[Any, OSError | None]:
    """Make the call with the request known to the devices; (answer, error)."""
    REQUEST.set(request)
    request.number = world.tick()
    world.met[f"client: {request.kind}"] += 1
    world.log(f"a client sends {request}")
    world.clients_pending.append(request)
    try:
        answer = await call()
    except OSError as error:
        world.log(f"a client has its reply to {request}: {error}")
        _check_client_error(world, request, error)
        return None, error
    finally:
        world.clients_pending.remove(request)
    world.log(f"a client has its reply to {request}")
    watch = request.watch
    if watch.dead:
        world.checkers.violation(f"T0: {request} succeeded after the end of {watch.name}")
    return answer, None


def _check_client_error(world: World, request: ClientRequest, error: OSError) -> None:
    """Broken: EIO; finished: ESHUTDOWN; released: EINVAL; else the device's own error."""
    watch = request.watch
    expected = None
    if watch.fleece.broken is not None:
        expected = errno.EIO
    elif watch.fleece.finished:
        expected = errno.ESHUTDOWN
    elif request.kind == "read" and not watch.all_access(request.offset, request.length):
        expected = errno.EINVAL
    if request.device_failed and error.errno == errno.EIO:
        return
    if error.errno != expected:
        world.checkers.violation(
            f"X: {request} failed with errno {error.errno}, expected {expected}: {error}"
        )


async def client_read(world: World, watch: FleeceWatch, offset: int, length: int) -> bytes | None:
    """A read of a fleecing export; the data, or None on an error."""
    request = ClientRequest("read", watch, offset, length)
    fleece = watch.fleece

    async def call() -> Any:
        data = fleece.read_now(offset, length) if world.tries_now() else None
        return data if data is not None else await fleece.read(offset, length)

    data, error = await _client(world, request, call)
    if error is not None:
        return None
    violation = world.checkers.violation
    if data != watch.t0[offset : offset + length]:
        wrong = next(
            (i for i, (a, b) in enumerate(zip(data, watch.t0[offset:], strict=False)) if a != b),
            len(data),
        )
        violation(f"T0: {request} returned wrong data at {offset + wrong}")
    if not watch.all_access(offset, length):
        violation(f"T0: {request} succeeded though a part of it has been released")
    return bytes(data)


async def client_trim(world: World, watch: FleeceWatch, offset: int, length: int) -> None:
    """A TRIM on a fleecing export: what it covers is released, and its space is free."""
    request = ClientRequest("trim", watch, offset, length)
    fleece = watch.fleece
    watch.asked[offset : offset + length] = b"\x01" * length

    async def call() -> None:
        if not (world.tries_now() and fleece.trim_now(offset, length)):
            await fleece.trim(offset, length)

    _, error = await _client(world, request, call)
    if watch.dead:
        return
    size = 1 << watch.shift
    first = -(-offset // size)
    end = (offset + length) // size if offset + length < watch.size else watch.clusters
    violation = world.checkers.violation
    for cluster in range(first, end):
        if fleece.access.bits[cluster]:
            violation(f"S: {request} was replied to, and cluster {cluster} can still be read")
        if error is not None:
            continue
        watch.freed[cluster] = 1
        if watch.temp.holds(cluster * size, size):
            violation(f"S: {request} was replied to, and cluster {cluster} holds space")


def reply_left(world: World, watch: FleeceWatch, offset: int, length: int) -> None:
    """The reply to a READ_ONCE was handed over: what it covered whole is released in this step,
    and nothing else; parts do not add up."""
    fleece = watch.fleece
    if watch.dead:
        fleece.release_read(offset, length)
        return
    size = 1 << watch.shift
    first = -(-offset // size)
    end = (offset + length) // size if offset + length < watch.size else watch.clusters
    expected = fleece.access.bits.copy()
    if first < end:
        stop = min(end * size, watch.size)
        watch.asked[first * size : stop] = b"\x01" * (stop - first * size)
        expected[first:end] = 0
        watch.read_once = True
    world.met["READs that release"] += first < end
    world.log(f"the reply to a READ_ONCE of {watch.name}, {offset}+{length}, has left")
    fleece.release_read(offset, length)
    if fleece.access.bits != expected:
        world.checkers.violation(
            f"S: {watch.name}: a READ_ONCE of {length} bytes at {offset} released something else "
            f"than clusters {first} to {end}"
        )


async def client_status(world: World, watch: FleeceWatch, offset: int, length: int) -> None:
    """BLOCK_STATUS: base:allocation, and x-fleecenbd:access in the same step."""
    request = ClientRequest("status", watch, offset, length)
    fleece = watch.fleece
    extents, error = await _client(world, request, lambda: fleece.status(offset, length))
    if error is not None:
        return
    violation = world.checkers.violation
    position = offset
    for extent_length, flags in extents:
        stop = position + extent_length
        if flags & EXTENT_ZERO:
            world.met["zero claims"] += 1
            if any(watch.t0[position:stop]):
                violation(f"T0: {request} claims zeroes at {position}..{stop}")
            if not watch.all_access(position, extent_length):
                violation(f"T0: {request} claims zeroes in a released range")
        position = stop
    if not offset < position <= offset + length:
        violation(f"X: {request} answered {position - offset} bytes")
    world.checkers.check_access_map(watch, request, offset, length)
