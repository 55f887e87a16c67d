"""Parts of clusters that TRIMs have covered so far: a union of byte ranges for each cluster.

A client may TRIM less than a cluster at a time. Its parts add up, as a union and never by length
(the first half twice is half a cluster), until they are the whole. The table is bounded: when it
is full the oldest entry is forgotten, and its cluster simply stays.
"""

from __future__ import annotations

PARTS_MAX = 1024
"""Clusters of which a part is remembered."""
RANGES_MAX = 64
"""Byte ranges kept for one cluster; past it the cluster is forgotten."""


class PartTable:
    """Byte ranges within clusters; offsets are relative to the cluster's start."""

    def __init__(self, parts_max: int = PARTS_MAX) -> None:
        self._parts_max = parts_max
        self._parts: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, cluster: int, start: int, end: int, whole: int) -> bool:
        """Add bytes ``[start, end)``; True (and forgotten) once ``[0, whole)`` is covered."""
        merged = []
        for low, high in self._parts.pop(cluster, ()):
            if low <= end and start <= high:
                start, end = min(start, low), max(end, high)
            else:
                merged.append((low, high))
        if start == 0 and end == whole:
            return True
        merged.append((start, end))
        if len(merged) > RANGES_MAX:
            return False
        self._parts[cluster] = merged
        if len(self._parts) > self._parts_max:
            del self._parts[next(iter(self._parts))]
        return False

    def forget(self, first: int, end: int) -> None:
        """The clusters ``[first, end)`` have been released."""
        if not self._parts:
            return
        for cluster in [c for c in self._parts if first <= c < end]:
            del self._parts[cluster]


def covered_whole(offset: int, length: int, size: int, shift: int) -> tuple[int, int]:
    """The clusters ``[first, end)`` that one range covers whole; none where end <= first.

    The last cluster of a disk of ``size`` bytes ends with the disk.
    """
    mask = (1 << shift) - 1
    stop = offset + length
    return (offset + mask) >> shift, (stop + mask if stop == size else stop) >> shift
