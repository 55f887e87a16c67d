"""``python -m tests.mutation engine nbd --sample 200``: do the tests notice a wrong engine?

The commit is copied to a folder of its own; mutmut changes one thing at a time there and runs
the tests that reach the changed function, the quickest first, until one fails. A sample is drawn
from a seed, so that it can be drawn again. docs/testing.md says what to do with a survivor.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.arguments import not_negative

from .mutants import (
    NO_TEST,
    SURVIVED,
    TIMED_OUT,
    Mutant,
    read_ends,
    read_equivalent,
    read_mutants,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutation"

TESTS = {
    "engine": ["tests/engine", "tests/mutation/short_simulation.py"],
    "nbd": ["tests/nbd"],
}
KILLED_MIN = {"engine": 90.0, "nbd": 90.0}
"""Percent of the mutants that are faults."""

CONFIGURATION = """
[tool.mutmut]
source_paths = ["fleecenbd"]
only_mutate = ["fleecenbd/{package}/*.py"]
pytest_add_cli_args_test_selection = {tests}
also_copy = ["fleecenbd", "tests", "docs"]
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("packages", nargs="*", help="engine, nbd (both if left out)")
    parser.add_argument("--sample", type=not_negative, default=150, help="mutants of each; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="mutants whose name holds this text")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to work")
    parser.add_argument("--here", action="store_true", help="the tree as it is, uncommitted too")
    parser.add_argument(
        "--again", action="store_true", help="the tests as they are now, on who survived last time"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.packages) - set(TESTS)
    if unknown:
        parser.error(f"no such package: {', '.join(sorted(unknown))}")
    try:
        good = [one_package(package, options) for package in options.packages or list(TESTS)]
    except NothingToRun as error:
        parser.error(str(error))
    if all(one is None for one in good):
        parser.error(f"--only {options.only}: no mutant of that name; names are as above")
    return 1 if False in good else 0


class NothingToRun(Exception):
    """There is nothing from last time."""


def one_package(package: str, options: argparse.Namespace) -> bool | None:
    """Mutate one package, print how it went; False: the tests noticed too little.

    None: no mutant of the package was asked for. Raises NothingToRun.
    """
    folder = options.folder / package
    if options.again:
        if not (folder / "mutants" / "tests").is_dir():
            raise NothingToRun(f"--again: {folder} has no mutants yet; run it without --again")
        for tests in (folder / "tests", folder / "mutants" / "tests"):
            shutil.rmtree(tests)
            copy_tree("tests", tests)
    else:
        set_up(folder, package, here=options.here)
        # A name that no mutant has: mutmut makes the mutants, and finds nothing to run.
        mutmut(folder, "nothing.of.this.name")
    everything = read_mutants(folder / "mutants", package)
    assert everything, f"mutmut made no mutants in {folder}"
    chosen = [m for m in everything if not m.is_wording and options.only in m.name]
    if not chosen:
        modules = sorted({mutant.module for mutant in everything})
        print(f"{package}: no name of its mutants has {options.only!r} in it; they begin with")
        print(*(f"  fleecenbd.{module}." for module in modules), sep="\n", flush=True)
        return None
    if options.sample and len(chosen) > options.sample:
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    ends = read_ends(folder / "mutants", package)
    alive = (None, *SURVIVED, *NO_TEST)
    mutmut(folder, *(mutant.name for mutant in chosen if ends.get(mutant.name) in alive))
    return report(package, everything, chosen, read_ends(folder / "mutants", package))


def set_up(folder: Path, package: str, *, here: bool) -> None:
    """A copy of the last commit, or of the tree as it is, with mutmut's configuration."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if here:
        for name in ("fleecenbd", "tests", "docs"):
            copy_tree(name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
    else:
        archive = subprocess.run(
            ["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive)
    with (folder / "pyproject.toml").open("a") as file:
        file.write(CONFIGURATION.format(package=package, tests=TESTS[package]))


def copy_tree(name: str, to: Path) -> None:
    """A folder of the tree as it is."""
    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))


def mutmut(folder: Path, *names: str) -> None:
    """Run mutmut; what it printed is in ``folder``/mutmut.log. Its status says nothing to us."""
    if not names:
        return
    # CI: hypothesis draws the same examples each time, and no slow machine makes a test fail.
    environment = os.environ | {"CI": "true", "PYTHONWARNINGS": "ignore"}
    with (folder / "mutmut.log").open("ab") as log:
        subprocess.run(
            ["nice", sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def report(
    package: str, everything: list[Mutant], chosen: list[Mutant], ends: dict[str, int]
) -> bool:
    """Print the table and the survivors; True if enough were killed."""
    equivalent = read_equivalent()
    survivors: list[Mutant] = []
    total: Counter[str] = Counter()
    tables: dict[str, Counter[str]] = {}
    for mutant in chosen:
        kind = how_it_ended(ends.get(mutant.name))
        if kind in ("survived", "untested"):
            if mutant.key in equivalent:
                kind = "equivalent"
            else:
                survivors.append(mutant)
        tables.setdefault(mutant.module, Counter())[kind] += 1
        total[kind] += 1
    wording = sum(mutant.is_wording for mutant in everything)
    print(f"{package}: {len(everything)} mutants, {wording} of them of words alone; ", end="")
    print(f"{len(chosen)} run")
    print(f"{'module':28}{'run':>5}{'killed':>8}{'of time':>9}{'equal':>7}{'alive':>7}{'share':>8}")
    for module, counts in [*sorted(tables.items()), ("all", total)]:
        print(
            f"{module:28}{counts.total():5}{counts['killed']:8}{counts['timed out']:9}"
            f"{counts['equivalent']:7}{counts['survived'] + counts['untested']:7}"
            f"{percent(share(counts)):>8}"
        )
    for mutant in sorted(survivors, key=lambda mutant: mutant.name):
        print(f"\n{mutant.where}  ({mutant.name})\n  - {mutant.old}\n  + {mutant.new}")
    ran_not = total["not run"]
    if ran_not:
        print(f"\n{ran_not} did not run: see mutmut.log")
    known = {mutant.key for mutant in everything}
    for where, old, new in equivalent:
        if where.startswith(package) and (where, old, new) not in known:
            print(f"\nequivalent.toml: no such mutant any more: {where}\n  - {old}\n  + {new}")
    noticed = share(total)
    return not ran_not and (noticed is None or noticed >= KILLED_MIN[package])


def how_it_ended(status: int | None) -> str:
    """A test failed, or ran for ever, or nobody noticed, or there is no test of it at all."""
    if status is None:
        return "not run"
    if status in SURVIVED:
        return "survived"
    if status in NO_TEST:
        return "untested"
    return "timed out" if status in TIMED_OUT else "killed"


def share(counts: Counter[str]) -> float | None:
    """Percent of the mutants that are faults which the tests noticed; None: none is a fault."""
    faults = counts.total() - counts["equivalent"] - counts["not run"]
    return 100.0 * (counts["killed"] + counts["timed out"]) / faults if faults else None


def percent(noticed: float | None) -> str:
    return "-" if noticed is None else f"{noticed:.1f}%"


if __name__ == "__main__":
    sys.exit(main())
