"""A store in simulated time: buffers, a description, and what a kill leaves of both."""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import dataclass, field, replace
from typing import Any

from fleecenbd.engine.bitmap import Bitmap

from .kills import Killer
from .plan import SessionPlan


@dataclass
class FleeceFile:
    """The bits of one fleece, as on disk."""

    access: bytearray
    done: bytearray
    own: bytearray | None
    broken: str | None = None

    def copy(self) -> FleeceFile:
        own = bytearray(self.own) if self.own is not None else None
        return FleeceFile(bytearray(self.access), bytearray(self.done), own, self.broken)


@dataclass(frozen=True)
class BitmapEntry:
    """A recording bitmap, in the description."""

    disk: str
    name: str
    id: str
    granularity: int
    since: Any
    lost: str | None


@dataclass(frozen=True)
class OwnEntry:
    """A fleece's own bits, in the description."""

    name: str
    mode: str
    reason: str | None
    since: Any
    made: bool
    recording: BitmapEntry
    replaced: BitmapEntry | None


@dataclass(frozen=True)
class FleeceEntry:
    """A fleece, in the description."""

    disk: str
    cluster_size: int
    own: OwnEntry | None


@dataclass(frozen=True)
class SessionEntry:
    """A session, in the description."""

    name: str
    id: str
    armed_at: float
    plan: SessionPlan
    fleeces: tuple[FleeceEntry, ...]


@dataclass(frozen=True)
class Description:
    """What is described, and which session's backup the checker then held for the last good one."""

    sessions: tuple[SessionEntry, ...] = ()
    bitmaps: tuple[BitmapEntry, ...] = ()
    last_good: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Disk:
    """All that outlives the server, but for the images."""

    fleeces: dict[tuple[str, str], FleeceFile] = field(default_factory=dict)
    recording: dict[tuple[str, str], bytearray] = field(default_factory=dict)
    description: Description = field(default_factory=Description)
    crashed: bool = False
    """The machine was started anew, and no description says so yet."""

    def copy(self) -> Disk:
        return Disk(
            {key: file.copy() for key, file in self.fleeces.items()},
            {key: bytearray(bits) for key, bits in self.recording.items()},
            replace(self.description, last_good=dict(self.description.last_good)),
            self.crashed,
        )


class _FleeceBits:
    def __init__(self, file: FleeceFile, killer: Killer | None) -> None:
        self.access, self.done, self.own = file.access, file.done, file.own
        self._file = file
        self._killer = killer

    def mark_broken(self, cause: str) -> None:
        if self._killer is not None:
            self._killer.point()
        self._file.broken = self._file.broken or cause

    def close(self) -> None:
        """The file goes with the description that names it no more."""


class _RecordingBits:
    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer

    def mark_lost(self, cause: str) -> None:
        raise AssertionError("no image changes its size here")

    def close(self) -> None:
        """As above."""


class SimStore:
    """The engine's Store; every stage of a call is a point at which a kill may fall."""

    def __init__(self, world: Any, disk: Disk, killer: Killer | None, rng: random.Random) -> None:
        self.disk = disk
        self._world = world
        self._killer = killer
        self._rng = rng
        self._sessions: dict[str, tuple[Any, SessionPlan]] = {}
        """Those that are described until they have ended, with their plans."""
        self.plans: dict[str, SessionPlan] = {}
        self._turn = asyncio.Lock()
        self.fails = 0.04

    def _point(self) -> None:
        if self._killer is not None:
            self._killer.point()

    async def _stage(self, longest_s: float = 0.004) -> None:
        self._point()
        await asyncio.sleep(self._rng.random() * longest_s)
        self._point()

    def _may_fail(self, what: str) -> None:
        if self._rng.random() < self.fails:
            raise OSError(errno.ENOSPC, f"simulated: no room for {what}")

    def taken_up(self, session: Any, plan: SessionPlan) -> None:
        """The description names it already."""
        self._sessions[session.id] = (session, plan)

    def fleece_bits(self, session_id: str, disk: str) -> Any:
        return _FleeceBits(self.disk.fleeces[session_id, disk], self._killer)

    def recording_bits(self, disk: str, bitmap_id: str) -> Any:
        return _RecordingBits(self.disk.recording[disk, bitmap_id])

    async def make_fleece_bits(
        self, session_id: str, disk: str, size: int, cluster_size: int, granularity: int | None
    ) -> Any:
        await self._stage()
        self._may_fail("bits")
        length = Bitmap.bitmap_length(size, cluster_size)
        own = bytearray(Bitmap.bitmap_length(size, granularity)) if granularity else None
        file = FleeceFile(bytearray(length), bytearray(length), own)
        self.disk.fleeces[session_id, disk] = file
        return self.fleece_bits(session_id, disk)

    async def make_recording_bits(
        self, disk: str, bitmap_id: str, size: int, granularity: int
    ) -> Any:
        await self._stage()
        self._may_fail("a bitmap")
        self.disk.recording[disk, bitmap_id] = bytearray(Bitmap.bitmap_length(size, granularity))
        return self.recording_bits(disk, bitmap_id)

    async def commit(self, *, adding: Any = None, removing: Any = None) -> None:
        async with self._turn:
            if self._killer is not None:
                self._killer.event("commit")
            # Guests go on while a session's end is described: let them write.
            await self._stage(0.004 if removing is None else 0.04)
            if adding is not None:
                self._may_fail("a description")
                self._world.chain.described(adding)
                self._sessions[adding.id] = (adding, self.plans[adding.id])
            if removing is not None:
                self._sessions.pop(removing.id, None)
            self._replace()
            self._point()
            self._world.chain.check("a description was replaced")
            await self._stage()

    def _replace(self) -> None:
        for key, (session, _) in list(self._sessions.items()):
            if session.state == "finished":
                del self._sessions[key]
        sessions = [session for session, _ in self._sessions.values()]
        bitmaps: list[BitmapEntry] = []
        for disk in self._world.disks:
            known = {name: (b, b.since) for name, b in disk.engine_disk.bitmaps.items()}
            for session in sessions:
                for fleece in session.fleeces:
                    own = fleece.own
                    if fleece.disk is disk.engine_disk and own is not None and own.resets:
                        known[own.name] = (own.recording, session.since)
            bitmaps += [_bitmap(disk.name, b, since) for b, since in known.values()]
        described = tuple(_session(s, plan) for s, plan in self._sessions.values())
        last_good = dict(self._world.chain.last_good)
        self.disk.description = Description(described, tuple(bitmaps), last_good)
        self.disk.crashed = False
        # Files that no description names are swept, but for those of armings under way.
        named = {session.id for session in sessions} | set(self._world.arming)
        for key in [key for key in self.disk.fleeces if key[0] not in named]:
            del self.disk.fleeces[key]


def _bitmap(disk: str, bitmap: Any, since: Any) -> BitmapEntry:
    return BitmapEntry(disk, bitmap.name, bitmap.id, bitmap.granularity, since, bitmap.lost)


def _session(session: Any, plan: SessionPlan) -> SessionEntry:
    return SessionEntry(
        session.name,
        session.id,
        session.armed_at,
        plan,
        tuple(
            FleeceEntry(fleece.disk.name, fleece.cluster_size, _own(fleece, session))
            for fleece in session.fleeces
        ),
    )


def _own(fleece: Any, session: Any) -> OwnEntry | None:
    own, disk = fleece.own, fleece.disk.name
    if own is None:
        return None
    replaced = own.replaced
    return OwnEntry(
        own.name,
        own.mode,
        own.reason,
        own.since,
        own.made,
        _bitmap(disk, own.recording, session.since if own.resets else own.recording.since),
        _bitmap(disk, replaced, replaced.since) if replaced is not None else None,
    )
