"""The copy loop over kills, lost targets and faults, in virtual time."""

from __future__ import annotations

from collections import Counter

import pytest

from fleecenbd.client import journal
from tests.client.planted_pull import PULL_BUGS, PullBug, planted
from tests.client.sim_pull import SMALL, World
from tests.simulation.loop import Deadlock

SEEDS = 300


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(journal, "COMPACT_LENGTH_MIN", 512)


def test_no_kill_and_no_loss_costs_a_byte() -> None:
    met: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            met += World(seed).run()
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    print(met)


@pytest.mark.parametrize("bug", PULL_BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: PullBug) -> None:
    with planted(bug):
        for seed in range(SEEDS):
            try:
                World(seed).run()
            except (AssertionError, Deadlock, KeyError, ValueError) as error:
                print(f"seed {seed}: {error!r}")
                return
    raise AssertionError(f"{SEEDS} seeds, and nobody noticed")
