"""A few hundred seeds in every test run; any number with ``make simulate SEEDS=N``."""

from __future__ import annotations

from collections import Counter

import pytest

from . import world
from .expect import too_small

CHUNKS = 8
SEEDS_PER_CHUNK = 75


@pytest.fixture(scope="module")
def met() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_checker_finds_anything(chunk: int, met: Counter[str]) -> None:
    first = chunk * SEEDS_PER_CHUNK
    outcomes = [world.run(seed) for seed in range(first, first + SEEDS_PER_CHUNK)]
    for outcome in outcomes:
        met.update(outcome.met)
        met["seeds"] += 1
    assert [
        f"seed {o.seed} ({o.kind}): {o.violation}" for o in outcomes if o.violation is not None
    ] == []


def test_the_seeds_met_what_they_are_there_for(met: Counter[str]) -> None:
    if not met["seeds"]:
        # Run alone: make the experience that the other tests would have made.
        for seed in range(SEEDS_PER_CHUNK * 2):
            met.update(world.run(seed).met)
            met["seeds"] += 1
    assert too_small(met, met["seeds"]) == []


@pytest.mark.parametrize("seed", [3, 22, 79, 368])
def test_a_seed_replays_the_same_run(seed: int) -> None:
    first = world.run(seed, tracing=True)
    second = world.run(seed, tracing=True)
    assert len(first.trace) > 50
    assert first.trace == second.trace
    assert first.met == second.met


def test_a_trace_changes_nothing() -> None:
    assert world.run(5, tracing=True).met == world.run(5).met
