"""What a fleece is: its bitmaps, what is in flight, and the one step that releases a range.

Three bitmaps, with QEMU's names and meanings, and a fourth of ours:

    bitmap    a set bit means                                    who sets        who clears
    access    the backup client may read this cluster            arming          release only
    copy      copy it before the guest changes it                arming,         claim, release
                                                                 a failed copy
    done      the temp image holds the cluster's old data        a copy's end    release
    charged   the temp image may hold something else than a      before a temp   a punch's end
              hole here (a superset of what uses space)          data write

Between any two awaits ``copy`` and ``done`` are subsets of ``access``, and every cluster with its
``access`` bit is in exactly one of three states: ``copy``, ``done``, or one copy in flight.
``access`` is never set again. So a copy in flight counts exactly where ``access`` is still set:
that is all that "cancelled" means.

``charged`` has two uses. It is the set that ``temp_limit`` counts, and where it is clear the temp
image is known to read as zeroes, so that zeroes need no write there and no punch.

Order of stores in a release: ``access`` first, then ``copy`` and ``done``, since a kill can come
between two stores into a mapped file.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from bitarray import bitarray

from fleecenbd.engine.bitmap import Bitmap, zeroed_memory
from fleecenbd.engine.reqlist import RangeRequest, RequestList, Waiters
from fleecenbd.engine.room import Room
from fleecenbd.engine.shared_read import SharedRead
from fleecenbd.engine.store import FleeceBits, MemoryFleeceBits
from fleecenbd.engine.wait_times import WaitTimes
from fleecenbd.storage.device import Device, Losable

BREAK_SNAPSHOT = "break-snapshot"
"""on_cbw_error: the session breaks, the guest's write goes on."""
BREAK_GUEST_WRITE = "break-guest-write"
"""on_cbw_error: the guest's write fails with EIO, the session stays good."""
THROTTLE = "throttle"
"""on_cbw_error: as BREAK_SNAPSHOT; before that, guest writes that would copy are delayed."""
POLICIES = (BREAK_SNAPSHOT, BREAK_GUEST_WRITE, THROTTLE)

CLUSTER_SIZE_MIN = 4096
"""Bytes. A random 4 KiB guest write then copies 4 KiB."""
BITMAP_CLUSTERS_MAX = 64 << 20
"""The default cluster size is the smallest that keeps a bitmap at or under this."""


@dataclass(slots=True)
class FleeceStats:
    """Counters over a fleece's life; bytes where the name says so."""

    copies_started: int = 0
    copies_done: int = 0
    copies_cancelled: int = 0
    """Copies in flight that lost clusters to a release, wholly or in part."""
    copies_failed: int = 0
    copied_bytes: int = 0
    cloned_bytes: int = 0
    """Of these, and of copies that failed later: bytes that share the active image's blocks."""
    released_bytes: int = 0
    guest_waits: int = 0
    """Guest requests that had to wait for a copy or a frozen read."""
    guest_wait_s: float = 0.0
    guest_wait_max_s: float = 0.0
    guest_wait_times: WaitTimes = field(default_factory=WaitTimes)
    guest_released_by_trim: int = 0
    """Waiting guest requests that a release of their range woke."""
    frozen_waits: int = 0
    timeouts: int = 0
    throttled: int = 0
    """Guest requests that were delayed because the temp image was nearly full."""
    throttled_s: float = 0.0
    limit_hits: int = 0
    trims: int = 0
    trims_during_reads: int = 0
    """TRIMs that found a read of their range in flight."""
    reads_once: int = 0
    """READs that have released what they covered."""
    part_trims: int = 0
    """Clusters of which a TRIM covered a part only."""
    temp_clusters: int = 0
    """Clusters charged now."""
    temp_clusters_peak: int = 0


class Copy(RangeRequest):
    """A copy in flight. ``error`` is set when it failed on a cluster that then had access."""

    __slots__ = ("error", "lost", "shared")

    def __init__(self, first: int, end: int) -> None:
        super().__init__(first, end)
        self.error: OSError | None = None
        self.lost = False
        self.shared: SharedRead | None = None
        """The read that it has in common with copies of other fleeces, until it takes it."""


class Release(RangeRequest):
    """A released range whose temp space is being freed. ``error`` is set when that failed."""

    __slots__ = ("error", "untold")

    def __init__(self, first: int, end: int, *, untold: bool = False) -> None:
        super().__init__(first, end)
        self.error: OSError | None = None
        self.untold = untold
        """Nobody waits for it: READ_ONCE."""


class FrozenRead(RangeRequest):
    """A read of the active image in flight: guest writes to its clusters wait until it has ended.

    A READ freezes a run whose clusters are all alike (``asked`` is None): once it has lost
    ``access`` anywhere it can only fail, and nobody waits for it. A BLOCK_STATUS asks about a
    span at once; ``asked`` then holds a bit per cluster of the span that it really asks about,
    and its answer stays good wherever ``access`` is still set.
    """

    __slots__ = ("asked",)

    def __init__(self, first: int, end: int, asked: bitarray | None = None) -> None:
        super().__init__(first, end)
        self.asked = asked

    def holds_up(self, access: bitarray, first: int, end: int) -> bool:
        """Must a guest write to ``[first, end)`` wait for it?"""
        low, high = max(first, self.first), min(end, self.end)
        if low >= high:
            return False
        if self.asked is None:
            return access.find(0, self.first, self.end) < 0
        return (self.asked[low - self.first : high - self.first] & access[low:high]).any()


class FleeceState:
    """The state that block-copy, copy-before-write and snapshot access share.

    Only plain functions change it, on the loop's thread, so each is one step.
    """

    def __init__(
        self,
        name: str,
        source: Device,
        target: Device,
        *,
        cluster_size: int,
        on_cbw_error: str = BREAK_SNAPSHOT,
        cbw_timeout_s: float = 0.0,
        temp_limit: int | None = None,
        temp_reserve: int | None = 0,
        target_reads_zero: bool = True,
        bits: FleeceBits | None = None,
    ) -> None:
        """``target`` must be as large as ``source`` rounded up to whole clusters, so that the
        last, partial cluster can be punched whole. ``target_reads_zero``: it is empty, and holds no
        space.

        ``temp_reserve``: as engine.room.Room has it.

        ``bits``: where ``access`` and ``done`` live, as they are (``done`` where there is no
        access is dropped); None: in memory, with access everywhere.
        """
        if target.size < -(-source.size // cluster_size) * cluster_size:
            raise ValueError(f"the temp image of {name} is smaller than its disk's clusters")
        self.name = name
        self.source = source
        self.target = target
        self.size = source.size
        self.cluster_size = cluster_size
        self._bits = bits if bits is not None else MemoryFleeceBits(self.size, cluster_size)
        self.access = Bitmap(self.size, cluster_size, buffer=self._bits.access)
        self.done = Bitmap(self.size, cluster_size, buffer=self._bits.done)
        copy = zeroed_memory(len(self._bits.access), populate=True)
        self.copy = Bitmap(self.size, cluster_size, buffer=copy)
        self.charged = Bitmap(self.size, cluster_size, fill=not target_reads_zero)
        self.shift = self.access.shift
        self.clusters = self.access.clusters
        self.on_cbw_error = on_cbw_error
        self.cbw_timeout_s = cbw_timeout_s
        self.temp_limit = temp_limit
        self.throttles = on_cbw_error == THROTTLE
        self.copies: RequestList[Copy] = RequestList()
        self.frozen_reads: RequestList[FrozenRead] = RequestList()
        self.temp_reads: RequestList[RangeRequest] = RequestList()
        self.temp_writes: RequestList[RangeRequest] = RequestList()
        self.releases: RequestList[RangeRequest] = RequestList()
        self.guests = Waiters()
        self.trims = Waiters()
        self.dead = False
        """Broken or finished: its requests fail, and no guest waits for it."""
        self.broken: str | None = None
        """The root cause, once the session broke."""
        self.finished = False
        self.on_dead: list[Callable[[], None]] = []
        """Called once, in the step in which the fleece breaks or finishes."""
        self.stats = FleeceStats()
        self.room = Room(self, temp_reserve)
        self.stats.temp_clusters = 0 if target_reads_zero else self.clusters
        self.stats.temp_clusters_peak = self.stats.temp_clusters
        if bits is None:
            self.give_access(None)
        else:
            self.done.bits &= self.access.bits
            self.copy.bits[:] = self.access.bits & ~self.done.bits
        if isinstance(target, Losable):
            # Whatever the policy: without what was kept there is no point in time any more.
            target.on_lost = self._lost

    def give_access(self, clusters: bitarray | None) -> None:
        """Arming, once: the clusters that the backup may read, and that must be copied.

        ``clusters``: a bit per cluster; None: all. What is dead by then gets none.
        """
        if self.dead:
            return
        for bitmap in (self.copy, self.access):
            bitmap.bits[: self.clusters] = 1 if clusters is None else clusters

    # -- the one release -------------------------------------------------------------------

    def release(self, first: int, end: int) -> int:
        """Give up the clusters ``[first, end)``: used by TRIM, READ_ONCE, a break and ``finish``.

        Clears the bits and wakes every guest write that waits there; returns how many it woke.
        Temp space is the caller's business.
        """
        access = self.access.bits
        lost = access.count(1, first, end)
        if not lost:
            return 0
        for copy in self.copies:
            if (
                not copy.lost
                and copy.first < end
                and first < copy.end
                and access.find(1, max(first, copy.first), min(end, copy.end)) >= 0
            ):
                copy.lost = True
                self.stats.copies_cancelled += 1
        # Access first: a kill can come between two stores (docs/semantics.md, section 1).
        access[first:end] = 0
        self.copy.bits[first:end] = 0
        self.done.bits[first:end] = 0
        self.stats.released_bytes += lost << self.shift
        woken = self.guests.wake(first, end)
        for read in self.frozen_reads:
            # A frozen read that has just lost a part of its range holds up nobody any more.
            if read.first < end and first < read.end:
                woken += self.guests.wake(read.first, read.end)
        return woken

    # -- ends ------------------------------------------------------------------------------

    def break_session(self, cause: str) -> None:
        """The session is lost: flag first, then the cause, then everything is released."""
        if self.dead:
            return
        self._bits.mark_broken(cause)
        self.broken = cause
        self._die()

    def _lost(self, cause: str) -> None:
        self.break_session(f"its temp image is lost: {cause}")

    def note_failed(self, cause: str) -> None:
        """The session will fail, whatever comes: after a kill it is a broken one."""
        if self.broken is None:
            self._bits.mark_broken(cause)

    def finish(self) -> None:
        """The session is over; a broken one stays broken."""
        if self.finished:
            return
        self.finished = True
        if not self.dead:
            self._die()

    def _die(self) -> None:
        self.dead = True
        self.release(0, self.clusters)
        self.guests.wake_all()
        self.trims.wake_all()
        for callback in self.on_dead:
            callback()
        self.on_dead.clear()
        # The file is closed, and its space freed, when the last call on it has ended.
        self.target.close()

    def close_bits(self) -> None:
        """After the end, once nothing of this fleece is in flight: let go of the buffers."""
        self.access.detach()
        self.done.detach()
        self._bits.close()

    def death(self) -> OSError:
        """What every request gets after the end: before any EINVAL."""
        if self.broken is not None:
            return OSError(errno.EIO, f"{self.name} is broken: {self.broken}")
        return OSError(errno.ESHUTDOWN, f"{self.name}: the session is finished")

    # -- temp space ------------------------------------------------------------------------

    def charge(self, first: int, end: int) -> None:
        """Count the clusters as in use, before a temp write of data to them starts.

        Raises OSError(ENOSPC), with nothing charged, if the set would pass ``temp_limit``, or if
        there is no room left (NoRoom: as of the last look).
        """
        bits = self.charged.bits
        new = (end - first) - bits.count(1, first, end)
        if not new:
            return
        stats = self.stats
        total = stats.temp_clusters + new
        if self.temp_limit is not None and total << self.shift > self.temp_limit:
            stats.limit_hits += 1
            raise OSError(
                errno.ENOSPC,
                f"the temp image of {self.name} reached its limit of {self.temp_limit} bytes",
            )
        room = self.room
        left = room.left
        if left is not None:
            if new > left:
                raise room.error()
            room.left = left - new
        room.during += new
        bits[first:end] = 1
        stats.temp_clusters = total
        if total > stats.temp_clusters_peak:
            stats.temp_clusters_peak = total

    def uncharge(self, first: int, end: int) -> None:
        """A punch of the clusters has ended."""
        bits = self.charged.bits
        self.stats.temp_clusters -= bits.count(1, first, end)
        bits[first:end] = 0
        if self.throttles:
            self.room.punched()
            self.guests.wake_all()  # the delays are shorter now

    # -- what others wait for --------------------------------------------------------------

    def copy_in_flight(self, first: int, end: int) -> bool:
        """Is there a copy in flight in ``[first, end)`` where ``access`` is still set?"""
        find = self.access.bits.find
        for copy in self.copies:
            low = copy.first if copy.first > first else first
            high = copy.end if copy.end < end else end
            if low < high and find(1, low, high) >= 0:
                return True
        return False

    def frozen(self, first: int, end: int) -> bool:
        """Is there a frozen read that a guest write to ``[first, end)`` must wait for?"""
        access = self.access.bits
        return any(read.holds_up(access, first, end) for read in self.frozen_reads)
