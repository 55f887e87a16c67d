"""Pulls in virtual time, seed by seed, and the hunt for planted bugs.

python -m tests.client.hunt_pull --seeds 5000     # the real code; prints what was met
python -m tests.client.hunt_pull --seed 7         # one of them
python -m tests.client.hunt_pull --planted        # prints the table of docs/testing.md
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fleecenbd.client import journal
from tests.client.planted_pull import PULL_BUGS, PullBug, planted
from tests.client.sim_pull import SMALL, World
from tests.simulation.loop import Deadlock

SEEDS = 300


@contextmanager
def small_limits() -> Iterator[None]:
    """A disk of some blocks meets what a large one does."""
    saved = {key: getattr(*key) for key in SMALL}
    for (module, name), value in SMALL.items():
        setattr(module, name, value)
    try:
        with patch.object(journal, "COMPACT_LENGTH_MIN", 512):
            yield
    finally:
        for (module, name), value in saved.items():
            setattr(module, name, value)


def run(seeds: range) -> Counter[str]:
    """What they met. AssertionError names the seed."""
    met: Counter[str] = Counter()
    with small_limits():
        for seed in seeds:
            try:
                met += World(seed).run()
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
    return met


def hunt(bug: PullBug, seeds: int = SEEDS) -> tuple[int, str]:
    """(seeds until it was caught, what was said); AssertionError where it was not."""
    with small_limits(), planted(bug):
        for seed in range(seeds):
            try:
                World(seed).run()
            except (AssertionError, Deadlock, KeyError, ValueError) as error:
                return seed + 1, f"L: {error}" if isinstance(error, Deadlock) else str(error)
    raise AssertionError(f"{bug.name}: {seeds} seeds, and nobody noticed")


def row(bug: PullBug) -> str:
    """Its line of the table."""
    seeds, said = hunt(bug)
    checker = said[0] if said[1:2] == ":" else "own"
    return f"| {bug.name} | {bug.module} | {checker} | {seeds} |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--planted", action="store_true")
    arguments = parser.parse_args()
    if arguments.planted:
        print("| planted bug | in | checker | after pulls |", "| --- | --- | --- | --- |", sep="\n")
        for bug in PULL_BUGS:
            print(row(bug))
        return
    first = arguments.seed
    print(dict(run(range(arguments.seeds) if first is None else range(first, first + 1))))


if __name__ == "__main__":
    main()
