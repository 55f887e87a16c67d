"""The copy loop over kills, lost targets and faults, in virtual time."""

from __future__ import annotations

import pytest

from tests.client import hunt_pull
from tests.client.planted_pull import PULL_BUGS, PullBug


def test_no_kill_and_no_loss_costs_a_byte() -> None:
    met = hunt_pull.run(range(hunt_pull.SEEDS))
    print(dict(met))
    assert met["complete"] >= hunt_pull.SEEDS
    # A simulation that meets nothing shows nothing.
    for what in ("kills", "lost", "resumed", "trims", "compactions", "failed EIO"):
        assert met[what] >= 30, what
    assert met["stopped"] >= 3


@pytest.mark.parametrize("bug", PULL_BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: PullBug) -> None:
    seeds, said = hunt_pull.hunt(bug)
    print(f"after {seeds}: {said}")
    assert 0 < seeds <= hunt_pull.SEEDS
