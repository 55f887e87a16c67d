"""Figures of paired rounds, made into a row's result: medians, ratios within a round, a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.rows import Row

Figures = Mapping[str, float]
Round = Mapping[str, Mapping[str, Mapping[str, float | str]]]
"""suite -> subject -> metric -> a figure, or what went wrong."""

AIM = "aim reached"
REACHED = "reached"
SHORT = "SHORT"
PRINTED = "-"
ERROR = "ERROR"


@dataclass(frozen=True)
class Result:
    """What the rounds say of a row. Ratios are ours to theirs, each within one round.

    ``error`` names what went wrong first; then the figures come from the rounds without errors,
    and are None where there were none.
    """

    key: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    lowest: float | None
    highest: float | None
    verdict: str
    error: str | None = None

    def as_json(self) -> dict[str, object]:
        """For the file: fields by name."""
        return asdict(self)


def result_of(row: Row, rounds: Sequence[Round]) -> Result:
    """The row's result over all rounds. A round that failed makes the verdict ERROR."""
    ours, theirs, ratios = [], [], []
    error: str | None = None
    for number, figures in enumerate(rounds, 1):
        pair = [_figure(figures, row, subject) for subject in (row.ours, row.theirs)]
        wrong = [
            f"round {number}, {subject}: {figure}"
            for subject, figure in zip((row.ours, row.theirs), pair, strict=True)
            if isinstance(figure, str)
        ]
        mine, other = pair
        if isinstance(mine, str) or isinstance(other, str):
            error = error or "; ".join(wrong)
            continue
        ours.append(mine)
        theirs.append(other)
        # Next to nothing against nothing is no ratio; the figures are still told.
        if other > 0:
            ratios.append(mine / other)
    ratio = statistics.median(ratios) if ratios else None
    middle = statistics.median(ours) if ours else None
    return Result(
        row.key,
        middle,
        statistics.median(theirs) if theirs else None,
        ratio,
        min(ratios, default=None),
        max(ratios, default=None),
        ERROR if error is not None else _verdict(row, middle if row.absolute else ratio),
        error,
    )


def _figure(figures: Round, row: Row, subject: str) -> float | str:
    return figures.get(row.suite, {}).get(subject, {}).get(row.metric, "was not measured")


def _verdict(row: Row, figure: float | None) -> str:
    if row.least is None:
        return PRINTED
    if figure is None or not row.reached(figure, row.least):
        return SHORT
    if row.aim is not None and row.reached(figure, row.aim):
        return AIM
    return REACHED
