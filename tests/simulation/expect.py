"""What a number of seeds must have met: a run that never saw a race proves nothing about it."""

from __future__ import annotations

from collections import Counter

PER_SEED = {
    "copies cancelled in flight": 0.5,
}
"""Events per seed, at least; about half of what was measured."""


def too_small(met: Counter[str], seeds: int) -> list[str]:
    """Sums that are smaller than they must be, as sentences."""
    return [
        f"{what}: {met[what]}, expected at least {share * seeds:g} in {seeds} seeds"
        for what, share in PER_SEED.items()
        if met[what] < share * seeds
    ]
