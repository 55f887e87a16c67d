"""How fast a pull is, and how long it will take yet."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0
"""Seconds over which the rate is taken."""


class Meter:
    """Given what has been read now and then, in bytes; time comes in as an argument."""

    def __init__(self, now: float) -> None:
        self.began = now
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def look(self, now: float, read: int) -> float:
        """Bytes per second, of the last few seconds."""
        samples = self._samples
        samples.append((now, read))
        while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
            samples.popleft()
        then, before = samples[0]
        return (read - before) / (now - then) if now > then else 0.0

    def elapsed_s(self, now: float) -> float:
        """Since the beginning."""
        return now - self.began


def eta_s(left: int, rate: float) -> float | None:
    """Seconds for ``left`` bytes; None: nobody can know."""
    if left <= 0:
        return 0.0
    return left / rate if rate > 0 else None
