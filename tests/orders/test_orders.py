"""Every order of the quick scenarios, in every test run; all of them with ``make explore``."""

from __future__ import annotations

import pytest

from .explorer import explore
from .scenario import Scenario
from .scenarios import SCENARIOS

QUICK = [scenario for scenario in SCENARIOS if scenario.quick]


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_no_order_violates_anything(scenario: Scenario) -> None:
    result = explore(scenario)
    assert result.violation is None, f"{result.violation}: {result.choices}"
    assert result.complete
    assert result.orders > len(scenario.actors)
    assert result.outcomes


def test_scenarios_have_names_of_their_own_and_two_actors_or_more() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    assert [s.name for s in SCENARIOS if not 2 <= len(s.actors) <= 4] == []
    assert [s.name for s in SCENARIOS if s.clusters > 3] == []
