"""Every order is a net that holds: planted bugs that it catches, the quickest of them."""

from __future__ import annotations

import pytest

from .explorer import explore
from .planted import BUGS, FROM_THE_MODEL, ORDERS_ONLY, planted
from .scenarios import SCENARIOS

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
QUICKEST = (
    ("a guest does not wait for frozen reads", "write_read_trim", "T0"),
    ("the timer does not cover the wait for frozen reads", "hung_frozen", "L"),
    ("a timeout makes the clusters dirty again", "timeout_guest", "B"),
    ("a guest write in one step ignores copies in flight", "now_and_frozen", "T0"),
    ("a release does not wake those who wait for a read of a wider range", "hung_frozen_wide", "L"),
    ("a break or finish wakes nobody", "copies_queue", "L"),
    ("a claim leaves the copy bits set", "write_read_trim", "B"),
    ("a clone shares clusters that lost access meanwhile", "clone_trim", "S"),
    ("a clone that was refused counts as made", "clone_refused", "T0"),
    ("temp_limit is given back before the punch", "punch_fails", "S"),
    ("a read does not look again before its reply", "write_read_trim", "T0"),
    ("block status is not frozen", "stat", "T0"),
    ("block status does not look at access again", "stat_trim", "T0"),
    ("block status that has lost a part holds up nobody", "stat_part_released", "T0"),
    ("a guest's status begins at a sector", "guest_status", "G"),
)


@pytest.mark.parametrize(("bug", "scenario", "checker"), QUICKEST)
def test_a_planted_bug_is_caught_by_enumeration(bug: str, scenario: str, checker: str) -> None:
    result = explore(BY_NAME[scenario], planted(bug))
    assert result.violation is not None, f"not caught in {result.states} states"
    assert result.violation.startswith(f"{checker}:"), result.violation


def test_the_bugs_have_names_of_their_own_and_can_all_be_planted() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    for bug in (*FROM_THE_MODEL, *ORDERS_ONLY):
        assert planted(bug.name).disk is not None
