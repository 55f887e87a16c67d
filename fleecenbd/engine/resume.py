"""Takes a session up again from what a dead server left: buffers of bits, and temp images.

    access    as it is, without padding bits
    done      where there is access: elsewhere a kill came between two stores of a release
    copy      the rest of access: a copy that was in flight is made again, and the active image
              still holds the old data, since its guest write had not begun
    charged   what the temp image's extents say, or all
    released  what had access when the session was armed, and has none now
    own bits  as they are; the recording bitmap is used again by the session
    broken    it can only be finished as failed, and a bitmap that it made is lost

Whether what was left may be trusted (nobody else wrote to the active image, the page cache is
still there) is the caller's question, and asked before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from fleecenbd.engine.bitmap import Bitmap, cluster_runs
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.own_bits import OwnBits
from fleecenbd.engine.recording import RecordingBitmap, Since, scaled
from fleecenbd.engine.room import holds_space
from fleecenbd.engine.session import Session, SessionOptions
from fleecenbd.engine.state import FleeceState
from fleecenbd.engine.store import FleeceBits
from fleecenbd.storage.device import (
    EXTENT_HOLE,
    EXTENT_ZERO,
    Buffer,
    Data,
    Device,
    Extent,
    TrimmingMany,
)

logger = logging.getLogger(__name__)

HOLE = EXTENT_HOLE | EXTENT_ZERO

PUNCHED_AT_ONCE = 4096
"""Runs of released clusters that one call frees, where the temp image can free many at once."""


@dataclass(frozen=True)
class OwnRemains:
    """What the description says of a session's own bits; the bits are in ``FleeceBits.own``."""

    name: str
    mode: str
    """``use``, ``new`` or ``keep``."""
    recording: RecordingBitmap
    """The bitmap in ``Disk.bitmaps``, whose ``since`` is this session if it resets it."""
    since: Since | None
    """From where the own bits record."""
    reason: str | None = None
    made: bool = False
    replaced: RecordingBitmap | None = None


@dataclass(frozen=True)
class FleeceRemains:
    """What is left of one fleece."""

    disk: Disk
    cluster_size: int
    """Bytes."""
    bits: FleeceBits
    temp: Device | None
    """None only where it broke: its temp image went then."""
    broken: str | None = None
    """The cause, if it broke before, or if what is left cannot be trusted."""
    own: OwnRemains | None = None


async def resume_session(
    name: str,
    options: SessionOptions,
    remains: Sequence[FleeceRemains],
    *,
    session_id: str,
    armed_at: float,
    pause_s: float = 0.0,
    owner: str | None = None,
) -> Session:
    """The session as it was, over the same disks, which must not have guests yet.

    What has no access is punched out of the temp images; one that cannot be punched is logged,
    and keeps the space. Raises ValueError for buffers or a temp image of a wrong size.
    """
    fleeces = [await _resume_fleece(name, options, part) for part in remains]
    # One step: everything that awaits is behind us.
    for fleece in fleeces:
        fleece.disk.fleeces.append(fleece)
        if fleece.own is not None and fleece.own.resets:
            fleece.own.recording.used_by = name
            if fleece.own.replaced is not None:
                fleece.own.replaced.used_by = name
    return Session(
        name,
        options,
        fleeces,
        session_id=session_id,
        armed_at=armed_at,
        pause_s=pause_s,
        owner=owner,
    )


async def _resume_fleece(name: str, options: SessionOptions, remains: FleeceRemains) -> Fleece:
    disk = remains.disk
    label = f"{disk.name}@{name}"
    if remains.temp is None and remains.broken is None:
        raise ValueError(f"{label} is not broken, so it needs its temp image")
    state = FleeceState(
        label,
        disk.device,
        remains.temp if remains.temp is not None else _NoTemp(label, disk, remains.cluster_size),
        cluster_size=remains.cluster_size,
        on_cbw_error=options.on_cbw_error,
        cbw_timeout_s=options.cbw_timeout_s,
        temp_limit=options.temp_limit,
        temp_reserve=options.temp_reserve,
        bits=remains.bits,
    )
    own = _own_bits(disk, remains.bits, remains.own) if remains.own is not None else None
    state.stats.released_bytes = _released(state, own) << state.shift
    fleece = Fleece(disk, state, own)
    if remains.broken is not None:
        state.break_session(remains.broken)
        if own is not None and own.made and own.recording.lost is None:
            # If it had been finished as failed, nothing was recorded from then on.
            own.recording.lost = f"session {name}, which made it, failed"
    else:
        await _find_charged(state)
        await _punch_released(state)
        await state.room.look()
    return fleece


def _own_bits(disk: Disk, bits: FleeceBits, remains: OwnRemains) -> OwnBits:
    if bits.own is None:
        raise ValueError(f"the own bits of bitmap {remains.name} of {disk.name} are missing")
    return OwnBits(
        remains.name,
        remains.mode,
        remains.reason,
        remains.recording,
        Bitmap(disk.size, remains.recording.granularity, buffer=bits.own),
        since=remains.since,
        made=remains.made,
        replaced=remains.replaced,
    )


def _released(state: FleeceState, own: OwnBits | None) -> int:
    """Clusters that the backup might read when the session was armed, and may not read now."""
    access = state.access.bits[: state.clusters]
    if own is None or not own.dirty_only:
        return access.count(0)
    return (scaled(own.bitmap, state.cluster_size) & ~access).count(1)


async def _find_charged(state: FleeceState) -> None:
    """Charge every cluster of the temp image that may hold something else than a hole."""
    size = state.clusters << state.shift
    extents = [(size, 0)]
    if not holds_space(state.target):
        try:
            extents = await state.target.extents(0, size)
        except OSError as error:
            logger.warning("%s: its temp image tells no extents: %s", state.name, error.strerror)
    offset = 0
    for length, flags in extents:
        if flags & HOLE != HOLE:
            state.charged.bits[offset >> state.shift : -(-(offset + length) >> state.shift)] = 1
        offset += length
    state.stats.temp_clusters = state.charged.bits.count(1)
    state.stats.temp_clusters_peak = state.stats.temp_clusters


async def _punch_released(state: FleeceState) -> None:
    """Free what was released and not punched any more when the kill came.

    Of a temp image that took its space in advance that is all that was ever released: its holes
    cannot be told from space that was not used yet. A hole that is punched again costs little;
    a call into another thread for each would cost more.
    """
    released = state.charged.bits & ~state.access.bits[: state.clusters]
    runs = cluster_runs(released, 0, state.clusters)
    at_once = PUNCHED_AT_ONCE if isinstance(state.target, TrimmingMany) else 1
    while batch := list(islice(runs, at_once)):
        try:
            await _punch(state, batch)
        except OSError as error:
            # Whatever was punched before that is charged still, as is all that was not.
            logger.error("%s: temp space could not be freed: %s", state.name, error.strerror)
            return
        for first, end in batch:
            state.uncharge(first, end)


async def _punch(state: FleeceState, runs: Sequence[tuple[int, int]]) -> None:
    shift = state.shift
    ranges = [(first << shift, (end - first) << shift) for first, end in runs]
    if isinstance(state.target, TrimmingMany):
        await state.target.trim_many(ranges)
        return
    for offset, length in ranges:
        await state.target.trim(offset, length)


class _NoTemp:
    """Stands where a broken fleece's temp image was: nothing is asked of it any more."""

    hole_size = 4096

    def __init__(self, label: str, disk: Disk, cluster_size: int) -> None:
        self.name = f"the temp image of {label}"
        self.size = -(-disk.size // cluster_size) * cluster_size

    def _gone(self) -> OSError:
        return OSError(errno.EIO, "it went when the session broke", self.name)

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        """Raises OSError(EIO), as all calls do that would touch it."""
        raise self._gone()

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        """Raises OSError(EIO)."""
        raise self._gone()

    async def pread(self, offset: int, length: int) -> Buffer:
        """Raises OSError(EIO)."""
        raise self._gone()

    def pwrite_now(self, offset: int, data: Data) -> bool:
        """Raises OSError(EIO)."""
        raise self._gone()

    async def pwrite(self, offset: int, data: Data) -> None:
        """Raises OSError(EIO)."""
        raise self._gone()

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Raises OSError(EIO)."""
        raise self._gone()

    async def trim(self, offset: int, length: int) -> None:
        """Raises OSError(EIO)."""
        raise self._gone()

    def flush_now(self) -> bool:
        """Nothing to make durable."""
        return True

    async def flush(self) -> None:
        """Nothing to make durable."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Raises OSError(EIO)."""
        raise self._gone()

    def close(self) -> None:
        """It is closed."""

    async def wait_closed(self) -> None:
        """It is closed."""
