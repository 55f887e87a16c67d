"""The point of it, measured: pulls under a write storm, with TRIM, with READ_ONCE, without.

The second part of ``make bench``. Prints a table and what guest writes wait for with a slow temp
image, and writes both, with every figure and a plot of the temp image over time, to a folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import images, machine, report, slow_temp
from benchmarks.storm_plot import svg
from benchmarks.storm_work import COMPARED, PULLS, pull_in_storm
from benchmarks.work import BLOCK, MIB

FULL = {"size": 1024, "rounds": 3, "writes": 200}
QUICK = {"size": 256, "rounds": 1, "writes": 40}
RATE = 110
"""MiB a second that the pull's target takes: what a gigabit link carries."""
KEPT = machine.ROOT / "docs" / "benchmarks"

COLUMNS = (
    ("time", "s", "seconds", 1.0),
    ("temp peak", "MiB", "temp_peak", 1 / MIB),
    ("copies", "", "copies", 1.0),
    ("cancelled", "", "cancelled", 1.0),
    ("guest writes", "/s", "guest_rate", 1.0),
    ("guest p99", "ms", "guest_p99_s", 1e3),
)
"""Title, unit, field of storm_work.Outcome, and what it is multiplied by."""
RATIOS = ("temp_peak", "copies", "guest_p99_s")

Rounds = Sequence[Mapping[str, Mapping[str, Any]]]
"""Of each round: kind -> the fields of its outcome."""


def main(words: list[str] | None = None) -> int:
    """Measure, print and write; the exit status."""
    options = _options(words)
    try:
        document = _measured(options)
    except (RuntimeError, OSError) as error:
        print(f"storm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("storm: interrupted; nothing was written", file=sys.stderr)
        return 130
    text = page(document)
    print(f"\n{text}")
    if warning := machine.warning(document["busy cores"]):
        print(warning)
    name = datetime.fromisoformat(document["date"]).strftime("storm-%Y%m%d-%H%M%S")
    for folder in [options.output, KEPT] if options.keep else [options.output]:
        report.write(folder / f"{name}.json", document)
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.svg").write_text(svg(_samples(document["storm"][0])))
        print(f"written: {folder / name}.json, .md, .svg")
    return 0


def page(document: Mapping[str, Any]) -> str:
    """The tables as Markdown, which reads well on a terminal too."""
    origin = "  \n".join(report.origin(document).splitlines())
    rate = document["options"]["target MiB/s"]
    return "\n".join(
        [
            f"{origin}  ",
            f"guest: fio, 4 KiB at random, depth 32; the pull's target takes {rate} MiB/s",
            "",
            storm_table(document["storm"]),
            "",
            wait_table(document["slow temp"]),
            "",
        ]
    )


def storm_table(rounds: Rounds) -> str:
    """A row for each kind of pull: medians, and the median ratio to the one that releases nothing,
    each ratio within a round."""
    head = ["pull"]
    for title, unit, field, _ in COLUMNS:
        head.append(f"{title}, {unit}" if unit else title)
        if field in RATIOS:
            head.append("ratio")
    lines = [head]
    for kind in rounds[0]:
        line = [kind]
        for _, _, field, factor in COLUMNS:
            line.append(
                report.number(statistics.median(each[kind][field] * factor for each in rounds))
            )
            if field in RATIOS:
                line.append(_ratio(rounds, kind, field))
        lines.append(line)
    return _markdown(lines)


def wait_table(waits: Mapping[str, Mapping[str, float]]) -> str:
    """What a guest's write waits for where a temp write takes long."""
    delay_ms, later_ms = slow_temp.DELAY_S * 1e3, slow_temp.LATER_S * 1e3
    lines = [[f"a temp write takes {delay_ms:g} ms; {later_ms:g} ms after a guest's write comes",
              "the write takes, ms", "at most"]]  # fmt: skip
    for way, found in waits.items():
        words = "nothing: it waits for the copy" if way == "nothing" else f"a {way} of its range"
        lines.append([words, f"{found['median'] * 1e3:.1f}", f"{found['most'] * 1e3:.1f}"])
    return _markdown(lines)


def _ratio(rounds: Rounds, kind: str, field: str) -> str:
    if kind not in COMPARED:
        return ""
    ratios = [
        each[kind][field] / each[COMPARED[kind]][field]
        for each in rounds
        if each[COMPARED[kind]][field]
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append(f"| {' | '.join(cells)} |")
    rules = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    text.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(text)


def _samples(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, int]]]:
    return {kind: [(at, held) for at, held in each["samples"]] for kind, each in kinds.items()}


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small disk, one round")
    parser.add_argument("--size", type=int, help="MiB of the disk (1024; quick: 256)")
    parser.add_argument("--rounds", type=int, help="how often (3; quick: 1)")
    parser.add_argument("--writes", type=int, help="with a slow temp image (200; quick: 40)")
    parser.add_argument(
        "--rate", type=int, default=RATE, help=f"MiB a second that the pull's target takes ({RATE})"
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="images in memory")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench")
    parser.add_argument("--keep", action="store_true", help="also write to docs/benchmarks")
    options = parser.parse_args(words)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("size", "rounds", "writes", "rate"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be more than nothing")
    blocks = slow_temp.SIZE // BLOCK // len(slow_temp.WAYS)
    if options.writes > blocks:
        parser.error(f"--writes: at most {blocks}, a block for each")
    return options


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    if not options.folder.is_dir():
        raise RuntimeError(f"{options.folder} is no folder: name another")
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "options": {
            "size MiB": options.size,
            "rounds": options.rounds,
            "target MiB/s": options.rate,
            "writes": options.writes,
            "media": {"memory": images.file_system(options.folder)},
        },
        "busy cores": [],
        "storm": [],
    }
    with tempfile.TemporaryDirectory(prefix="fleecenbd-bench-", dir=options.folder) as name:
        folder = Path(name)
        for number in range(options.rounds):
            document["busy cores"].append(machine.busy_cores())
            found = {}
            for kind in list(PULLS)[:: 1 if number % 2 == 0 else -1]:
                print(
                    f"storm, round {number + 1} of {options.rounds}: {kind}",
                    file=sys.stderr,
                    flush=True,
                )
                outcome = pull_in_storm(folder, kind, options.size * MIB, options.rate * MIB)
                found[kind] = asdict(outcome)
            document["storm"].append({kind: found[kind] for kind in PULLS})
        document["slow temp"] = slow_temp.waits(folder, options.writes)
    return document


if __name__ == "__main__":
    sys.exit(main())
