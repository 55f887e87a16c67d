"""What there is to see of disks and sessions, as plain values: for the control socket, metrics.

Sizes are bytes, times seconds, moments seconds since the epoch. docs/control.md explains each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.session import Session
from fleecenbd.server.server import Server

Uris = Callable[[str], Sequence[str]]
"""An export's name to the NBD URIs that lead to it."""


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk. ``sessions``: those that are not finished. ``clients``: who they are."""

    name: str
    image: str
    size: int
    read_only: bool
    uris: list[str]
    clients: list[str]
    sessions: list[str]
    guest_writes: int
    """Requests that may have changed the disk since it is served."""


@dataclass(frozen=True, slots=True)
class CopiesView:
    """Copies of old data, counted."""

    in_flight: int
    done: int
    cancelled: int
    """Those that a release overtook, wholly or in part."""
    failed: int


@dataclass(frozen=True, slots=True)
class WaitView:
    """How long guest writes waited for old data to be kept; those that did wait."""

    count: int
    mean: float
    p99: float
    """At most 19 % too much, and never too little."""
    max: float


@dataclass(frozen=True, slots=True)
class TempView:
    """A temp image: bytes of old data that it holds."""

    now: int
    peak: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class FleeceView:
    """One disk in one session."""

    disk: str
    export: str
    uris: list[str]
    broken: str | None
    """Why it broke; null if it did not."""
    size: int
    cluster_size: int
    accessible: int
    """Bytes that may still be read."""
    released: int
    copied: int
    temp: TempView
    copies: CopiesView
    guest_wait: WaitView
    clients: list[str]


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session. ``state``: ``active``, ``broken`` (see ``reason``) or ``finished`` (``result``:
    ``success`` or ``failed``); a finished one is as it was just before its end."""

    name: str
    id: str
    owner: str | None
    state: str
    reason: str | None
    result: str | None
    armed_at: float
    finished_at: float | None
    pause_ms: float
    """How long guest writes were held."""
    on_cbw_error: str
    cbw_timeout: float
    temp_limit: int | None
    ttl: float | None
    ttl_left: float | None
    idle_ttl: float | None
    idle_ttl_left: float | None
    disks: list[FleeceView]


@dataclass(frozen=True, slots=True)
class Life:
    """What the engine does not know of a session: whose it is, and how long it may live."""

    owner: str | None = None
    ttl: float | None = None
    ttl_left: float | None = None
    idle_ttl: float | None = None
    idle_ttl_left: float | None = None


def disk_view(server: Server, disk: Disk, uris: Uris) -> DiskView:
    return DiskView(
        name=disk.name,
        image=disk.device.name,
        size=disk.size,
        read_only=server.read_only,
        uris=list(uris(disk.name)),
        clients=[client.peer for client in server.clients_of(disk.name)],
        sessions=[fleece.name.partition("@")[2] for fleece in disk.fleeces],
        guest_writes=disk.writes,
    )


def fleece_view(server: Server, fleece: Fleece, uris: Uris) -> FleeceView:
    state, stats = fleece.state, fleece.stats
    shift = state.shift
    return FleeceView(
        disk=fleece.disk.name,
        export=fleece.name,
        uris=list(uris(fleece.name)),
        broken=fleece.broken,
        size=fleece.size,
        cluster_size=fleece.cluster_size,
        # The last cluster may reach past the end of the disk.
        accessible=min(state.access.bits.count(1) << shift, fleece.size),
        released=min(stats.released_bytes, fleece.size),
        copied=stats.copied_bytes,
        temp=TempView(
            now=stats.temp_clusters << shift,
            peak=stats.temp_clusters_peak << shift,
            limit=state.temp_limit,
        ),
        copies=CopiesView(
            in_flight=len(state.copies),
            done=stats.copies_done,
            cancelled=stats.copies_cancelled,
            failed=stats.copies_failed,
        ),
        guest_wait=WaitView(
            count=stats.guest_waits,
            mean=stats.guest_wait_s / stats.guest_waits if stats.guest_waits else 0.0,
            p99=stats.guest_wait_times.quantile(0.99),
            max=stats.guest_wait_max_s,
        ),
        clients=[client.peer for client in server.clients_of(fleece.name)],
    )


def session_view(server: Server, session: Session, life: Life, uris: Uris) -> SessionView:
    """As it is now; the session is not finished."""
    disks = [fleece_view(server, fleece, uris) for fleece in session.fleeces]
    broken = [f"{disk.export}: {disk.broken}" for disk in disks if disk.broken is not None]
    options = session.options
    return SessionView(
        name=session.name,
        id=session.id,
        owner=life.owner,
        state=session.state,
        reason=broken[0] if broken else None,
        result=None,
        armed_at=session.armed_at,
        finished_at=None,
        pause_ms=session.pause_s * 1000,
        on_cbw_error=options.on_cbw_error,
        cbw_timeout=options.cbw_timeout_s,
        temp_limit=options.temp_limit,
        ttl=life.ttl,
        ttl_left=life.ttl_left,
        idle_ttl=life.idle_ttl,
        idle_ttl_left=life.idle_ttl_left,
        disks=disks,
    )
