"""How long guest writes waited: a histogram of fixed size, for its quantiles.

Four classes an octave from 10 µs on, so that a quantile is told within a fifth of its value, in
the memory of a hundred numbers, however many waits there were. (The idea of HdrHistogram: classes
as wide as the value is large.)
"""

from __future__ import annotations

import math

SMALLEST_S = 1e-5
"""Waits below this share the first class."""
CLASSES_PER_OCTAVE = 4
CLASSES = 108
"""27 octaves: up to 20 minutes; what is longer shares the last class."""


class WaitTimes:
    """Counts of waits by their length."""

    __slots__ = ("_counts", "_longest_s", "count")

    def __init__(self) -> None:
        self.count = 0
        self._counts = [0] * CLASSES
        self._longest_s = 0.0

    def note(self, seconds: float) -> None:
        """One wait has ended."""
        place = 0
        if seconds > SMALLEST_S:
            place = min(
                math.ceil(CLASSES_PER_OCTAVE * math.log2(seconds / SMALLEST_S)), CLASSES - 1
            )
        self._counts[place] += 1
        self.count += 1
        if seconds > self._longest_s:
            self._longest_s = seconds

    def quantile(self, share: float) -> float:
        """Seconds that ``share`` (0 to 1) of the waits did not pass; 0 if there was none.

        The upper end of a class: at most 19 % too much, never too little.
        """
        wanted = math.ceil(share * self.count)
        seen = 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                if place == CLASSES - 1:
                    break
                return min(SMALLEST_S * 2 ** (place / CLASSES_PER_OCTAVE), self._longest_s)
        return self._longest_s
