"""`make bench-scale`: what a request and the server's memory cost as the work grows.

Against the disk's size, the number of sessions and of clients, and how fragmented the bitmaps
are. Prints a table for each, and marks what grows by more than a half.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import images, machine, report
from benchmarks.scale_work import DIMENSIONS, Amount, Dimension
from benchmarks.work import MIB

GROWS = 1.5
RATES = ("/s", "MB/s")
KEPT = machine.ROOT / "docs" / "benchmarks"

Values = Mapping[str, Sequence[Mapping[str, float] | str]]
"""column -> the figures of each round, or what went wrong."""


def main(words: list[str] | None = None) -> int:
    """Measure and print; the exit status: 1 where something could not be measured."""
    options = _options(words)
    try:
        document = _measured(options)
    except RuntimeError as error:
        print(f"bench-scale: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench-scale: interrupted; nothing was written", file=sys.stderr)
        return 130
    text = page(document)
    print(text)
    if warning := machine.warning(document["busy cores"]):
        print(warning)
    name = datetime.fromisoformat(document["date"]).strftime("scale-%Y%m%d-%H%M%S")
    for folder in [options.output, KEPT] if options.keep else [options.output]:
        report.write(folder / f"{name}.json", document)
        (folder / f"{name}.md").write_text(text)
        print(f"written: {folder / name}.json, .md")
    return int(any(failures(document)))


def page(document: Mapping[str, Any]) -> str:
    """The tables as Markdown, which reads well on a terminal too, and what went wrong."""
    parts = ["  \n".join(report.origin(document).splitlines()), ""]
    for dimension in DIMENSIONS:
        if dimension.name in document["dimensions"]:
            parts += [table(dimension, document["dimensions"][dimension.name]), ""]
    parts += [f"ERROR {words}" for words in failures(document)]
    return "\n".join(parts).rstrip() + "\n"


def table(dimension: Dimension, columns: Values) -> str:
    """A row for each figure: medians, and how many times the first column's cost is reached."""
    lines = [(dimension.name, "", *dimension.columns, "grows")]
    for row, unit in dimension.units.items():
        figures = [
            [None if isinstance(each, str) else each[row] for each in columns[name]]
            for name in dimension.columns
        ]
        known = [[figure for figure in column if figure is not None] for column in figures]
        cells = [report.number(statistics.median(each)) if each else "ERROR" for each in known]
        lines.append((row, unit, *cells, _words(growth(figures, unit))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = (0, 1)
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append(f"| {' | '.join(cells)} |")
    rules = ["-" * width for width in widths]
    rules[2:] = [f"{rule[:-1]}:" for rule in rules[2:]]
    text.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(text)


def growth(columns: Sequence[Sequence[float | None]], unit: str) -> float | None:
    """The largest cost over the first column's, of the medians of ratios within a round.

    ``columns`` holds a figure of each round, None where there is none. Of a rate, the cost is
    what a request takes: its inverse.
    """
    factors = []
    for column in columns:
        ratios = [
            first / figure if unit in RATES else figure / first
            for first, figure in zip(columns[0], column, strict=True)
            if first and figure
        ]
        if not ratios:
            return None
        factors.append(statistics.median(ratios))
    return max(factors)


def failures(document: Mapping[str, Any]) -> list[str]:
    """A line for each column of a round that could not be measured."""
    return [
        f"{dimension}, {column}, round {number}: {figures}"
        for dimension, columns in document["dimensions"].items()
        for column, rounds in columns.items()
        for number, figures in enumerate(rounds, 1)
        if isinstance(figures, str)
    ]


def _words(factor: float | None) -> str:
    if factor is None:
        return ""
    return f"{factor:.2f} GROWS" if factor > GROWS else f"{factor:.2f}"


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8192, help="for each figure")
    parser.add_argument("--size", type=int, default=1024, help="MiB of images full of data")
    parser.add_argument("--only", help="tables whose names begin with this")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="images in memory")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench")
    parser.add_argument("--keep", action="store_true", help="also write to docs/benchmarks")
    options = parser.parse_args(words)
    if min(options.rounds, options.requests, options.size) <= 0:
        parser.error("--rounds, --requests and --size must be more than nothing")
    if options.requests * 4096 > options.size * MIB:
        parser.error("--requests are more than there are blocks of 4 KiB in --size")
    return options


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    if not options.folder.is_dir():
        raise RuntimeError(f"{options.folder} is no folder: name another")
    chosen = [each for each in DIMENSIONS if each.name.startswith(options.only or "")]
    if not chosen:
        names = ", ".join(each.name for each in DIMENSIONS)
        raise RuntimeError(f"no table begins with {options.only}; there are {names}")
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "options": {
            "size MiB": options.size,
            "rounds": options.rounds,
            "requests": options.requests,
            "media": {"memory": images.file_system(options.folder)},
        },
        "busy cores": [],
        "dimensions": {each.name: {name: [] for name in each.columns} for each in chosen},
    }
    with tempfile.TemporaryDirectory(prefix="fleecenbd-bench-", dir=options.folder) as name:
        amount = Amount(Path(name), options.requests, options.size * MIB)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            document["busy cores"].append(machine.busy_cores())
            for dimension in chosen:
                for column in list(dimension.columns)[:: 1 if number % 2 == 0 else -1]:
                    document["dimensions"][dimension.name][column].append(
                        _one(dimension, column, amount)
                    )
    return document


def _one(dimension: Dimension, column: str, amount: Amount) -> dict[str, float] | str:
    try:
        return dimension.columns[column](amount)
    # A column that fails is told, whatever it was, and the others go on.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
