"""Medians, ratios within a round, verdicts."""

import pytest

from benchmarks.ratios import AIM, ERROR, PRINTED, REACHED, SHORT, result_of
from benchmarks.rows import HIGHER, LOWER, Row


def _row(better: str = HIGHER, least: float | None = 2.0, aim: float | None = 3.0) -> Row:
    return Row("key", "title", "suite", "metric", "peer", "/s", least, aim, better)


def _rounds(*pairs: tuple[float | str, float | str]) -> list[dict[str, dict[str, dict]]]:
    return [
        {"suite": {"fleecenbd": {"metric": ours}, "peer": {"metric": theirs}}}
        for ours, theirs in pairs
    ]


def test_the_ratio_is_the_median_of_ratios_within_rounds_not_that_of_medians() -> None:
    # The machine was ten times slower in the last round, for both alike.
    result = result_of(_row(), _rounds((100, 40), (100, 50), (12, 4)))
    assert result.ratio == 2.5
    assert (result.lowest, result.highest) == (2.0, 3.0)
    assert (result.ours, result.theirs) == (100, 40)
    assert result.verdict == REACHED


@pytest.mark.parametrize(
    ("better", "least", "aim", "ours", "verdict"),
    [
        (HIGHER, 2.0, 3.0, 30.0, AIM),
        (HIGHER, 2.0, 3.0, 20.0, REACHED),
        (HIGHER, 2.0, 3.0, 19.9, SHORT),
        (HIGHER, 2.0, None, 90.0, REACHED),
        (HIGHER, None, None, 0.1, PRINTED),
        (LOWER, 1.0, 0.5, 5.0, AIM),
        (LOWER, 1.0, 0.5, 10.0, REACHED),
        (LOWER, 1.0, 0.5, 10.1, SHORT),
    ],
)
def test_a_row_falls_short_on_the_wrong_side_of_its_target(
    better: str, least: float | None, aim: float | None, ours: float, verdict: str
) -> None:
    assert result_of(_row(better, least, aim), _rounds((ours, 10.0))).verdict == verdict


def test_an_absolute_row_is_held_against_its_figure_whatever_the_ratio() -> None:
    row = Row("memory", "", "suite", "metric", "peer", "MiB", 160, 100, LOWER, absolute=True)
    assert result_of(row, _rounds((120, 10), (130, 10))).verdict == REACHED
    assert result_of(row, _rounds((161, 900))).verdict == SHORT


def test_one_round_that_failed_makes_the_row_an_error_that_says_where() -> None:
    result = result_of(_row(), _rounds((30, 10), (30, "OSError: no socket"), (40, 10)))
    assert result.verdict == ERROR
    assert result.error == "round 2, peer: OSError: no socket"
    assert result.ratio == 3.5


def test_what_no_round_has_measured_is_an_error_and_no_figure() -> None:
    result = result_of(_row(), [{"suite": {"peer": {"metric": 1.0}}}])
    assert result.verdict == ERROR
    assert result.error == "round 1, fleecenbd: was not measured"
    assert result.ours is result.ratio is None


def test_a_peer_that_needs_nothing_gives_no_ratio_and_reaches_nothing() -> None:
    result = result_of(_row(LOWER), _rounds((5.0, 0.0)))
    assert result.ratio is None
    assert result.verdict == SHORT
