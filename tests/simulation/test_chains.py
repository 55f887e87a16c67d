"""Chains of backups over kills: some seeds in every test run, and bugs that checker C catches."""

from __future__ import annotations

from collections import Counter

import pytest

from . import chains, mutations
from .chain_planted import CHAIN_PLANTED
from .planted import PLANTED, PlantedBug

CHUNKS = 4
SEEDS_PER_CHUNK = 40
SEEDS_MAX = 400
"""Seeds in which a planted bug must be caught."""
PER_SEED = {
    "kills": 0.7,
    "kills between finish and its commit": 0.2,
    "kills while a session is armed": 0.12,
    "kills with active writes in flight": 0.3,
    "kills with copies in flight": 0.06,
    "crashes of the machine": 0.05,
    "sessions armed: keep": 0.3,
    "sessions armed: new": 0.4,
    "sessions armed: use": 0.15,
    "sessions armed: use-or-new": 0.8,
    "sessions failed": 0.9,
    "sessions that succeeded": 1.0,
    "sessions taken up": 0.2,
    "sessions taken up broken": 0.15,
    "sessions taken up that had been finished": 0.2,
    "breaks": 0.02,
}
"""Events per seed, at least: about half of what was measured over 1,000 seeds."""


@pytest.fixture(scope="module")
def met() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_change_is_forgotten(chunk: int, met: Counter[str]) -> None:
    first = chunk * SEEDS_PER_CHUNK
    outcomes = [chains.run(seed) for seed in range(first, first + SEEDS_PER_CHUNK)]
    for outcome in outcomes:
        met.update(outcome.met)
        met["seeds"] += 1
    assert [f"seed {o.seed}: {o.violation}" for o in outcomes if o.violation is not None] == []


def test_the_seeds_met_what_they_are_there_for(met: Counter[str]) -> None:
    if not met["seeds"]:
        # Run alone: make the experience that the other tests would have made.
        for seed in range(CHUNKS * SEEDS_PER_CHUNK):
            met.update(chains.run(seed).met)
            met["seeds"] += 1
    few = {what: met[what] for what, share in PER_SEED.items() if met[what] < share * met["seeds"]}
    assert few == {}


def test_a_seed_replays_the_same_lives() -> None:
    for seed in (3, 11, 204, 265):
        first, second = (chains.run(seed, tracing=True) for _ in range(2))
        assert len(first.trace) > 50
        assert first.trace == second.trace
        assert first.met == second.met


@pytest.mark.parametrize("bug", CHAIN_PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: PlantedBug, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    catch = mutations.hunt(bug, seeds_max=SEEDS_MAX, of=chains.run)
    assert catch.violation is not None, f"{bug.name}: not caught in {catch.seeds} seeds"


def test_the_bugs_have_names_of_their_own() -> None:
    names = [bug.name for bug in (*PLANTED, *CHAIN_PLANTED)]
    assert len(set(names)) == len(names)


def test_the_program_says_what_it_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert chains.main(["--seeds", "2"]) == 0
    told = capsys.readouterr().out
    assert "lives" in told
    assert told.endswith("no violation\n")
    assert chains.main(["--seed", "1"]) == 0
    assert "life 0" in capsys.readouterr().out
