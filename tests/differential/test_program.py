"""What `make differential` says of a seed that fails, and what it refuses."""

from pathlib import Path

import pytest

from tests.differential import __main__ as program
from tests.differential.compare import Report
from tests.differential.script import Step


@pytest.fixture
def fails_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and the third comparison find something."""
    reports = iter([Report(), Report(wrong=["one"]), Report(wrong=["two"]), Report()])

    def compare(folder: Path, steps: list[Step]) -> Report:
        return next(reports)

    monkeypatch.setattr(program, "compare", compare)


@pytest.mark.usefixtures("fails_twice")
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "make differential SEED={}"),
        (["--steps", "50"], ".venv/bin/python -m tests.differential --seed {} --steps 50 --show"),
    ],
)
def test_the_last_lines_are_the_seeds_that_failed_and_the_commands_that_replay_them(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--seeds", "4", *arguments]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"seed {seed} failed; replay: {command.format(seed)}" for seed in (2, 3)
    ]


@pytest.mark.usefixtures("fails_twice")
def test_seeds_without_a_wrong_answer_name_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--seed", "7"]) == 0
    assert "replay" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_a_run_of_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main([option, "0"])
    assert option in capsys.readouterr().err
