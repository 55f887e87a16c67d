"""Checker G: is what a reader of the active image sees explained by the guests' writes?

Byte by byte: the data of some acknowledged write with no later acknowledged write (later: sent
after the other's reply), or the first content if there is none. A write that failed on the device
explains anything in the range of the failed call; a write that failed for a session's sake
explains nothing. An acknowledged TRIM explains zeroes and also that nothing has changed (a hint),
so it does not replace what was there before.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from .calls import Call


@dataclass(eq=False)
class GuestWrite:
    """A guest's WRITE, WRITE_ZEROES or TRIM, from the moment it was sent."""

    kind: str
    offset: int
    length: int
    sent: int
    """Moments are numbers that only grow: virtual time has many events at one moment."""
    data: bytes | None = None
    """None: zeroes."""
    replied: float = math.inf
    failed: bool = False
    changes: list[Call] = field(default_factory=list)
    """Calls on the active image on this write's behalf."""

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def acknowledged(self) -> bool:
        return self.replied < math.inf and not self.failed

    def overlaps(self, offset: int, end: int) -> bool:
        return self.offset < end and offset < self.end

    def explains(self, offset: int, seen: bytes) -> bool:
        """Could this write have left ``seen`` at ``offset`` (a range that it covers)?"""
        expected = bytes(len(seen))
        if self.data is not None:
            start = offset - self.offset
            expected = self.data[start : start + len(seen)]
        if self.acknowledged:
            return seen == expected
        end = offset + len(seen)
        for change in self.changes:
            overlaps = change.offset < end and offset < change.end
            if overlaps and (change.fails or seen == expected):
                return True
        return False

    def story(self) -> str:
        """The write, when it was sent and what came of it."""
        if self.failed:
            return f"{self}, failed at {self.replied}"
        if self.acknowledged:
            return f"{self}, acknowledged at {self.replied}"
        return f"{self}, pending"

    def __str__(self) -> str:
        return f"{self.kind} #{self.sent} {self.offset}+{self.length}"


class History:
    """Everything that guests sent to one disk."""

    def __init__(self, first_content: bytes) -> None:
        self.first_content = first_content
        self.writes: list[GuestWrite] = []

    def unexplained(
        self, offset: int, seen: bytes, began: float = math.inf, ended: float = math.inf
    ) -> str | None:
        """Why ``seen``, read at ``offset`` between the two moments, cannot be; None if it can."""
        end = offset + len(seen)
        writes = [w for w in self.writes if w.overlaps(offset, end) and w.sent <= ended]
        edges = {offset, end}
        for write in writes:
            edges.update(e for e in (write.offset, write.end) if offset < e < end)
            for change in write.changes if not write.acknowledged else ():
                edges.update(e for e in (change.offset, change.end) if offset < e < end)
        marks = sorted(edges)
        for start, stop in itertools.pairwise(marks):
            covering = [w for w in writes if w.offset <= start and stop <= w.end]
            piece = seen[start - offset : stop - offset]
            if not self._explained(covering, start, piece, began):
                return f"bytes {start}..{stop} are {piece[:8].hex()}; " + self._story(covering)
        return None

    def _explained(self, covering: list[GuestWrite], start: int, seen: bytes, began: float) -> bool:
        """Whether each byte has a write, or the first content, that explains it."""
        last_sent = max(
            (w.sent for w in covering if w.acknowledged and w.kind != "trim" and w.replied < began),
            default=-math.inf,
        )
        candidates = [w for w in covering if w.replied >= last_sent]
        if any(w.explains(start, seen) for w in candidates):
            return True
        first = self.first_content[start : start + len(seen)]
        if last_sent == -math.inf and seen == first:
            return True
        if len(seen) == 1:
            return False
        # Calls in flight at one time may have landed piece by piece: look at halves.
        half = len(seen) // 2
        return self._explained(covering, start, seen[:half], began) and self._explained(
            covering, start + half, seen[half:], began
        )

    def _story(self, covering: list[GuestWrite]) -> str:
        told = "; ".join(write.story() for write in covering[-6:])
        return f"writes there: {told or 'none'}"
