"""fleecenbd beside itself: another checkout takes the place of every peer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.peers import Server
from benchmarks.rows import Row
from benchmarks.suites import Subject, Suite
from benchmarks.work import Place

BEFORE = "before"


def rows_before(rows: Sequence[Row]) -> list[Row]:
    """Each figure of ours once, against the same of the other checkout; nothing to reach."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row.suite, row.metric), row)
    return [
        replace(row, theirs=BEFORE, least=None, aim=None, absolute=False) for row in first.values()
    ]


def suites_before(
    suites: Sequence[Suite], rows: Sequence[Row], now: Path, before: Path
) -> list[Suite]:
    """The suites with our subject of each twice: from the checkout ``now``, and ``before``."""
    ours = {row.suite: row.ours for row in rows}
    return [
        replace(
            suite,
            subjects=tuple(
                _of_checkout(subject, name, checkout)
                for subject in suite.subjects
                if subject.name == ours[suite.name]
                for name, checkout in ((subject.name, now), (BEFORE, before))
            ),
        )
        for suite in suites
        if suite.name in ours
    ]


def _of_checkout(subject: Subject, name: str, checkout: Path) -> Subject:
    def start(place: Place) -> contextlib.AbstractContextManager[Server]:
        return subject.start(replace(place, checkout=checkout))

    return replace(subject, name=name, start=start)
