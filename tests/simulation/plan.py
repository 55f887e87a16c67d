"""What one seed decides before a run begins: disks, devices, sessions, who does what and when.

Everything here is drawn from ``random.Random`` of the seed and a name, so that a change to one
part of a plan leaves the other parts of the same seed as they were.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from .calls import Profile


@dataclass(frozen=True)
class DiskPlan:
    """One disk and its guests."""

    name: str
    size: int
    unit: int
    """The cluster size that sessions of this disk will have; requests are drawn around it."""
    content: bytes
    profile: Profile
    guests: int
    requests: int
    """Per guest."""
    depth: int
    """Requests of one guest that may be in flight at a time."""
    think_s: float
    vanish_chance: float


@dataclass(frozen=True)
class SessionPlan:
    """One session over one or more disks, and its clients."""

    name: str
    disks: tuple[int, ...]
    arms_at_s: float
    lives_s: float | None
    """Until ``finish``; None: it is never finished."""
    finish_failed: bool
    on_cbw_error: str
    cbw_timeout_s: float
    temp_limit_clusters: int | None
    cluster_size: int
    temp_profile: Profile
    make_temp_fails: bool
    deadline_s: float
    pulls: int
    pull_trims: float
    """Chance that a pull releases a range once it has it."""
    trimmers: int
    mappers: int
    vanish_chance: float
    readers_once: int = 0
    reserve_clusters: int = 0
    """What the temp images' file system keeps; 0: nobody asks it."""


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    seed: int
    kind: str
    now_chance: float
    """Chance that a client tries ``*_now`` before it awaits."""
    disks: tuple[DiskPlan, ...]
    sessions: tuple[SessionPlan, ...]
    limits: dict[str, float]
    """Limits of the engine that are lowered for this run (engine.LIMITS)."""
    reacts: float
    """Chance that a device call makes somebody do something about its range, while it lasts."""
    reactions_max: int
    room: RoomPlan | None = None


@dataclass(frozen=True)
class RoomPlan:
    """The file system of all temp images, which others use, too."""

    size: int
    """Bytes."""
    unit: int
    """Bytes that others take and give back at a time."""
    others: int
    """How often they do."""
    pause_s: float
    """How long they wait in between, at most."""
    latency_s: float
    """How long a question for its room takes, at most."""
    hangs: float
    """Chance that a question takes very long."""
    look_s: float
    """How often the sessions ask by themselves."""


KINDS = ("calm", "hung temp", "failing temp", "failing active", "crowd", "races", "limit", "long")


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"plan {seed}")
    kind = rng.choices(KINDS, weights=(2, 5, 8, 2, 4, 8, 4, 1))[0]
    now_chance = rng.choice((0.0, 0.5, 1.0, 1.0))
    reacts = rng.choice((0.0, 0.1, 0.3, 0.6))
    if kind == "failing temp":
        reacts = rng.choice((0.3, 0.6))
    disk_count = rng.choices((1, 2, 3), weights=(6, 3, 1))[0]
    if kind in ("races", "long"):
        disk_count = 1
    disks = tuple(
        _disk(random.Random(f"disk {seed} {number}"), kind, number, disk_count)
        for number in range(disk_count)
    )
    clones = _clones(random.Random(f"sharing {seed}"))
    session_count = rng.randrange(2, 5)
    if kind == "crowd":
        session_count = rng.randrange(4, 7)
    if kind == "long":
        session_count = rng.randrange(1, 3)
    sessions = tuple(
        _session(random.Random(f"session {seed} {number}"), kind, number, disks, clones)
        for number in range(session_count)
    )
    limits = _limits(rng, disks[0].unit) if rng.random() < 0.5 else {}
    if clones["clones"]:
        limits["CLONE_LENGTH_MIN"] = disks[0].unit * random.Random(f"long {seed}").choice((1, 2))
    plan = Plan(seed, kind, now_chance, disks, sessions, limits, reacts, reactions_max=100)
    rng = random.Random(f"full {seed}")
    return _full(plan, rng) if rng.random() < 0.25 else plan


def _full(plan: Plan, rng: random.Random) -> Plan:
    """The same, where temp images have a limit or a reserve, and most sessions throttle."""
    unit = max(disk.unit for disk in plan.disks)
    clusters = sum(-(-disk.size // unit) for disk in plan.disks)
    # Either the reserve matters, and is asked for all the time, or limits, delays and timers do.
    is_tight = rng.random() < 0.5
    reserve = rng.choice((1, 2, 4)) if is_tight else rng.choice((0, 0, 1))
    limit_max = 2 + clusters // len(plan.disks)
    short_s = rng.choice((0.05, 0.15, None))
    sessions = []
    for session in plan.sessions:
        profile = replace(session.temp_profile, space_max=None)
        timeout_s = rng.choice((session.cbw_timeout_s, 1.0, 20.0))
        limit = None
        if not is_tight:
            limit = rng.randrange(2, 1 + limit_max)
            if short_s is not None:
                timeout_s = short_s
                profile = replace(profile, hang={"write": 0.4}, late_chance=0.5, late_s=30.0)
        sessions.append(
            replace(
                session,
                on_cbw_error=rng.choice(("throttle", "throttle", session.on_cbw_error)),
                temp_limit_clusters=limit,
                reserve_clusters=reserve,
                cbw_timeout_s=timeout_s,
                temp_profile=profile,
                lives_s=rng.choice((session.lives_s, 2.0, None)),
                trimmers=rng.choice((0, 0, 1)),
                pull_trims=rng.choice((0.0, 0.1, 0.3)),
                readers_once=0,
            )
        )
    room = RoomPlan(
        size=unit * (reserve + 2 + rng.randrange(1, 2 + clusters)),
        unit=unit,
        others=rng.choice((0, 0, 30)) if is_tight else rng.choice((0, 5, 30)),
        pause_s=rng.choice((0.01, 0.02, 0.1)),
        latency_s=rng.choice((0.02, 0.1, 0.3)) if is_tight else rng.choice((0.001, 0.02, 0.2)),
        hangs=rng.choice((0.0, 0.0, 0.1)),
        look_s=rng.choice((0.001, 0.01)) if is_tight else rng.choice((0.01, 0.05, 1.0)),
    )
    limits = {**plan.limits, "LOW": rng.choice((0.0, 0.0, 0.3, 0.8))}
    return replace(plan, kind="full", sessions=tuple(sessions), room=room, limits=limits)


def _clones(rng: random.Random) -> dict[str, float]:
    """Of the temp images: how often they clone (in some seeds), and how often not after all."""
    chance = rng.choice((0.0, 0.5, 1.0))
    return {"clones": chance, "refuses_clone": rng.choice((0.0, 0.1, 0.5))}


def _limits(rng: random.Random, unit: int) -> dict[str, int]:
    return {
        "COPY_LENGTH_MAX": unit * rng.choice((1, 2, 3, 64)),
        "COPIES_MAX": rng.choice((1, 2, 3, 16)),
        "READ_NOW_LENGTH_MAX": unit * rng.choice((1, 4, 64)),
        "RANGES_MAX": rng.choice((1, 2, 64)),
        "WRITE_NOW_LENGTH_MAX": unit * rng.choice((1, 4, 64)),
        "PIECE_LENGTH_MAX": rng.choice((unit, unit * 2, unit + 512, 1 << 20)),
        "TRIM_PART_MIN": rng.choice((1, 4096, 4096)),
        "STATUS_WINDOW": unit * rng.choice((1, 2, 64)),
        "STATUS_EXTENTS_MAX": rng.choice((1, 3, 1 << 14)),
        "HOLE_LENGTH_MIN": rng.choice((256 << 10, unit, 0)),
    }


def _disk(rng: random.Random, kind: str, number: int, disk_count: int) -> DiskPlan:
    unit = rng.choice((4096, 4096, 4096, 8192, 16384))
    clusters = rng.randrange(1, 4) if kind == "races" else rng.randrange(2, 20)
    if kind == "failing temp":
        clusters = rng.randrange(4, 12)
    if kind == "long":
        few, many = (65536, rng.randrange(17, 40)), (4096, rng.randrange(257, 400))
        unit, clusters = rng.choice((few, many))
    size = unit * clusters + rng.choice((0, 0, 1, 512, 513, -1, -512, unit // 2, -(unit // 2)))
    size = max(size, rng.choice((1, 512, unit)))
    content = bytearray(rng.randbytes(size))
    zero_share = rng.choice((0.0, 0.3, 0.3, 0.7))
    if kind == "failing temp":
        # Copies of several runs, some of which fail.
        zero_share = rng.choice((0.2, 0.5))
    for cluster in range(-(-size // unit)):
        if rng.random() < zero_share:
            end = min(size, (cluster + 1) * unit)
            content[cluster * unit : end] = bytes(end - cluster * unit)
    profile = _profile(rng)
    if kind == "failing active":
        profile = replace(profile, fail={"read": 0.06, "write": 0.08, "zero": 0.1, "extents": 0.1})
    if kind in ("hung temp", "crowd") and rng.random() < 0.4:
        profile = replace(profile, hang={"read": 0.03, "extents": 0.03})
    if rng.random() < 0.03:
        profile = replace(profile, slow_chance=0.02, slow_factor=1000.0)
    requests = rng.randrange(12, 40) // disk_count + 2
    return DiskPlan(
        name=("vda", "vdb", "vdc")[number],
        size=size,
        unit=unit,
        content=bytes(content),
        profile=profile,
        guests=rng.choice((1, 2, 2, 3)),
        requests=4 + requests // 4 if kind == "long" else requests,
        depth=rng.choice((1, 2, 4, 8)),
        think_s=rng.choice((0.0, 0.002, 0.01, 0.05)),
        vanish_chance=rng.choice((0.0, 0.0, 0.1)),
    )


def _profile(rng: random.Random) -> Profile:
    slowest = rng.choice((0.004, 0.02, 0.02, 0.1))
    return Profile(
        latency_min_s=slowest / 30,
        latency_max_s=slowest,
        slow_chance=rng.choice((0.0, 0.05, 0.2)),
        slow_factor=rng.choice((5.0, 30.0)),
        quantum_s=rng.choice((0.0, 0.0, slowest / 4, slowest)),
        pieces_max=rng.choice((1, 2, 3, 5)),
        pace={"extents": rng.choice((1.0, 8.0)), "read": rng.choice((1.0, 1.0, 4.0))},
        now_read_chance=rng.choice((0.0, 0.0, 0.5, 0.5)),
        now_write_chance=rng.choice((0.0, 0.0, 0.9, 0.9)),
        fast_zero=rng.random() < 0.8,
    )


def _session(
    rng: random.Random,
    kind: str,
    number: int,
    disks: tuple[DiskPlan, ...],
    clones: dict[str, float],
) -> SessionPlan:
    chosen = tuple(sorted(rng.sample(range(len(disks)), rng.randrange(1, len(disks) + 1))))
    unit = max(disks[index].unit for index in chosen)
    slowest = max(disks[index].profile.latency_max_s for index in chosen)
    profile = _profile(rng)
    timeout_s = rng.choice((0.0, slowest * 3, slowest * 20, 5.0, 20.0))
    limit = None
    if kind == "hung temp":
        hang = rng.choice(({"write": 0.15, "zero": 0.15}, {"read": 0.1, "write": 0.1, "trim": 0.1}))
        profile = replace(profile, hang=hang, late_chance=rng.choice((0.0, 0.5, 0.9)))
        profile = replace(profile, late_s=rng.choice((slowest * 30, 30.0, 400.0)))
        if rng.random() < 0.4:
            dies = rng.uniform(0.01, 0.3)
            lives = dies + rng.choice((math.inf, 0.2, 60.0))
            profile = replace(profile, dies_at_s=dies, lives_again_at_s=lives)
        timeout_s = rng.choice((0.0, slowest * 3, slowest * 10, 1.0, 20.0))
    if kind == "failing temp" or (kind == "races" and rng.random() < 0.5):
        fail = rng.choice((0.2, 0.5))
        profile = replace(
            profile,
            pace={**profile.pace, "write": rng.choice((1.0, 4.0))},
            now_write_chance=rng.choice((0.0, 0.0, 0.9)),
            fail={"write": fail, "zero": fail, "trim": fail / 3, "read": fail / 3},
        )
        if rng.random() < 0.3:
            profile = replace(profile, space_max=unit * rng.randrange(1, 8))
    if kind == "limit":
        limit = rng.randrange(1, 6)
        fail = rng.choice((0.0, 0.1, 0.3))
        profile = replace(profile, fail={"write": fail, "trim": fail / 3})
    arms_at_s = rng.choice((0.0, 0.0, rng.uniform(0, 0.2)))
    if number:
        arms_at_s = rng.choice((rng.uniform(0, 0.3), rng.uniform(0, 1.0)))
    break_guest = 0.85 if kind == "limit" else 0.5
    return SessionPlan(
        name=f"s{number}",
        disks=chosen,
        arms_at_s=arms_at_s,
        lives_s=rng.choice((None, None, rng.uniform(0.01, 0.5), 2.0)),
        finish_failed=rng.random() < 0.3,
        on_cbw_error="break-guest-write" if rng.random() < break_guest else "break-snapshot",
        cbw_timeout_s=timeout_s,
        temp_limit_clusters=limit,
        cluster_size=unit,
        temp_profile=replace(profile, **clones),
        make_temp_fails=rng.random() < 0.04,
        deadline_s=rng.choice((5.0, 5.0, slowest)),
        pulls=rng.choice((0, 0, 1, 2)) if kind == "failing temp" else rng.choice((0, 1, 1, 2)),
        pull_trims=rng.choice((0.0, 0.0, 0.3, 1.0)),
        trimmers=rng.choice((0, 1, 1, 2)) if kind != "races" else rng.choice((1, 2, 2, 3)),
        mappers=rng.choice((0, 1, 1)),
        vanish_chance=rng.choice((0.0, 0.0, 0.1)),
        readers_once=rng.choice((0, 0, 0, 1, 2)),
    )
