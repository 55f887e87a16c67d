"""Results as a table for a terminal and for Markdown, and as a file for machines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ratios import ERROR, SHORT, Result
from benchmarks.rows import LOWER, Row

FORMAT = 1

HEAD = ("row", "fleecenbd", "peer", "", "against", "ratio", "lowest..highest", "to reach", "")


def table(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Aligned columns; under it what went wrong, and how many rows fall short."""
    lines = [HEAD, *(_cells(row, result) for row, result in zip(rows, results, strict=True))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    right = (1, 2, 5)
    text = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, "", *summary(results)])


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The same as a Markdown table; what falls short is bold."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | ---: | ---: | --- | --- | ---: |"]
    lines[1] += " --- | --- | --- |"
    for row, result in zip(rows, results, strict=True):
        *cells, verdict = _cells(row, result)
        if verdict in (SHORT, ERROR):
            verdict = f"**{verdict}**"
        lines.append("| " + " | ".join([*cells, verdict]) + " |")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> list[str]:
    """How many rows fall short, and every error in full."""
    short = sum(result.verdict == SHORT for result in results)
    wrong = [result for result in results if result.verdict == ERROR]
    lines = [f"{len(results)} rows: {short} short of what there is to reach, {len(wrong)} errors"]
    return [*lines, *(f"ERROR {result.key}: {result.error}" for result in wrong)]


def origin(document: Mapping[str, Any]) -> str:
    """The date, the commit, the machine, the versions and the options, each in a line."""
    machine = document["machine"]
    options = document["options"]
    before = f", before: {options['before']}" if options.get("before") else ""
    words = ", ".join(f"{name} {_version(words)}" for name, words in document["versions"].items())
    media = ", ".join(f"{name}: {kind}" for name, kind in options["media"].items())
    return "\n".join(
        [
            f"{document['date']}, commit {document['commit']}{before}",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory GiB']} GiB; "
            f"Linux {machine['kernel']}, {machine['system']}",
            words,
            f"{options['size MiB']} MiB of random data ({media}), {options['rounds']} rounds",
        ]
    )


def write(
    path: Path,
    document: Mapping[str, Any],
) -> None:
    """The JSON file: short enough lines to be read and compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises RuntimeError if it is something else."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise RuntimeError(
                f"{path} is of format {document['format']}, not {FORMAT}: measure anew"
            )
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"{path} is no file that make bench has written") from None
    return document


def hardest(documents: Sequence[Mapping[str, Any]], row: Row) -> tuple[str, Result] | None:
    """Of several runs, the row's result that is worst for us, and the system it comes from.

    An error is worse than any ratio. None where no run has the row.
    """
    found = [
        (str(document["machine"]["system"]).replace(" GNU/Linux", ""), Result(**each))
        for document in documents
        for each in document["rows"]
        if each["key"] == row.key
    ]

    def badness(one: tuple[str, Result]) -> tuple[bool, float]:
        result = one[1]
        figure = result.ours if row.absolute else result.ratio
        if result.verdict == ERROR or figure is None:
            return True, 0.0
        return False, figure if row.better == LOWER else -figure

    return max(found, key=badness, default=None)


def _version(words: str) -> str:
    """The number in what a program says of itself."""
    number = re.search(r"[0-9]+(\.[0-9]+)+", words)
    return number[0] if number else words


def _cells(row: Row, result: Result) -> tuple[str, ...]:
    spread = ""
    if result.lowest is not None and result.highest is not None:
        spread = f"{result.lowest:.2f}..{result.highest:.2f}"
    return (
        row.title,
        number(result.ours),
        number(result.theirs),
        row.unit,
        row.theirs if row.ours == "fleecenbd" else f"{row.ours} : {row.theirs}",
        "" if result.ratio is None else f"{result.ratio:.2f}",
        spread,
        _target(row),
        result.verdict,
    )


def _target(row: Row) -> str:
    if row.least is None:
        return ""
    sign = "<=" if row.better == LOWER else ">="
    unit = f" {row.unit}" if row.absolute else ""
    words = f"{sign} {row.least:g}{unit}"
    return words if row.aim is None else f"{words} (aim {row.aim:g})"


def number(figure: float | None) -> str:
    """Three digits that count, or all before the point."""
    if figure is None:
        return ""
    if abs(figure) >= 100:
        return f"{figure:.0f}"
    return f"{figure:.3g}" if figure else "0"
