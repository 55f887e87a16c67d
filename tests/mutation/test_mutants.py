"""What is read of mutmut's files, and that the list of equivalent mutants is up to date."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from . import __main__ as program
from .__main__ import TESTS, how_it_ended, percent, share
from .mutants import Mutant, read_ends, read_equivalent, read_mutants

ROOT = Path(__file__).parents[2]

MUTATED = """\
def x\u01c1Box\u01c1put__mutmut_orig(self, count):
    if count > 0:
        raise ValueError("too many")
def x\u01c1Box\u01c1put__mutmut_1(self, count):
    if count >= 0:
        raise ValueError("too many")
def x\u01c1Box\u01c1put__mutmut_2(self, count):
    if count > 0:
        raise ValueError("XXtoo manyXX")
def x_weigh__mutmut_orig(box, net=False):
    return 1
def x_weigh__mutmut_1(box, net=True):
    return 1
"""


@pytest.fixture
def mutated(tmp_path: Path) -> Path:
    folder = tmp_path / "fleecenbd" / "engine"
    folder.mkdir(parents=True)
    (folder / "box.py").write_text(MUTATED)
    put, weigh = "x\u01c1Box\u01c1put__mutmut_", "x_weigh__mutmut_"
    spans = {
        f"{put}orig": [1, 3], f"{put}1": [4, 6], f"{put}2": [7, 9],
        f"{weigh}orig": [10, 11], f"{weigh}1": [12, 13],
    }  # fmt: skip
    (folder / "box.py.spans").write_text(json.dumps({"spans": spans}))
    ends = {f"fleecenbd.engine.box.{put}1": 1, f"fleecenbd.engine.box.{put}2": None}
    (folder / "box.py.meta").write_text(json.dumps({"exit_code_by_key": ends}))
    return tmp_path


def test_a_mutant_is_known_by_its_function_and_the_lines_that_changed(mutated: Path) -> None:
    first, second, third = read_mutants(mutated, "engine")
    assert first.key == ("engine.box.Box.put", "if count > 0:", "if count >= 0:")
    assert first.module == "engine.box"
    assert [mutant.is_wording for mutant in (first, second, third)] == [False, True, False]
    assert third.key == (
        "engine.box.weigh", "def it(box, net=False):", "def it(box, net=True):"
    )  # fmt: skip


def test_a_mutant_that_has_not_run_has_not_ended(mutated: Path) -> None:
    assert list(read_ends(mutated, "engine").values()) == [1]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(0, "survived"), (1, "killed"), (3, "killed"), (33, "untested"), (36, "timed out"),
     (-24, "timed out"), (None, "not run")],
)  # fmt: skip
def test_mutmuts_exit_statuses_have_words(status: int | None, kind: str) -> None:
    assert how_it_ended(status) == kind


def test_equivalent_mutants_are_left_out_of_the_share_and_untested_ones_are_not() -> None:
    counts = Counter({"killed": 5, "timed out": 1, "survived": 1, "untested": 1, "equivalent": 9})
    assert share(counts) == 75.0
    assert share(Counter({"equivalent": 3, "not run": 2})) is None, "nothing is known"
    assert [percent(share(counts)), percent(None)] == ["75.0%", "-"]


@pytest.fixture
def no_mutmut(mutated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """mutmut stands still, with the mutants of ``mutated`` in each package; names it was to run."""
    asked: list[str] = []
    everything = read_mutants(mutated, "engine")
    monkeypatch.setattr(program, "set_up", lambda folder, package, *, here: None)
    monkeypatch.setattr(program, "mutmut", lambda folder, *names: asked.extend(names))
    monkeypatch.setattr(program, "read_mutants", lambda folder, package: everything)
    return asked


def test_a_name_that_no_mutant_has_is_an_error_that_tells_the_names(
    no_mutmut: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        program.main(["engine", "--sample", "0", "--only", "nonesuch"])
    assert refused.value.code == 2
    told = capsys.readouterr()
    assert "no mutant of that name" in told.err
    assert "\n  fleecenbd.engine.box.\n" in told.out
    assert "nan" not in told.out
    assert no_mutmut == ["nothing.of.this.name"]


def test_only_one_module_is_run_when_only_it_is_asked_for(no_mutmut: list[str]) -> None:
    assert program.main(["engine", "--sample", "0", "--only", "x_weigh"]) == 1, "it has not run"
    assert no_mutmut == ["nothing.of.this.name", "fleecenbd.engine.box.x_weigh__mutmut_1"]


def test_again_without_a_first_time_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["engine", "--again", "--folder", str(tmp_path / "nothing")])
    assert "run it without --again" in capsys.readouterr().err


def test_a_sample_of_less_than_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["engine", "--sample", "-1"])
    assert "--sample" in capsys.readouterr().err


def test_a_change_of_case_is_wording_and_a_change_of_sign_is_not() -> None:
    assert Mutant("n", "m", "w", '"The end"', '"THE END"').is_wording
    assert not Mutant("n", "m", "w", "a + b", "a - b").is_wording


def test_every_equivalent_mutant_has_its_line_in_the_code_and_a_reason() -> None:
    for (where, old, new), why in read_equivalent().items():
        package, module, _ = where.split(".", 2)
        assert package in TESTS
        source = (ROOT / "fleecenbd" / package / f"{module}.py").read_text()
        flat = " ".join(source.split())
        assert old.startswith("def it(") or old in flat, f"{where}: {old}"
        assert new != old
        assert len(why) > 20
