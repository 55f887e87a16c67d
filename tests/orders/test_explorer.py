"""The explorer itself: pruning loses nothing, runs repeat, limits hold, traces can be read."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest

from tests.simulation import engine

from . import __main__ as program
from .choices import Choices, NotReplayable, following, parsed, written
from .explorer import explore, replay, shortest
from .planted import planted
from .scenario import Scenario, Session, look, read, release, write
from .scenarios import SCENARIOS

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
UNPRUNED = (
    "hung_frozen_wide", "timeout_guest", "timeout_chain", "read_runs", "punch_fails", "arm_two",
    "finish_reuse", "arm_deadline", "now_always", "cancelled_waits",
)  # fmt: skip
TWO = Scenario("two", "a guest write and a TRIM", {"g1": (write(0),), "t1": (release(0),)})
BAD = "a guest does not wait for frozen reads"


@pytest.mark.parametrize("name", UNPRUNED)
def test_pruning_loses_no_outcome_and_counts_every_order(name: str) -> None:
    scenario = BY_NAME[name]
    pruned, all_runs = explore(scenario), explore(scenario, prune=False)
    assert pruned.complete
    assert all_runs.complete
    assert pruned.outcomes == all_runs.outcomes
    assert pruned.orders == all_runs.runs > pruned.runs


def test_pruning_loses_nothing_between_any_two_callbacks_either() -> None:
    scenario = replace(TWO, every_step=True)
    pruned, all_runs = explore(scenario), explore(scenario, prune=False)
    assert pruned.outcomes == all_runs.outcomes
    assert pruned.orders == all_runs.runs > 300


def test_an_exploration_repeats_exactly() -> None:
    first, second = explore(BY_NAME["stat_trim"]), explore(BY_NAME["stat_trim"])
    assert (first.states, first.runs, first.orders) == (second.states, second.runs, second.orders)
    assert first.outcomes == second.outcomes


def test_an_exploration_ends_at_its_limit_and_says_so() -> None:
    result = explore(BY_NAME["write_read_trim"], states_max=50)
    assert 50 <= result.states < 80
    assert not result.complete
    assert result.violation is None


def test_a_violation_replays_from_its_choices() -> None:
    scenario = BY_NAME["write_read_trim"]
    mutant = planted(BAD)
    found = explore(scenario, mutant)
    assert found.violation is not None
    assert found.violation.startswith("T0")
    trace, violation = replay(scenario, found.choices, mutant)
    assert violation == found.violation
    assert trace[-1] == f"VIOLATION {violation}"
    _, on_the_real_engine = replay(scenario, found.choices, engine.real())
    assert on_the_real_engine is None


def test_the_shortest_violation_takes_no_more_choices() -> None:
    scenario = replace(BY_NAME["write_read_trim"], every_step=False)
    mutant = planted(BAD)
    short, found = shortest(scenario, mutant), explore(scenario, mutant)
    assert short.violation is not None
    assert len(short.choices) <= len(found.choices)


def test_a_deadlock_is_a_violation() -> None:
    result = explore(BY_NAME["hung_temp_trim"], planted("a release wakes nobody"))
    assert result.violation is not None
    assert result.violation.startswith("L")


def test_an_unpruned_exploration_finds_what_a_pruned_one_finds() -> None:
    scenario = BY_NAME["hung_frozen"]
    mutant = planted("the timer does not cover the wait for frozen reads")
    pruned, all_runs = explore(scenario, mutant), explore(scenario, mutant, prune=False)
    assert pruned.violation == all_runs.violation is not None


@pytest.mark.parametrize("first", ["r1", "g1"])
@pytest.mark.parametrize("every_step", [False, True])
def test_pruning_tells_a_read_before_a_reply_from_one_after_it(
    first: str, every_step: bool
) -> None:
    actors = {"r1": (look(0),), "g1": (write(0),)}
    actors = {name: actors[name] for name in sorted(actors, key=lambda name: name != first)}
    scenario = Scenario("stale", "a stale read", actors, sessions=(), every_step=every_step)
    result = explore(scenario, planted("a guest write is acknowledged before it has ended"))
    assert result.violation is not None
    assert result.violation.startswith("G")


def test_the_order_of_two_guest_writes_shows_in_the_outcomes() -> None:
    scenario = Scenario("w", "", {"g1": (write(0),), "g2": (write(0),)}, sessions=(Session(),))
    assert len(explore(scenario).outcomes) == 2


def test_a_read_may_come_before_the_release_or_after_it() -> None:
    scenario = Scenario("r", "", {"r1": (read(0),), "t1": (release(0),)})
    answers = {outcome[0] for outcome in explore(scenario).outcomes}
    assert len(answers) == 2


def test_choices_are_replayed_then_recorded() -> None:
    choices = Choices([1, 2])
    assert choices.replaying
    assert [choices.choose(2), choices.choose(1), choices.choose(3)] == [1, 0, 2]
    assert not choices.replaying
    assert choices.choose(4) == 0
    assert (choices.taken, choices.counts) == ([1, 2, 0], [2, 3, 4])


def test_choices_of_another_run_are_refused() -> None:
    with pytest.raises(NotReplayable, match="has 2 ways"):
        Choices([2]).choose(2)
    with pytest.raises(NotReplayable, match="has 3 ways"):
        Choices([1], [2]).choose(3)


def test_lists_of_choices_follow_each_other_depth_first() -> None:
    assert following([0, 1, 2], [2, 3, 3]) == [0, 2]
    assert following([1, 2], [2, 3]) is None


@pytest.mark.parametrize("choices", [[], [0], [1, 1], [0, 0, 0, 0, 2, 2, 2, 1, 10]])
def test_choices_can_be_written_and_read(choices: list[int]) -> None:
    assert parsed(written(choices)) == choices


def test_the_program_prints_a_row_per_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--quick", "--scenario", "arm_deadline", "tail"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["scenario", "tail", "arm_deadline", "2"]


def test_the_program_prints_the_trace_of_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    bug = "the timer does not cover the wait for frozen reads"
    assert program.main(["--quick", "--scenario", "hung_frozen", "--bug", bug]) == 1
    told = capsys.readouterr().out
    assert "VIOLATION L" in told
    arguments = pasted(told)
    assert program.main(arguments) == 1
    assert "VIOLATION L" in capsys.readouterr().out
    at = arguments.index("--bug")
    assert program.main(arguments[:at] + arguments[at + 2 :]) == 0
    assert capsys.readouterr().out.endswith("no violation\n")


@pytest.mark.parametrize("bug", [None, "two words", "a guest's status", 'quoted "so"'])
def test_the_command_that_replays_is_one_that_a_shell_and_make_take(bug: str | None) -> None:
    line = program.replay_command(BY_NAME["tail"], [0, 0, 0, 1], bug)
    planted_bug = ["--bug", bug] if bug else []
    quick = ["--scenario", "tail", "--quick"]
    assert pasted(f"replay: {line}\n") == [*quick, *planted_bug, "--replay", "0*3.1"]


def pasted(told: str) -> list[str]:
    """The arguments of tests.orders when the line after ``replay:`` is given to a shell."""
    (line,) = re.findall("replay: (.*)$", told, re.MULTILINE)
    make, explore, orders = shlex.split(line)
    assert (make, explore) == ("make", "explore")
    return shlex.split(orders.removeprefix("ORDERS="))
