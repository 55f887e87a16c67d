"""Where what must outlive the server lives: protocols, and memory, where nothing does.

The engine writes bits into buffers that a store gives it, and tells the store when the description
of disks, sessions and bitmaps has to be replaced. What a buffer is (a mapped file), and what the
description looks like, only the store knows.

A buffer of bits is ``Bitmap.bitmap_length`` bytes, little-endian within a byte. A kill may fall
between any two stores into one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fleecenbd.engine.bitmap import Bitmap, zeroed_memory

if TYPE_CHECKING:
    from fleecenbd.engine.session import Session


class FleeceBits(Protocol):
    """The bitmaps of one fleece, where they live."""

    access: bytearray | memoryview
    done: bytearray | memoryview
    own: bytearray | memoryview | None

    def mark_broken(self, cause: str) -> None:
        """The fleece breaks, or its session will fail. A plain call, and the first thing of a
        break, before any write goes uncopied. It must not raise; the first cause stays."""

    def close(self) -> None:
        """No more use of the buffers; the engine holds no view of them any more."""


class RecordingBits(Protocol):
    """The bits of one recording bitmap, where they live."""

    buffer: bytearray | memoryview

    def mark_lost(self, cause: str) -> None:
        """They cannot be trusted any more, after a kill neither. A plain call, which must not
        raise; the first cause stays."""

    def close(self) -> None:
        """No more use of the buffer; the engine holds no view of it any more."""


class Store(Protocol):
    """Makes buffers, and replaces the description. Everything raises OSError."""

    async def make_fleece_bits(
        self, session_id: str, disk: str, size: int, cluster_size: int, granularity: int | None
    ) -> FleeceBits:
        """Buffers of zeroes, their space allocated in full. ``granularity`` None: no own bits."""

    async def make_recording_bits(
        self, disk: str, bitmap_id: str, size: int, granularity: int
    ) -> RecordingBits:
        """A buffer of zeroes, its space allocated in full."""

    async def commit(
        self, *, adding: Session | None = None, removing: Session | None = None
    ) -> None:
        """Replace the description by one of what is true now, with ``adding`` and its bitmaps
        (``bitmaps_with``), and without ``removing``. What fails changes nothing.

        From here on ``adding`` is in every description until it has ended or is removed: another
        commit may come before its recording bits are cleared. One commit at a time."""


class Stamps(Protocol):
    """Who notes when the active image is being changed. Plain calls, which must not raise."""

    def begin(self) -> None:
        """An active write starts with this step."""

    def end(self) -> None:
        """An active write has ended."""


class MemoryFleeceBits:
    """The bitmaps of one fleece, in memory."""

    def __init__(self, size: int, cluster_size: int, granularity: int | None = None) -> None:
        length = Bitmap.bitmap_length(size, cluster_size)
        self.access: bytearray | memoryview = zeroed_memory(length, populate=True)
        self.done: bytearray | memoryview = zeroed_memory(length)
        self.own: bytearray | memoryview | None = None
        if granularity is not None:
            self.own = bytearray(Bitmap.bitmap_length(size, granularity))

    def mark_broken(self, cause: str) -> None:
        """Nothing outlives the process."""

    def close(self) -> None:
        """The memory goes with the object."""


class _MemoryRecordingBits:
    def __init__(self, size: int, granularity: int) -> None:
        self.buffer: bytearray | memoryview = bytearray(Bitmap.bitmap_length(size, granularity))

    def mark_lost(self, cause: str) -> None:
        """Nothing outlives the process."""

    def close(self) -> None:
        """The memory goes with the object."""


class _MemoryStore:
    async def make_fleece_bits(
        self, session_id: str, disk: str, size: int, cluster_size: int, granularity: int | None
    ) -> FleeceBits:
        """Zeroes in memory."""
        return MemoryFleeceBits(size, cluster_size, granularity)

    async def make_recording_bits(
        self, disk: str, bitmap_id: str, size: int, granularity: int
    ) -> RecordingBits:
        """Zeroes in memory."""
        return _MemoryRecordingBits(size, granularity)

    async def commit(
        self, *, adding: Session | None = None, removing: Session | None = None
    ) -> None:
        """Nothing is described."""


MEMORY: Store = _MemoryStore()
"""Nothing outlives the process."""
