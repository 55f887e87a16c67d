"""What a scenario is: disks of a few clusters, sessions, and actors with a few steps each.

Offsets and lengths are in clusters; halves of clusters are allowed. An actor makes its steps one
after the other: each begins at a moment that the run chooses, once the one before it has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.simulation.calls import Call

CLUSTER = 4096
GUEST_FIRST = "break-snapshot"
BACKUP_FIRST = "break-guest-write"


@dataclass(frozen=True)
class Step:
    """One request, or one deed."""

    kind: str
    first: float = 0
    count: float = 1
    of: str = "s"
    """The session, for steps of backup clients; the actor, for ``cancel``."""
    disk: str = "vda"
    fast: bool = False

    def __str__(self) -> str:
        if self.kind in ("finish", "arm", "cancel"):
            return f"{self.kind} {self.of}"
        if self.kind == "pause":
            return f"pause {self.first:g} s"
        whose = f" of {self.of}" if self.kind in ("read", "status", "release", "sent") else ""
        return f"{self.kind} {self.first:g}+{self.count:g}{whose}"


def write(first: float, count: float = 1, disk: str = "vda") -> Step:
    """A guest's WRITE."""
    return Step("write", first, count, disk=disk)


def zero(first: float, count: float = 1, *, fast: bool = False) -> Step:
    """A guest's WRITE_ZEROES."""
    return Step("zero", first, count, fast=fast)


def discard(first: float, count: float = 1) -> Step:
    """A guest's TRIM."""
    return Step("discard", first, count)


def look(first: float, count: float = 1) -> Step:
    """A guest's READ."""
    return Step("look", first, count)


def survey(first: float, count: float = 1) -> Step:
    """A guest's BLOCK_STATUS."""
    return Step("survey", first, count)


def read(first: float, count: float = 1, of: str = "s") -> Step:
    """A READ of a fleecing export."""
    return Step("read", first, count, of)


def status(first: float, count: float = 1, of: str = "s") -> Step:
    """A BLOCK_STATUS of a fleecing export."""
    return Step("status", first, count, of)


def release(first: float, count: float = 1, of: str = "s") -> Step:
    """A TRIM of a fleecing export."""
    return Step("release", first, count, of)


def sent(first: float, count: float = 1, of: str = "s") -> Step:
    """The reply to the actor's READ, which is a READ_ONCE, has left; nothing if there was none."""
    return Step("sent", first, count, of)


def arm(of: str) -> Step:
    """Arm a session that the scenario has as not yet armed."""
    return Step("arm", of=of)


def finish(of: str = "s") -> Step:
    """Finish a session."""
    return Step("finish", of=of)


def pause(seconds: float) -> Step:
    """Time passes before the actor's next step, or for the others alone."""
    return Step("pause", seconds)


def cancel(actor: str) -> Step:
    """The client of this actor goes away: what it has in flight is cancelled."""
    return Step("cancel", of=actor)


@dataclass(frozen=True)
class Session:
    """A session, over one disk or more. ``timeout_s`` 0: guests wait without end."""

    name: str = "s"
    policy: str = GUEST_FIRST
    timeout_s: float = 0.0
    limit: int | None = None
    """Clusters."""
    disks: tuple[str, ...] = ("vda",)
    armed: bool = True
    """From the beginning on; else by an ``arm`` step."""
    deadline_s: float = 5.0


Actors = Mapping[str, tuple[Step, ...]]
Calls = tuple[tuple[str, ...], ...]
"""(device, kind of call), or (device, kind, actor); a device is ``vda`` or ``temp vda@s``."""

NEVER, ALWAYS, EITHER, REFUSED = "never", "always", "either", "refused"


@dataclass(frozen=True)
class Scenario:
    """A small world, all of whose orders are explored."""

    name: str
    about: str
    actors: Actors
    clusters: float = 1
    zeroes: tuple[int, ...] = ()
    """Clusters that hold nothing at first."""
    sessions: tuple[Session, ...] = (Session(),)
    disks: tuple[str, ...] = ("vda",)
    prepare: tuple[Step, ...] = ()
    """Steps made, each to its end, before the exploration begins."""
    failures: int = 0
    """Calls that may fail, in all."""
    fails: Calls = (("temp vda@s", "write"),)
    hangs: Calls = ()
    """Calls that never end."""
    now: str = NEVER
    """Do the devices answer ``*_now`` at once?"""
    clones: str = NEVER
    """Do temp images clone? REFUSED: they say so, and don't."""
    pieces: bool = True
    halves: bool = False
    """Calls within one cluster land in two halves."""
    ends_apart: bool = False
    """A call's end is an event of its own, after its last piece."""
    every_step: bool = False
    """Events come between any two callbacks of the loop; else only when nobody is ready. The long
    set has all scenarios so."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits of the engine, lowered so that few clusters meet them."""
    quick: bool = True
    """Part of every test run: done in a few seconds."""

    def hangs_here(self, device: str, call: Call, actor: str) -> bool:
        """Does this call on behalf of ``actor`` never end?"""
        return _named(self.hangs, device, call, actor)

    def fails_here(self, device: str, call: Call, actor: str) -> bool:
        """May this call on behalf of ``actor`` fail?"""
        return _named(self.fails, device, call, actor)


def _named(calls: Calls, device: str, call: Call, actor: str) -> bool:
    return (device, call.kind) in calls or (device, call.kind, actor) in calls
