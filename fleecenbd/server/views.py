"""What there is to see of disks and sessions, as plain values: for the control socket, metrics.

Sizes are bytes, times seconds, moments seconds since the epoch. docs/control.md explains each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.own_bits import OwnBits
from fleecenbd.engine.recording import RecordingBitmap, Since
from fleecenbd.engine.resizing import is_away
from fleecenbd.engine.session import Session
from fleecenbd.server.server import Server

Uris = Callable[[str], Sequence[str]]
"""An export's name to the NBD URIs that lead to it."""


@dataclass(frozen=True, slots=True)
class SinceView:
    """The session from whose moment a bitmap records."""

    session: str
    session_id: str
    armed_at: float


@dataclass(frozen=True, slots=True)
class BitmapView:
    """A recording bitmap. ``state``: ``good``, or ``lost`` (``reason``): a full backup is needed.

    ``since`` null: it was added or cleared, and belongs to no session's chain.
    """

    name: str
    id: str
    granularity: int
    state: str
    reason: str | None
    since: SinceView | None
    dirty: int
    """Bytes that have changed since then, in whole granules."""
    used_by: str | None
    """The session that resets it, and is not finished."""


@dataclass(frozen=True, slots=True)
class OwnBitmapView:
    """What became of a session's bitmap on one disk.

    ``mode``: what was really done; ``reason``: why ``use-or-new`` came to ``new``. ``since``,
    ``dirty``: of the bits that the session took, and whether it reads only these.
    """

    name: str
    id: str
    mode: str
    reason: str | None
    made: bool
    """There was none in good state: the session has made it."""
    granularity: int
    since: SinceView | None
    dirty: int


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk. ``sessions``: those that are not finished. ``clients``: who they are."""

    name: str
    image: str
    size: int
    image_size: int
    """Bytes that the image has now; other than ``size``, its sessions broke."""
    lost: str | None
    """Why every request fails; null."""
    away: bool
    """Its image's server is being connected to again: requests wait."""
    read_only: bool
    uris: list[str]
    clients: list[str]
    sessions: list[str]
    guest_writes: int
    """Requests that may have changed the disk since it is served."""
    bitmaps: list[BitmapView]


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
    throttled: int
    """Those that were delayed since the temp image was nearly full, and for how long in all."""
    throttled_time: float


@dataclass(frozen=True, slots=True)
class TempView:
    """A temp image: bytes of old data that it holds."""

    image: str
    """Path of its file, or URI; DISK@SESSION in a folder stands for a file without a name."""
    now: int
    peak: int
    limit: int | None
    room: int | None
    """What its file system has left for it, above the reserve, as of the last second; null: nobody
    is asked."""


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
    bitmap: OwnBitmapView | None


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
    temp_reserve: int | None
    """Bytes that a temp image's file system keeps free; null: the default."""
    read_once: bool
    """Its exports release what they have handed over."""
    ttl: float | None
    ttl_left: float | None
    idle_ttl: float | None
    idle_ttl_left: float | None
    disks: list[FleeceView]


@dataclass(frozen=True, slots=True)
class ChecksumView:
    """Of a whole backup (docs/pull.md); ``root`` in hexadecimal."""

    algorithm: str
    root: str


@dataclass(frozen=True, slots=True)
class JobProgressView:
    """How far a job is."""

    size: int
    to_copy: int
    """What has to become durable in all: the disk, or what is dirty of it."""
    resumed: int
    """Of that, what an earlier job has made durable."""
    durable: int
    """Of that, what is durable in the target now, ``resumed`` among it."""
    read: int
    released: int
    speed: float
    """Bytes read per second, as measured."""
    eta: float | None
    temp: int | None
    """Held in the temp image when it was looked at last."""
    elapsed: float


@dataclass(frozen=True, slots=True)
class JobView:
    """A backup that the server makes. ``state``: ``running``, ``paused``, ``complete``, ``failed``
    or ``cancelled`` (``error``: why the last two)."""

    id: str
    session: str
    session_id: str
    disk: str
    target: str
    state: str
    error: str | None
    note: str | None
    """The last thing that a user should know and that ended nothing, such as a lost connection."""
    kept: str | None
    """What is there for ``resume`` after a failure."""
    finish: bool
    """The session is to be finished with it."""
    result: str | None
    """What the session was finished as when this job had ended."""
    rate: int | None
    """The limit, in bytes per second."""
    pid: int | None
    started_at: float
    ended_at: float | None
    progress: JobProgressView | None
    """Null until everything is open."""
    checksum: ChecksumView | None
    verified: bool


@dataclass(frozen=True, slots=True)
class Life:
    """What the engine does not know of a session: how long it may live."""

    ttl: float | None = None
    ttl_left: float | None = None
    idle_ttl: float | None = None
    idle_ttl_left: float | None = None


def disk_view(server: Server, disk: Disk, uris: Uris) -> DiskView:
    return DiskView(
        name=disk.name,
        image=disk.device.name,
        size=disk.size,
        image_size=disk.image_size,
        lost=disk.lost,
        away=is_away(disk),
        read_only=server.read_only,
        uris=list(uris(disk.name)),
        clients=[client.peer for client in server.clients_of(disk.name)],
        sessions=[fleece.name.partition("@")[2] for fleece in disk.fleeces],
        guest_writes=disk.writes,
        bitmaps=[bitmap_view(bitmap) for bitmap in disk.bitmaps.values()],
    )


def bitmap_view(bitmap: RecordingBitmap) -> BitmapView:
    return BitmapView(
        name=bitmap.name,
        id=bitmap.id,
        granularity=bitmap.granularity,
        state="good" if bitmap.lost is None else "lost",
        reason=bitmap.lost,
        since=_since_view(bitmap.since),
        dirty=_set_bytes(bitmap.bitmap),
        used_by=bitmap.used_by,
    )


def own_view(own: OwnBits | None) -> OwnBitmapView | None:
    if own is None:
        return None
    return OwnBitmapView(
        name=own.name,
        id=own.bitmap_id,
        mode=own.mode,
        reason=own.reason,
        made=own.made,
        granularity=own.granularity,
        since=_since_view(own.since),
        dirty=_set_bytes(own.bitmap),
    )


def _since_view(since: Since | None) -> SinceView | None:
    return None if since is None else SinceView(since.session, since.session_id, since.armed_at)


def _set_bytes(bitmap: Bitmap) -> int:
    """The last cluster may reach past the end of the disk."""
    return min(bitmap.bits.count(1, 0, bitmap.clusters) << bitmap.shift, bitmap.size)


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
        accessible=_set_bytes(state.access),
        released=min(stats.released_bytes, fleece.size),
        copied=stats.copied_bytes,
        temp=TempView(
            image=fleece.temp.name,
            now=0 if fleece.freed else stats.temp_clusters << shift,
            peak=stats.temp_clusters_peak << shift,
            limit=state.temp_limit,
            room=None if (left := state.room.left) is None else max(0, left) << shift,
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
            throttled=stats.throttled,
            throttled_time=stats.throttled_s,
        ),
        clients=[client.peer for client in server.clients_of(fleece.name)],
        bitmap=own_view(fleece.own),
    )


def session_view(server: Server, session: Session, life: Life, uris: Uris) -> SessionView:
    """As it is now; the session is not finished."""
    disks = [fleece_view(server, fleece, uris) for fleece in session.fleeces]
    broken = [f"{disk.export}: {disk.broken}" for disk in disks if disk.broken is not None]
    options = session.options
    return SessionView(
        name=session.name,
        id=session.id,
        owner=session.owner,
        state=session.state,
        reason=broken[0] if broken else None,
        result=None,
        armed_at=session.armed_at,
        finished_at=None,
        pause_ms=round(session.pause_s * 1000, 3),
        on_cbw_error=options.on_cbw_error,
        cbw_timeout=options.cbw_timeout_s,
        temp_limit=options.temp_limit,
        temp_reserve=options.temp_reserve,
        read_once=options.read_once,
        ttl=life.ttl,
        ttl_left=life.ttl_left,
        idle_ttl=life.idle_ttl,
        idle_ttl_left=life.idle_ttl_left,
        disks=disks,
    )
