"""What a number of seeds must have met: a run that never saw a race proves nothing about it."""

from __future__ import annotations

from collections import Counter

PER_SEED = {
    "copies": 2.0,
    "copies cancelled in flight": 1.8,
    "copies cancelled in part": 0.3,
    "copies failed": 0.45,
    "clones": 0.4,
    "guest writes": 20.0,
    "guest writes released by a TRIM": 4.0,
    "guest writes failed for a session's sake": 0.7,
    "frozen waits": 1.0,
    "timeouts": 0.4,
    "TRIMs during frozen reads": 1.5,
    "TRIMs during temp reads": 0.2,
    "partial releases": 1.5,
    "breaks": 0.1,
    "hung devices": 0.08,
    "limits hit": 0.3,
    "sessions armed": 1.3,
    "sessions finished": 0.6,
    "sessions ended with copies in flight": 0.25,
    "clients vanished": 0.7,
    "temp write failures": 0.2,
    "temp trim failures": 0.05,
    "zero claims": 0.3,
    "zero claims to guests": 0.5,
    "access map: in temp": 0.7,
    "failures on released clusters of a live copy": 0.005,
    "guest requests throttled": 0.1,
    "breaks for want of room": 0.012,
    "armings without room": 0.035,
}
"""Events per seed, at least: about half of what was measured over 3,000 seeds."""
SEEDS_ENOUGH = 200
"""Fewer seeds may miss what is rare."""


def too_small(met: Counter[str], seeds: int) -> list[str]:
    """Sums that are smaller than they must be, as sentences."""
    return [
        f"{what}: {met[what]}, expected at least {share * seeds:g} in {seeds} seeds"
        for what, share in PER_SEED.items()
        if met[what] < share * seeds
    ]
