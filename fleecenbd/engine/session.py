"""A session: one point in time over one or more disks, armed all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.own_bits import BitmapClaim, OwnBits
from fleecenbd.engine.recording import BitmapRequest, Since, scaled
from fleecenbd.engine.resizing import Alive
from fleecenbd.engine.room import holds_space, room_of
from fleecenbd.engine.state import (
    BITMAP_CLUSTERS_MAX,
    BREAK_SNAPSHOT,
    CLUSTER_SIZE_MIN,
    POLICIES,
    FleeceState,
)
from fleecenbd.engine.store import MEMORY, FleeceBits, Store
from fleecenbd.storage.device import Device

ARM_DEADLINE_S = 5.0
"""Seconds that guests are held at most while active writes in flight end."""
CLUSTER_SIZE_MAX = 32 << 20
"""Bytes. A TRIM aligned to the preferred block size must fit the largest request."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session behaves. Sizes in bytes, times in seconds.

    ``cbw_timeout_s`` 0: guest writes wait without end. ``temp_limit`` None: no limit.
    ``temp_reserve``: what the temp image's file system keeps free; None: default_reserve; 0: none.
    ``cluster_size`` None: the smallest that keeps a bitmap small. ``read_once``: every READ of its
    exports releases what it covers whole (``Fleece.release_read``); who serves them sees to that.
    """

    on_cbw_error: str = BREAK_SNAPSHOT
    cbw_timeout_s: float = 20.0
    temp_limit: int | None = None
    temp_reserve: int | None = None
    cluster_size: int | None = None
    read_once: bool = False

    def __post_init__(self) -> None:
        if self.on_cbw_error not in POLICIES:
            raise ValueError(
                f"on_cbw_error is one of {', '.join(POLICIES)}, not {self.on_cbw_error}"
            )
        if not 0 <= self.cbw_timeout_s < float("inf"):
            raise ValueError(f"cbw_timeout is a number of seconds, not {self.cbw_timeout_s}")
        if self.temp_limit is not None and self.temp_limit < 0:
            raise ValueError(f"temp_limit is a number of bytes, not {self.temp_limit}")
        if self.temp_reserve is not None and self.temp_reserve < 0:
            raise ValueError(f"temp_reserve is a number of bytes, not {self.temp_reserve}")
        size = self.cluster_size
        if size is not None and (
            size & (size - 1) or not CLUSTER_SIZE_MIN <= size <= CLUSTER_SIZE_MAX
        ):
            raise ValueError(
                f"cluster_size is a power of two from {CLUSTER_SIZE_MIN} to {CLUSTER_SIZE_MAX}, "
                f"not {size}"
            )


def default_cluster_size(size: int) -> int:
    """The smallest power of two that keeps one bitmap of ``size`` bytes at 64 Mi clusters."""
    cluster_size = CLUSTER_SIZE_MIN
    while -(-size // cluster_size) > BITMAP_CLUSTERS_MAX:
        cluster_size *= 2
    return cluster_size


class Session:
    """A point in time; made by ``arm``."""

    def __init__(
        self,
        name: str,
        options: SessionOptions,
        fleeces: list[Fleece],
        *,
        session_id: str,
        armed_at: float,
        pause_s: float,
        owner: str | None = None,
    ) -> None:
        self.name = name
        self.id = session_id
        self.owner = owner
        """A token of whoever began it, and who may ask for it again."""
        self.options = options
        self.fleeces = fleeces
        self.armed_at = armed_at
        """Seconds since the epoch."""
        self.pause_s = pause_s
        """Seconds that guest writes were held."""
        self.failed = False
        """Finished, and not as a success."""
        self._ended = False

    @property
    def since(self) -> Since:
        """What a bitmap that starts anew with this session records since."""
        return Since(self.name, self.id, self.armed_at)

    @property
    def state(self) -> str:
        """``active``, ``broken`` or ``finished``."""
        if any(fleece.finished for fleece in self.fleeces):
            return "finished"
        if any(fleece.broken is not None for fleece in self.fleeces):
            return "broken"
        return "active"

    def finish(self, *, failed: bool = False) -> None:
        """End the session over all its disks in one step. A broken one counts as failed.

        Its bitmaps are committed, or rolled back, and then it releases everything. A second call
        changes nothing. What the store has to do about it is the caller's business.
        """
        if self._ended:
            return
        self._ended = True
        self.failed = failed or self.state == "broken"
        if self.failed:
            # Decided, before the description says so: what rolls back here no longer records.
            for fleece in self.fleeces:
                fleece.state.note_failed("it was finished as failed")
        for fleece in self.fleeces:
            if fleece.own is not None:
                fleece.own.end(fleece.disk, failed=self.failed)
        for fleece in self.fleeces:
            fleece.finish()

    async def wait_closed(self) -> None:
        """Return when the last call on a temp image has ended (a hung one may never)."""
        for fleece in self.fleeces:
            await fleece.wait_closed()


MakeTemp = Callable[[Disk, int, str], Awaitable[Device]]
"""(disk, cluster size in bytes, id of the session) to an empty temp image, whose size is that of
the disk rounded up to a multiple of the cluster size and of its own ``hole_size``."""


class Guests(Protocol):
    """What runs in the guests, and may be put at rest: file systems, databases."""

    async def freeze(self) -> None:
        """All that may take its time has been made: put them at rest. Raises OSError: then there
        is no session."""

    def thaw(self) -> None:
        """``freeze`` was called, and their writes go on, whatever happened. A plain call, which
        must not raise."""


async def arm(
    name: str,
    disks: Sequence[Disk],
    options: SessionOptions,
    make_temp: MakeTemp,
    *,
    clock: Callable[[], float],
    deadline_s: float = ARM_DEADLINE_S,
    bitmap: BitmapRequest | None = None,
    store: Store = MEMORY,
    owner: str | None = None,
    session_id: str | None = None,
    guests: Guests | None = None,
) -> Session:
    """Begin a session over ``disks``: all of them at one moment, or none.

    ``clock`` gives the moment of arming (seconds since the epoch). ``bitmap``: what is done with
    which recording bitmap of each disk; ``Fleece.own`` says what became of it. ``session_id``
    None: a new UUID. ``guests``: frozen and thawed around the moment.

    Raises OSError, and leaves nothing behind: what ``make_temp``, ``store`` and ``guests`` raised,
    EINVAL for a cluster size below the temp image's block and a temp limit below one cluster,
    ETIMEDOUT when active writes were in flight, or the session not described, after ``deadline_s``,
    ENOENT, EBUSY or EINVAL for a bitmap that is not there, is used or is lost; EINVAL and EIO for
    an image that changes its size, or is lost, in between.
    """
    if session_id is None:
        session_id = random_uuid()
    claims: list[BitmapClaim | None] = []
    fleeces: list[Fleece] = []
    alive = Alive(disks)
    described: Session | None = None
    loop = asyncio.get_running_loop()
    try:
        for disk in disks:
            claims.append(BitmapClaim(disk, bitmap, name) if bitmap is not None else None)
        for disk, claim in zip(disks, claims, strict=True):
            making = _Making(name, session_id, disk, options, claim)
            fleeces.append(await making.fleece(make_temp, store))
        alive.check(fleeces)
        with contextlib.ExitStack() as let_go:
            if guests is not None:
                let_go.callback(guests.thaw)
                await guests.freeze()
            started = loop.time()
            for disk in disks:
                disk.hold()
                let_go.callback(disk.release_hold)
            # Another arming may have held them before: all together no longer than the deadline.
            deadline = min(disk.held_since for disk in disks) + deadline_s
            await _wait_idle(disks, deadline, deadline_s)
            # From here on no active write is in flight on any disk, and none begins.
            armed_at = clock()
            for fleece in fleeces:
                if fleece.own is not None:
                    fleece.own.take(fleece.disk)
                    if fleece.own.dirty_only:
                        fleece.state.give_access(scaled(fleece.own.bitmap, fleece.cluster_size))
            session = Session(
                name,
                options,
                fleeces,
                session_id=session_id,
                armed_at=armed_at,
                pause_s=0.0,
                owner=owner,
            )
            # Own bits first, then the description: only then may recording bits be cleared.
            described = session
            try:
                await _described(store, session, deadline, deadline_s)
                alive.check(fleeces)
            except BaseException:
                # Perhaps it is described all the same, and guests go on without it.
                for fleece in fleeces:
                    fleece.state.note_failed("its arming failed")
                raise
            # One step: every recording bitmap starts anew, and every fleece is installed.
            assert not any(disk.active_writes for disk in disks), "the guests are held"
            for fleece, claim in zip(fleeces, claims, strict=True):
                if fleece.own is not None and claim is not None:
                    fleece.own.begin(fleece.disk, session.since)
                    claim.armed()
                fleece.disk.fleeces.append(fleece)
        session.pause_s = loop.time() - started
    except BaseException:
        for claim in claims:
            if claim is not None:
                claim.drop()
        for fleece in fleeces:
            fleece.finish()
        if described is not None:
            # A description that may name the session must not outlive its bitmaps.
            with contextlib.suppress(OSError):
                await store.commit(removing=described)
        for fleece in fleeces:
            _close_unarmed(fleece)
        raise
    return session


def _close_unarmed(fleece: Fleece) -> None:
    """The arming failed: nothing was ever in flight here."""
    if fleece.own is not None:
        fleece.own.discard()
    fleece.close_bits()


async def _described(store: Store, session: Session, deadline: float, deadline_s: float) -> None:
    """Replace the description, while guests are held: no longer than that may take.

    A call that is late goes on, and the store makes those that follow wait for it.
    """
    loop = asyncio.get_running_loop()
    commit = loop.create_task(store.commit(adding=session), name=f"describe {session.name}")
    await asyncio.wait({commit}, timeout=max(0.0, deadline - loop.time()))
    if not commit.done():
        commit.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise OSError(
            errno.ETIMEDOUT,
            f"session {session.name} was not written down within the {deadline_s:g} s that guests "
            "may be held: the disk of the state directory does not answer",
        )
    commit.result()


async def _wait_idle(disks: Sequence[Disk], deadline: float, deadline_s: float) -> None:
    while busy := [disk for disk in disks if disk.active_writes]:
        if not await busy[0].wait_idle(deadline):
            raise OSError(
                errno.ETIMEDOUT,
                f"writes to {busy[0].name} were still in flight after {deadline_s:g} s",
            )


@dataclass(frozen=True)
class _Making:
    """A fleece in the making: a temp image, buffers, and a recording bitmap if need be."""

    session: str
    session_id: str
    disk: Disk
    options: SessionOptions
    claim: BitmapClaim | None

    @property
    def label(self) -> str:
        """DISK@SESSION."""
        return f"{self.disk.name}@{self.session}"

    async def fleece(self, make_temp: MakeTemp, store: Store) -> Fleece:
        """Make it. Raises OSError, and leaves nothing behind then."""
        disk, options = self.disk, self.options
        asked = options.cluster_size
        cluster_size = asked if asked is not None else default_cluster_size(disk.size)
        temp = await make_temp(disk, cluster_size, self.session_id)
        try:
            cluster_size = self._cluster_size(cluster_size, temp)
            room = await room_of(temp, options.temp_reserve, cluster_size, self.label)
            bits = await store.make_fleece_bits(
                self.session_id,
                disk.name,
                disk.size,
                cluster_size,
                self.claim.granularity if self.claim is not None else None,
            )
            own: OwnBits | None = None
            try:
                if self.claim is not None:
                    own = await self.claim.own_bits(bits, store)
                return self._put_together(temp, cluster_size, bits, own, room)
            except BaseException:
                if own is not None:
                    own.discard()
                bits.close()
                raise
        except BaseException:
            temp.close()
            raise

    def _cluster_size(self, cluster_size: int, temp: Device) -> int:
        asked = self.options.cluster_size
        if asked is not None and asked < temp.hole_size:
            raise OSError(
                errno.EINVAL,
                f"cluster size {asked} is below {temp.hole_size}, the block size of the temp "
                "image: smaller holes free nothing",
            )
        cluster_size = max(cluster_size, temp.hole_size)
        limit = self.options.temp_limit
        if limit is not None and holds_space(temp):
            raise OSError(
                errno.EINVAL,
                f"{self.label}: a preallocated temp image takes all of its "
                "space at the start; leave out the temp limit",
            )
        if limit is not None and limit < cluster_size:
            raise OSError(
                errno.EINVAL,
                f"{self.label}: a temp limit of {limit} bytes is less than one "
                f"cluster of {cluster_size} bytes, so that nothing could be kept; set it higher",
            )
        return cluster_size

    def _put_together(
        self,
        temp: Device,
        cluster_size: int,
        bits: FleeceBits,
        own: OwnBits | None,
        room: tuple[int, int],
    ) -> Fleece:
        state = FleeceState(
            self.label,
            self.disk.device,
            temp,
            cluster_size=cluster_size,
            on_cbw_error=self.options.on_cbw_error,
            cbw_timeout_s=self.options.cbw_timeout_s,
            temp_limit=self.options.temp_limit,
            temp_reserve=self.options.temp_reserve,
            target_reads_zero=not holds_space(temp),
            bits=bits,
        )
        state.room.told(*room)
        if own is None or not own.dirty_only:
            state.give_access(None)
        return Fleece(self.disk, state, own)
