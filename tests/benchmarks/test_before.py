"""fleecenbd beside another checkout of itself."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.before import BEFORE, rows_before, suites_before
from benchmarks.peers import Server, fleecenbd
from benchmarks.rows import ROWS
from benchmarks.suites import SUITES, Step, Subject, Suite
from benchmarks.work import Place


def test_every_figure_of_ours_comes_once_with_nothing_to_reach() -> None:
    rows = rows_before(ROWS)
    figures = [(row.suite, row.metric) for row in rows]
    assert len(set(figures)) == len(figures)
    assert set(figures) == {(row.suite, row.metric) for row in ROWS}
    assert {(row.theirs, row.least, row.aim) for row in rows} == {(BEFORE, None, None)}


def test_both_sides_of_each_suite_are_ours() -> None:
    rows = rows_before(ROWS)
    now, old = Path("/now"), Path("/old")
    for suite in suites_before(SUITES, rows, now, old):
        ours = {row.ours for row in rows if row.suite == suite.name}
        assert {subject.name for subject in suite.subjects} == {*ours, BEFORE}


def test_each_side_is_started_from_its_own_checkout(tmp_path: Path) -> None:
    started = []

    @contextlib.contextmanager
    def start(place: Place) -> Iterator[Server]:
        started.append(place.checkout)
        yield Server((), (), (), 0.0)

    suite = Suite("guest", (Subject("fleecenbd", start, ()), Subject("qemu-nbd", start, ())))
    row = next(row for row in ROWS if row.suite == "guest")
    (pair,) = suites_before([suite], rows_before([row]), Path("/now"), Path("/old"))
    for subject in pair.subjects:
        with subject.start(Place(tmp_path, tmp_path, 1, 1.0)):
            pass
    assert started == [Path("/now"), Path("/old")]


def test_the_code_of_a_checkout_is_what_runs(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "fleecenbd"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('the old one speaks')\n")
    said = ""
    try:
        with fleecenbd(tmp_path, tmp_path / "vm.raw", checkout=tmp_path / "checkout"):
            pass
    except RuntimeError as error:
        said = str(error)
    assert said.endswith("ended with status 1: the old one speaks\n")


def test_a_step_keeps_its_work_on_both_sides() -> None:
    step = Step(("pull",), lambda server, place: {"pull": 1.0})
    subject = Subject("fleecenbd", lambda place: contextlib.nullcontext(), (step,))
    row = next(row for row in ROWS if row.suite == "fleecing")
    (pair,) = suites_before(
        [Suite("fleecing", (subject,))], rows_before([row]), Path("/now"), Path("/old")
    )
    assert [each.steps for each in pair.subjects] == [(step,), (step,)]
