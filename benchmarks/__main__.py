"""`make bench`: fleecenbd beside others on the same work; docs/benchmarking.md says how to read it.

Each round starts every server afresh, in turn; what counts is the ratio within a round. Prints
the table and writes it with every figure to a folder: JSON, Markdown, SVG.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import images, machine, plot, report
from benchmarks.before import rows_before, suites_before
from benchmarks.ratios import ERROR, SHORT, Result, result_of
from benchmarks.rounds import Media, measure, places
from benchmarks.rows import ROWS, Row
from benchmarks.suites import SUITES, Suite
from benchmarks.work import MIB

FULL = {"size": 2048, "rounds": 5, "limit": 20.0}
QUICK = {"size": 256, "rounds": 3, "limit": 6.0}
KEPT = machine.ROOT / "docs" / "benchmarks"


def main(words: list[str] | None = None) -> int:
    """Measure, or show files of earlier runs; the exit status."""
    options = _options(words)
    try:
        if options.show:
            _show([report.read(path) for path in options.show], options)
            return 0
        rows = chosen(options.rows)
        suites = [suite for suite in SUITES if any(row.suite == suite.name for row in rows)]
        if options.before:
            rows = rows_before(rows)
            suites = suites_before(suites, rows, machine.ROOT, options.before)
        document = _measured(rows, suites, options)
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    results = [Result(**row) for row in document["rows"]]
    print(f"\n{report.origin(document)}\n\n{report.table(rows, results)}")
    if warning := machine.warning(document["busy cores"]):
        print(f"\n{warning}")
    name = datetime.fromisoformat(document["date"]).strftime("%Y%m%d-%H%M%S")
    kept = [options.output] if not options.keep else [options.output, KEPT]
    for folder in kept:
        report.write(folder / f"{name}.json", document)
        (folder / f"{name}.md").write_text(page(report.origin(document), rows, results))
        (folder / f"{name}.svg").write_text(plot.svg(rows, results))
        print(f"written: {folder / name}.json, .md, .svg")
    verdicts = {result.verdict for result in results}
    return int(ERROR in verdicts or (options.strict and SHORT in verdicts))


def chosen(patterns: str | None) -> list[Row]:
    """Rows whose keys fit one of the patterns; all by default. Raises RuntimeError for none."""
    if patterns is None:
        return list(ROWS)
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(row.key, pattern) for row in ROWS):
            keys = ", ".join(row.key for row in ROWS)
            raise RuntimeError(f"no row is called {pattern}; there are {keys}")
    return [row for row in ROWS if any(fnmatch.fnmatchcase(row.key, name) for name in wanted)]


def page(origin: str, rows: list[Row], results: list[Result]) -> str:
    """The Markdown that goes into docs/benchmarking.md."""
    lines = "  \n".join(origin.splitlines())
    summary = "\n".join(f"- {line}" for line in report.summary(results))
    return f"{lines}\n\n{report.markdown(rows, results)}\n\n{summary}\n"


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small images, few rounds: 3 minutes")
    parser.add_argument("--size", type=int, help="MiB of the image (2048; quick: 256)")
    parser.add_argument("--rounds", type=int, help="how often (5; quick: 3)")
    parser.add_argument("--rows", help="only these, by key: 'pull-*,p99'; their suites run whole")
    parser.add_argument("--limit", type=float, help="seconds for a call of fio (20; quick: 6)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="images in memory")
    parser.add_argument(
        "--disk-folder", type=Path, default=Path("/var/tmp"), help="images on a disk"
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="against another checkout, not the peers"
    )
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench")
    parser.add_argument("--keep", action="store_true", help="also write to docs/benchmarks")
    parser.add_argument("--strict", action="store_true", help="fail where a row falls short")
    parser.add_argument("--list", action="store_true", help="print the rows' keys and titles")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print earlier runs")
    parser.add_argument("--markdown", action="store_true", help="with --show: as Markdown")
    parser.add_argument("--hardest", action="store_true", help="with --show: each row's worst run")
    options = parser.parse_args(words)
    if options.list:
        for row in ROWS:
            print(f"{row.key:<24}{row.title} ({row.theirs})")
        parser.exit()
    if options.before is not None:
        options.before = options.before.resolve()
        if not (options.before / "fleecenbd" / "__main__.py").exists():
            parser.error(f"--before: {options.before} is no checkout of fleecenbd")
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be more than nothing")
    return options


def _measured(rows: list[Row], suites: list[Suite], options: argparse.Namespace) -> dict[str, Any]:
    """The document of a run: where it comes from, every round's figures, a result for each row."""
    media = Media(options.folder, options.disk_folder, options.size * MIB, options.limit)
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "options": {
            "size MiB": options.size,
            "rounds": options.rounds,
            "limit s": options.limit,
            "before": options.before and machine.commit(options.before),
            "media": _file_systems(suites, media),
        },
    }
    rounds = []
    busy = []
    started = time.monotonic()
    with places(media, suites) as place:
        for number in range(options.rounds):
            busy.append(machine.busy_cores())
            rounds.append(measure(number, suites, place, _progress(number, options.rounds)))
    _progress(0, 0)("")
    document["seconds"] = round(time.monotonic() - started)
    document["busy cores"] = busy
    document["rows"] = [result_of(row, rounds).as_json() for row in rows]
    document["rounds"] = rounds
    return document


def _file_systems(suites: list[Suite], media: Media) -> dict[str, str]:
    found = {}
    for suite in suites:
        name, folder = ("disk", media.disk) if suite.on_disk else ("memory", media.memory)
        if not folder.is_dir():
            raise RuntimeError(f"{folder} is no folder: name another")
        found[name] = images.file_system(folder)
    return found


def _progress(number: int, count: int) -> Any:
    """On a terminal one line that changes; elsewhere nothing but the rounds' beginnings."""
    terminal = sys.stderr.isatty()
    if count and not terminal:
        print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)

    def tell(words: str) -> None:
        if terminal:
            line = f"round {number + 1} of {count}, {words}" if words else ""
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="" if words else "\r", file=sys.stderr)

    return tell


def _show(documents: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Each run's table, or one table of each row's worst."""
    if options.hardest:
        pairs = [(row, report.hardest(documents, row)) for row in ROWS]
        found = [(row, *pair) for row, pair in pairs if pair is not None]
        rows = [replace(row, theirs=f"{row.theirs} ({system})") for row, system, _ in found]
        results = [result for _, _, result in found]
        tables = [("\n\n".join(map(report.origin, documents)), rows, results)]
    else:
        tables = []
        by_key = {row.key: row for row in ROWS}
        for document in documents:
            results = [Result(**row) for row in document["rows"] if row["key"] in by_key]
            rows = [by_key[result.key] for result in results]
            tables.append((report.origin(document), rows, results))
    for origin, rows, results in tables:
        if options.markdown:
            print(page(origin, rows, results))
        else:
            print(f"{origin}\n\n{report.table(rows, results)}\n")


if __name__ == "__main__":
    sys.exit(main())
