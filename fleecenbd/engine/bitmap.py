"""One bit per cluster of a disk: offsets and lengths in, clusters inside.

The hot paths (copy_before_write, snapshot_access) have already turned their request into a
half-open range of cluster numbers ``[first, end)`` and look at ``bits`` themselves: a method call
costs more than the look. Everybody else goes through the methods here.

    cluster    0       1       2       3
    bytes    0..4095  ..8191  ..12287 ..size   (the last cluster may be partial)

Bits are stored little-endian within a byte, as in a file that a caller maps (``buffer``). Bits
past the last cluster stay clear.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from bitarray import bitarray

MAPPED_LENGTH_MIN = 1 << 20
"""Bytes. Longer bitmaps have memory of their own, straight from the kernel."""


class Bitmap:
    """A bit per cluster of a disk of ``size`` bytes; ``cluster_size`` is a power of two."""

    __slots__ = ("bits", "cluster_size", "clusters", "shift", "size")

    def __init__(
        self,
        size: int,
        cluster_size: int,
        *,
        fill: bool = False,
        buffer: bytearray | memoryview | None = None,
    ) -> None:
        """With ``buffer``, bits live there (as they are: ``fill`` must be left out).

        Raises ValueError for a cluster size that is no power of two, a size below one byte, or a
        buffer that is too small.
        """
        if size < 1:
            raise ValueError(f"a bitmap needs a disk of at least one byte, not {size}")
        if cluster_size < 1 or cluster_size & (cluster_size - 1):
            raise ValueError(f"cluster size {cluster_size} is not a power of two")
        self.size = size
        self.cluster_size = cluster_size
        self.shift = cluster_size.bit_length() - 1
        self.clusters = (size + cluster_size - 1) >> self.shift
        if buffer is None:
            length = self.bitmap_length(size, cluster_size)
            if length < MAPPED_LENGTH_MIN:
                self.bits = bitarray(self.clusters, endian="little")
                self.bits.setall(fill)
                return
            self.bits = bitarray(buffer=zeroed_memory(length, populate=fill), endian="little")
            if fill:
                self.bits.setall(1)
                self.bits[self.clusters :] = 0
            return
        if fill:
            raise ValueError("a buffer brings its own bits: fill must be left out")
        whole = bitarray(buffer=buffer, endian="little")
        if len(whole) < self.clusters:
            raise ValueError(f"a buffer of {len(whole)} bits cannot hold {self.clusters} clusters")
        if len(whole) != self.bitmap_length(size, cluster_size) * 8:
            raise ValueError(f"a buffer of {len(whole) // 8} bytes is not what this bitmap takes")
        whole[self.clusters :] = 0
        self.bits = whole

    def __str__(self) -> str:
        """A digit for each cluster, without what fills a buffer's last byte."""
        return self.bits[: self.clusters].to01()

    @staticmethod
    def bitmap_length(size: int, cluster_size: int) -> int:
        """Bytes that a buffer for such a bitmap takes."""
        return (-(-size // cluster_size) + 7) // 8

    def detach(self) -> None:
        """Let go of the caller's buffer: the bits go on in memory of their own."""
        self.bits = bitarray(self.bits)

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters ``[first, end)`` that the bytes touch."""
        if length <= 0:
            first = offset >> self.shift
            return first, first
        return offset >> self.shift, ((offset + length - 1) >> self.shift) + 1

    def bytes_of(self, first: int, end: int) -> tuple[int, int]:
        """(offset, length) of the clusters ``[first, end)``, clipped to the disk's size."""
        offset = first << self.shift
        return offset, min(end << self.shift, self.size) - offset

    def set(self, offset: int, length: int) -> None:
        """Set the bit of every cluster that the bytes touch."""
        first, end = self.span(offset, length)
        self.bits[first:end] = 1

    def clear(self, offset: int, length: int) -> None:
        """Clear the bit of every cluster that the bytes touch."""
        first, end = self.span(offset, length)
        self.bits[first:end] = 0

    def any(self, offset: int, length: int) -> bool:
        """Is a bit set, of a cluster that the bytes touch?"""
        first, end = self.span(offset, length)
        return first < end and self.bits.find(1, first, end) >= 0

    def all(self, offset: int, length: int) -> bool:
        """Is the bit set of every cluster that the bytes touch?"""
        first, end = self.span(offset, length)
        return first >= end or self.bits.find(0, first, end) < 0

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, bit) of each run of equal bits, clipped to the bytes asked for.

        The bits are looked at as the runs are taken: take them in one step.
        """
        stop = offset + length
        first, end = self.span(offset, length)
        bits = self.bits
        while first < end:
            bit = bits[first]
            next_first = bits.find(not bit, first, end)
            if next_first < 0:
                next_first = end
            run_stop = min(next_first << self.shift, stop)
            yield offset, run_stop - offset, bool(bit)
            offset, first = run_stop, next_first

    def count_bytes(self) -> int:
        """Bytes of the disk that lie in clusters whose bit is set."""
        total = self.bits.count(1, 0, self.clusters) << self.shift
        if self.bits[self.clusters - 1]:
            total -= (self.clusters << self.shift) - self.size
        return total


def zeroed_memory(length: int, *, populate: bool = False) -> bytearray | memoryview:
    """A buffer of zeroes; a long one takes no memory until it is written.

    The first touch of a page is a fault, which may cost more than all else that is done there:
    ``populate`` gets them all in one call, for a buffer that will be written all over.
    """
    if length < MAPPED_LENGTH_MIN:
        return bytearray(length)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, length, flags=flags | mmap.MAP_POPULATE if populate else flags))


def cluster_runs(bits: bitarray, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Each run ``[first, end)`` of set bits, in order; looked at as the runs are taken."""
    while (first := bits.find(1, first, end)) >= 0:
        stop = bits.find(0, first, end)
        if stop < 0:
            yield first, end
            return
        yield first, stop
        first = stop
