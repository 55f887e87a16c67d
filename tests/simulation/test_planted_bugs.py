"""A checker counts once a planted bug has shown that it catches: every one within 400 seeds."""

from __future__ import annotations

import sys

import pytest

from . import engine, mutations
from .planted import PLANTED, PlantedBug


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: PlantedBug, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    catch = mutations.hunt(bug)
    assert catch.violation is not None, f"{bug.name}: not caught in {catch.seeds} seeds"


def test_there_are_at_least_25_of_them_each_with_a_name_of_its_own() -> None:
    names = {bug.name for bug in PLANTED}
    assert len(names) == len(PLANTED)
    assert len(names) >= 25


def test_planting_leaves_the_real_engine_alone() -> None:
    before = {name: sys.modules[name] for name in sys.modules if name.startswith("fleecenbd")}
    real = engine.real()
    mutant = mutations.load(PLANTED[0])
    assert mutant.disk is not real.disk
    assert engine.real().disk is real.disk
    assert before.items() <= sys.modules.items()


def test_a_text_that_is_gone_is_an_error() -> None:
    bug = PlantedBug("nothing", "state", (("this text is not there", ""),))
    with pytest.raises(mutations.PlantingFailed, match="found 0 times in state"):
        mutations.load(bug)


def test_a_text_that_is_there_twice_is_an_error() -> None:
    bug = PlantedBug("too much", "state", (("self", "this"),))
    with pytest.raises(mutations.PlantingFailed, match="not once"):
        mutations.load(bug)
