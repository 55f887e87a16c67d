"""What `make simulate` prints last, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest

from . import __main__ as program
from . import mutations, world
from .planted import PLANTED

BUG = next(bug for bug in PLANTED if bug.name == "a claim leaves the copy bits set")


@pytest.fixture
def bad_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are of an engine with a bug in it."""
    mutant, run = mutations.load(BUG), world.run
    monkeypatch.setattr(
        world, "run", lambda seed, *, tracing=False: run(seed, mutant, tracing=tracing)
    )


@pytest.mark.usefixtures("bad_engine")
def test_many_seeds_end_with_the_first_violation_and_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main(["--seeds", "5"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("seed ")]
    seed = int(found[0].split()[1])
    assert lines[-2:] == [found[0], f"replay: make simulate SEED={seed}"]


@pytest.mark.usefixtures("bad_engine")
def test_one_seed_ends_with_its_trace_the_violation_and_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main(["--seed", "0", "--trace"]) == 1
    *_, trace, violation, replay = capsys.readouterr().out.splitlines()
    assert "VIOLATION B: " in trace
    assert violation.startswith("seed 0 (")
    assert trace.split("VIOLATION ")[1] in violation
    assert replay == "replay: make simulate SEED=0"


def test_a_seed_without_a_violation_says_so_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--seed", "0", "--trace"]) == 0
    assert capsys.readouterr().out.endswith("\nno violation\n")


def test_a_run_that_met_too_little_fails_and_says_of_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = world.Outcome(0, "empty", None, Counter(), 0, 0.0, [])
    monkeypatch.setattr(world, "run", lambda seed: nothing)
    assert program.main(["--seeds", "200"]) == 1
    assert "too small: copies: 0, expected at least 400 in 200 seeds" in capsys.readouterr().out


def test_few_seeds_are_not_asked_for_what_is_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = world.Outcome(0, "empty", None, Counter(), 0, 0.0, [])
    monkeypatch.setattr(world, "run", lambda seed: nothing)
    assert program.main(["--seeds", "199"]) == 0
    assert "no violation (" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", ["0", "-1", "some"])
def test_no_seeds_at_all_are_refused(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        program.main(["--seeds", seeds])
    assert refused.value.code == 2
    assert "--seeds" in capsys.readouterr().err
