"""The rows and the suites know each other."""

from benchmarks.rows import HIGHER, LOWER, ROWS
from benchmarks.suites import SUITES


def test_every_row_is_measured_on_both_sides() -> None:
    measured = {
        (suite.name, subject.name, metric)
        for suite in SUITES
        for subject in suite.subjects
        for step in subject.steps
        for metric in step.metrics
    }
    wanted = {(row.suite, side, row.metric) for row in ROWS for side in (row.ours, row.theirs)}
    assert wanted <= measured


def test_no_two_rows_have_one_key() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)


def test_an_aim_is_harder_to_reach_than_what_must_be_reached() -> None:
    both = [row for row in ROWS if row.least is not None and row.aim is not None]
    assert both
    assert [row.key for row in both if not row.reached(row.aim, row.least)] == []
    assert {row.better for row in ROWS} == {HIGHER, LOWER}
