"""The state of a run as a short key: two runs with one key have the same future.

The key is taken of everything that can make a difference later on: the bitmaps, requests in flight,
waiters, the callbacks that are ready, in their order, timers, device contents and calls in flight,
the frames of all suspended coroutines (with what lies on their stacks), how far each actor has
come, and what the checkers remember. Objects get numbers in the order in which they are found, so
that two states are alike when they differ in identities only. What is left out: counters
(FleeceStats), names for messages, and moments, of which only the order between them counts.

An object of an unknown kind is taken apart to what it refers to, so new state of the engine gets
into the key by itself. What is left out by name is in OPAQUE and LEFT_OUT.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import marshal
import types
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from bitarray import bitarray

from tests.simulation.calls import REQUEST, Call
from tests.simulation.history import GuestWrite
from tests.simulation.requests import ClientRequest, GuestRead, GuestRequest
from tests.simulation.watch import FleeceWatch
from tests.simulation.world import SimDisk

from .devices import ACTOR, OrderDevice
from .loop import OrderLoop

if TYPE_CHECKING:
    from .actors import Actor
    from .world import OrderWorld

ATOMS = frozenset({int, str, bool, float, type(None)})
BYTES = (bytes, bytearray, memoryview)
OPAQUE = frozenset({"FleeceStats", "Logger", "OrderWorld", "Checkers", "OrderLoop", "_Middle"})
"""Kinds of objects that make no difference, or are taken apart elsewhere."""
LEFT_OUT = {
    "Disk": {"name", "device", "size", "writes", "read_now", "read"},
    "Fleece": {
        "disk", "name", "size", "cluster_size", "temp", "access", "copy", "done", "stats",
        "copy_before_write", "read_now", "read", "trim_now", "trim", "status", "access_status",
    },
    "FleeceState": {
        "name", "source", "target", "size", "cluster_size", "shift", "clusters", "stats",
        "on_cbw_error", "cbw_timeout_s", "temp_limit", "_bits",
    },
}  # fmt: skip
"""Attributes that are constant, found elsewhere, or only counted."""
FROM_THE_TYPE = (
    types.ModuleType, type, types.CodeType, types.FrameType, types.TracebackType,
)  # fmt: skip


def key_of(world: OrderWorld) -> bytes:
    """The state's key."""
    return hashlib.blake2b(marshal.dumps(parts_of(world), 2), digest_size=16).digest()


def parts_of(world: OrderWorld) -> tuple[Any, ...]:
    """What the key is made of, for a look at why two states differ."""
    see = _Seer(world).see
    loop = world.loop
    return (
        loop.time(),
        world.failures_left,
        tuple([_actor(actor, see) for actor in world.actors]),
        tuple([see(handle) for handle in loop.ready_handles()]),
        tuple([(timer.when(), see(timer)) for timer in loop.timers()]),
        tuple([_device(device, see) for device in world.devices]),
        tuple([see(disk.engine_disk) for disk in world.disks]),
        tuple([see(watch.fleece) for watch in world.checkers.watches]),
        tuple([_watch(watch, world) for watch in world.checkers.watches]),
        tuple([_disk(disk, see) for disk in world.disks]),
        tuple([see(client) for client in world.clients_pending]),
        tuple([plan.name for plan in world.armings_pending]),
        tuple(world.sessions),
    )


def _actor(actor: Actor, see: Callable[[Any], Any]) -> Any:
    return actor.made, see(actor.task) if actor.busy else None, tuple(actor.answers)


def _device(device: OrderDevice, see: Callable[[Any], Any]) -> Any:
    # In which order calls began makes no difference.
    calls = sorted(device.calls, key=lambda c: (c.kind, c.offset, c.length, device.actors[c]))
    waiters = device._close_waiters
    return (
        hash(bytes(device.content)),
        hash(bytes(device.space)),
        device.closed,
        tuple([(device.actors[call], see(call)) for call in calls]),
        tuple([see(waiter) for waiter in waiters]),
    )


def _watch(watch: FleeceWatch, world: OrderWorld) -> Any:
    failures = [
        (
            offset,
            end,
            tuple([r.sent <= moment for disk in world.disks for r in _in_order(disk.pending)]),
        )
        for moment, offset, end in watch.failures
    ]
    return (
        watch.name,
        hash(watch.t0),
        hash(bytes(watch.asked)),
        bytes(watch.freed),
        watch.punch_failed,
        watch.read_once,
        watch.dead_at,
        watch.installed_at,
        tuple(failures),
        tuple(watch.ranges_in_flight),
    )


def _in_order(writes: list[Any]) -> list[Any]:
    """Writes in an order that does not depend on when they were sent."""
    return sorted(writes, key=lambda w: (w.kind, w.offset, w.length, w.data or b""))


def _disk(disk: SimDisk, see: Callable[[Any], Any]) -> Any:
    writes = _in_order(disk.history.writes)
    described = tuple(
        [
            (
                see(write),
                write.failed,
                write.acknowledged,
                write in disk.pending,
                tuple([other.replied < write.sent for other in writes]),
                tuple([_change(change) for change in write.changes]),
            )
            for write in writes
        ]
    )
    reads = sorted(
        (
            seen.offset,
            hash(seen.data),
            tuple([write.sent <= seen.ended for write in writes]),
            tuple([write.replied < seen.began for write in writes]),
        )
        for seen in disk.reads_seen
    )
    counted = see({task for task in disk.counted if not task.done()})
    return described, tuple(reads), disk.holds, counted, disk.held_since, disk.held_before_s


def _change(call: Call) -> Any:
    return call.offset, call.length, call.fails, call.ended, call.began_at, call.ended_at


class _Seer:
    """Takes objects apart, and numbers them."""

    def __init__(self, world: OrderWorld) -> None:
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []
        """So that no number is given twice: identities last as long as their objects."""
        self._world = world

    def see(self, value: Any) -> Any:
        """The value as a tuple of atoms; an object that was met before as its number."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind in BYTES:
            return len(value), hash(bytes(value))
        if kind is tuple:
            return tuple([self.see(item) for item in value])
        number = self._numbers.get(id(value))
        if number is not None:
            return ("#", number)
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        handler = _HANDLERS.get(kind)
        if handler is not None:
            return handler(self, value)
        return self._other(value, kind)

    def _other(self, value: Any, kind: type) -> Any:
        name = kind.__name__
        if name in OPAQUE:
            return name
        if isinstance(value, FROM_THE_TYPE):
            return getattr(value, "__name__", name)
        if isinstance(value, BaseException):
            return name, self.see(value.args), str(value)
        names = _attributes(kind)
        attributes = getattr(value, "__dict__", None)
        if names or attributes is not None:
            left_out = LEFT_OUT.get(name, ())
            seen = [name]
            for attribute in names:
                if attribute not in left_out:
                    seen.append(self.see(getattr(value, attribute, None)))
            for attribute, item in (attributes or {}).items():
                if attribute not in left_out:
                    seen.append(self.see(item))
            return tuple(seen)
        return name, tuple([self.see(item) for item in gc.get_referents(value)])

    def items(self, value: Any) -> Any:
        return tuple([self.see(item) for item in value])

    def members(self, value: Any) -> Any:
        """A set: what was met before by its number, tasks by their names, the rest as it comes."""
        numbers = self._numbers
        new = len(numbers)
        names = {id(t): str(t.get_name()) for t in value if isinstance(t, asyncio.Task)}
        value = sorted(value, key=lambda v: (numbers.get(id(v), new), names.get(id(v), "")))
        return tuple([self.see(item) for item in value])

    def mapping(self, value: Any) -> Any:
        return tuple([(self.see(name), self.see(item)) for name, item in value.items()])

    def bits(self, value: Any) -> Any:
        return value.tobytes()

    def call(self, call: Call) -> Any:
        return (
            "call",
            call.kind,
            call.offset,
            call.length,
            call.landed,
            call.fails,
            call.hung,
            call.ended,
            call.began_at,
            call.keep_space,
            self.see(call.data),
            self.see(call.request),
            self.see(call.future),
        )

    def guest(self, request: GuestRequest) -> Any:
        return (
            "guest",
            request.kind,
            request.offset,
            request.length,
            self.see(request.data),
            request.sent_at,
            request.timers_s,
            request.untimed,
            request.failed,
            request.device_failed,
            request.held_before_s,
        )

    def read(self, seen: GuestRead) -> Any:
        # What it must see are the writes that were replied to before it began.
        replied = [
            write.replied < seen.began
            for disk in self._world.disks
            for write in _in_order(disk.history.writes)
        ]
        return "read", seen.kind, seen.offset, seen.device_failed, tuple(replied)

    def client(self, request: ClientRequest) -> Any:
        watch = request.watch.name
        failed = request.device_failed
        return "client", request.kind, watch, request.offset, request.length, failed

    def future(self, future: asyncio.Future[Any]) -> Any:
        outcome: Any = None
        if future.cancelled():
            outcome = "cancelled"
        elif future.done():
            failure = future._exception  # type: ignore[attr-defined]
            outcome = self.see(failure if failure is not None else future._result)  # type: ignore[attr-defined]
        callbacks = future._callbacks  # type: ignore[attr-defined]
        return (
            "future",
            future.done(),
            outcome,
            tuple([self.see(callback) for callback, _ in callbacks or ()]),
        )

    def task(self, task: asyncio.Task[Any]) -> Any:
        if task.done():
            return self.future(task)
        return (
            self.future(task),
            task._must_cancel,  # type: ignore[attr-defined]
            self.see(task._fut_waiter),  # type: ignore[attr-defined]
            self.see(task.get_coro()),
            tuple([self.context(r) for r in gc.get_referents(task) if type(r) is Context]),
        )

    def coroutine(self, coro: Any) -> Any:
        frame = coro.cr_frame
        if frame is None:
            return coro.__qualname__, "ended"
        return coro.__qualname__, frame.f_lasti, self.frame(coro), self.see(coro.cr_await)

    def generator(self, generator: Any) -> Any:
        frame = generator.gi_frame
        if frame is None:
            return generator.__qualname__, "ended"
        return generator.__qualname__, frame.f_lasti, self.frame(generator)

    def frame(self, suspended: Any) -> Any:
        """Its locals and what lies on its stack."""
        skipped = (types.CodeType, types.FrameType, types.FunctionType)
        found = [item for item in gc.get_referents(suspended) if not isinstance(item, skipped)]
        return tuple([self.see(item) for item in found])

    def handle(self, handle: asyncio.Handle) -> Any:
        callback, args = handle._callback, handle._args  # type: ignore[attr-defined]
        return self.see(callback), self.see(args), self.context(handle._context)  # type: ignore[attr-defined]

    def context(self, context: Context) -> Any:
        return self.see(context.get(REQUEST)), context.get(ACTOR)

    def bound(self, method: Any) -> Any:
        return getattr(method, "__name__", "step"), self.see(method.__self__)

    def function(self, function: Any) -> Any:
        cells = function.__closure__ or ()
        return function.__qualname__, tuple([self.see(_content(cell)) for cell in cells])

    def device(self, device: OrderDevice) -> Any:
        return device.name

    def opaque(self, value: Any) -> Any:
        return type(value).__name__


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _attributes(kind: type) -> list[str]:
    """The slots of a kind of object."""
    found = _SLOTS.get(kind)
    if found is None:
        names = [n for k in kind.__mro__ for n in _as_tuple(k.__dict__.get("__slots__", ()))]
        found = _SLOTS[kind] = [n for n in names if n not in ("__dict__", "__weakref__")]
    return found


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


async def _nothing() -> None:
    """For its type."""


_coro = _nothing()
_SLOTS: dict[type, list[str]] = {}
_HANDLERS: dict[type, Callable[[_Seer, Any], Any]] = {
    list: _Seer.items,
    deque: _Seer.items,
    set: _Seer.members,
    frozenset: _Seer.members,
    dict: _Seer.mapping,
    bitarray: _Seer.bits,
    Call: _Seer.call,
    GuestRequest: _Seer.guest,
    GuestWrite: _Seer.guest,
    GuestRead: _Seer.read,
    ClientRequest: _Seer.client,
    asyncio.Future: _Seer.future,
    asyncio.Task: _Seer.task,
    asyncio.Handle: _Seer.handle,
    asyncio.TimerHandle: _Seer.handle,
    type(_coro): _Seer.coroutine,
    types.GeneratorType: _Seer.generator,
    types.MethodType: _Seer.bound,
    types.BuiltinMethodType: _Seer.bound,
    types.FunctionType: _Seer.function,
    OrderDevice: _Seer.device,
    FleeceWatch: _Seer.opaque,
    SimDisk: _Seer.opaque,
    OrderLoop: _Seer.opaque,
    Context: _Seer.context,
}
_coro.close()
