"""Recording bitmaps: which parts of a disk changed since a session.

A recording bitmap belongs to a disk. Its bits are set in the step that starts an active write,
before that write (``Disk``). Sessions that are armed with it copy and clear it (``own_bits``);
otherwise only ``clear`` and ``merge`` change it.

A bitmap that is lost is never used and never repaired: what begins a chain makes a new one in its
place, with an id of its own, and if that session fails the lost one is back.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from bitarray import bitarray

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.store import RecordingBits

GRANULARITY_DEFAULT = 64 << 10
"""Bytes of a disk that a bit of a recording bitmap stands for."""
GRANULARITY_MIN = 4096
GRANULARITY_MAX = 32 << 20

USE = "use"
NEW = "new"
USE_OR_NEW = "use-or-new"
KEEP = "keep"
MODES = (USE, NEW, USE_OR_NEW, KEEP)


def check_granularity(granularity: int) -> None:
    """Raises ValueError, with what is allowed."""
    if granularity & (granularity - 1) or not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        raise ValueError(
            f"granularity is a power of two from {GRANULARITY_MIN} to {GRANULARITY_MAX}, "
            f"not {granularity}"
        )


@dataclass(frozen=True)
class Since:
    """The session from whose moment a bitmap records."""

    session: str
    session_id: str
    armed_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class BitmapRequest:
    """What a session is to do with the bitmap called ``name``, on each of its disks.

    ``granularity`` (bytes) is that of a bitmap which has to be made; one that is there keeps its
    own. Raises ValueError.
    """

    name: str
    mode: str = USE_OR_NEW
    granularity: int = GRANULARITY_DEFAULT

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"a bitmap's mode is {', '.join(MODES)}, not {self.mode}")
        check_granularity(self.granularity)


class RecordingBitmap:
    """Which parts of a disk changed since ``since``; ``Disk`` sets its bits."""

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int = GRANULARITY_DEFAULT,
        *,
        bitmap_id: str | None = None,
        bits: RecordingBits | None = None,
        since: Since | None = None,
        lost: str | None = None,
    ) -> None:
        """``bits``: where they live, as they are; None: in memory, clear. Raises ValueError."""
        check_granularity(granularity)
        self.name = name
        self.id = bitmap_id if bitmap_id is not None else random_uuid()
        self.size = size
        self.granularity = granularity
        self.bitmap = Bitmap(size, granularity, buffer=bits.buffer if bits is not None else None)
        self.since = since
        self.lost = lost
        """Why its bits cannot be trusted; None: they can."""
        self.used_by: str | None = None
        """The session that resets it, from the start of its arming to its end."""
        self._bits = bits

    def lose(self, why: str) -> None:
        """Its bits cannot be trusted any more, whatever is written down of it, and when."""
        if self.lost is None:
            if self._bits is not None:
                self._bits.mark_lost(why)
            self.lost = why

    def close(self) -> None:
        """Let go of the buffer: its disk must no longer record in it."""
        self.bitmap.detach()
        if self._bits is not None:
            self._bits.close()
            self._bits = None


def scaled(source: Bitmap, granularity: int) -> bitarray:
    """The bits of ``source`` at another granularity: a bit for each part that it touches.

    Works on the bits as a whole: a loop over runs would hold guests for seconds on a large disk.
    """
    clusters = -(-source.size // granularity)
    bits = source.bits[: source.clusters]
    if granularity < source.cluster_size:
        factor = source.cluster_size // granularity
        wide = bitarray(len(bits) * factor, endian="little")
        wide.setall(0)
        wide[::factor] = bits
        step = 1
        while step < factor:
            wide |= wide >> step
            step *= 2
        return wide[:clusters]
    factor = granularity // source.cluster_size
    step = 1
    while step < factor:
        bits |= bits << step
        step *= 2
    return bits[::factor]


def merge(source: RecordingBitmap, target: RecordingBitmap) -> None:
    """Add what changed according to ``source`` to ``target``; granularities may differ.

    A target without a ``since`` takes that of the source: both record, so from now on it holds
    what changed since then. Raises OSError: EBUSY, EINVAL when one of them is lost or the sizes
    differ.
    """
    for bitmap in (source, target):
        _check_free(bitmap, "merged")
        if bitmap.lost is not None:
            raise OSError(
                errno.EINVAL,
                f"bitmap {bitmap.name} is lost ({bitmap.lost}) and cannot be merged",
            )
    if source.size != target.size:
        raise OSError(
            errno.EINVAL,
            f"bitmap {source.name} is of {source.size} bytes and {target.name} of "
            f"{target.size}: only bitmaps of one disk can be merged",
        )
    merge_bits(source.bitmap, target.bitmap)
    if target.since is None:
        target.since = source.since


def merge_bits(source: Bitmap, target: Bitmap) -> None:
    """Set every bit of ``target`` whose part a set bit of ``source`` touches."""
    target.bits[: target.clusters] |= scaled(source, target.cluster_size)


def check_clearable(bitmap: RecordingBitmap) -> None:
    """Raises OSError: EBUSY while a session resets it, EINVAL when it is lost."""
    _check_free(bitmap, "cleared")
    if bitmap.lost is not None:
        raise OSError(
            errno.EINVAL,
            f"bitmap {bitmap.name} is lost ({bitmap.lost}): remove it and add it again, "
            "or begin a session with mode new",
        )


def clear(bitmap: RecordingBitmap) -> None:
    """Forget what has changed until now; the bitmap then belongs to no session's chain.

    For a bitmap that records, ``Disk.clear_bitmap``: it keeps the writes in flight.

    Raises OSError: EBUSY, EINVAL when it is lost.
    """
    check_clearable(bitmap)
    bitmap.bitmap.bits.setall(0)
    bitmap.since = None


def check_removable(bitmap: RecordingBitmap) -> None:
    """Raises OSError(EBUSY) while a session resets it."""
    _check_free(bitmap, "removed")


def _check_free(bitmap: RecordingBitmap, what: str) -> None:
    if bitmap.used_by is not None:
        raise OSError(
            errno.EBUSY,
            f"bitmap {bitmap.name} is used by session {bitmap.used_by} and cannot be {what} "
            "before that is finished",
        )
