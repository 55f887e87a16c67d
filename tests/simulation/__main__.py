"""``python -m tests.simulation --seeds N``: run seeds, say what they met, fail on a violation.

What is printed last counts: a violation and the command that replays it, or that there is none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.arguments import positive

from . import world
from .expect import SEEDS_ENOUGH, too_small

VIOLATIONS_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=500, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happened")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return one(options.seed, trace=options.trace)
    return many(options.start, options.seeds)


def one(seed: int, *, trace: bool) -> int:
    """Run one seed; print its trace."""
    outcome = world.run(seed, tracing=trace)
    print(f"seed {seed} ({outcome.kind}): {outcome.steps} steps, {outcome.virtual_s:.3f} s")
    for what, count in sorted(outcome.met.items()):
        print(f"{count:9,}  {what}")
    for line in outcome.trace:
        print(line)
    if outcome.violation is None:
        print("no violation")
        return 0
    tell(outcome)
    return 1


def tell(outcome: world.Outcome) -> None:
    """The violation, and the command that replays it; nothing is printed after them."""
    print(f"seed {outcome.seed} ({outcome.kind}): {outcome.violation}")
    print(f"replay: make simulate SEED={outcome.seed}", flush=True)


def many(start: int, count: int) -> int:
    """Run ``count`` seeds; print the sums of what they met."""
    began = time.perf_counter()
    met: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    steps = 0
    violations = 0
    first: world.Outcome | None = None
    for seed in range(start, start + count):
        outcome = world.run(seed)
        met.update(outcome.met)
        kinds[outcome.kind] += 1
        steps += outcome.steps
        if outcome.violation is not None:
            violations += 1
            first = first or outcome
            if violations <= VIOLATIONS_SHOWN:
                print(f"seed {seed} ({outcome.kind}): {outcome.violation}", flush=True)
    spent_s = time.perf_counter() - began
    print(f"seeds {start}..{start + count - 1}, {steps:,} steps, {spent_s:.1f} s")
    print("runs: " + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())))
    for what, number in sorted(met.items()):
        print(f"{number:11,}  {what}")
    if first is not None:
        print(f"seeds with a violation: {violations}, the first of them:")
        tell(first)
        return 1
    if count < SEEDS_ENOUGH:
        print(f"no violation (whether they met enough is judged from {SEEDS_ENOUGH} seeds on)")
        return 0
    small = too_small(met, count)
    for line in small:
        print(f"too small: {line}")
    print("no violation" + (", but they met too little to show much" if small else ""))
    return 1 if small else 0


if __name__ == "__main__":
    sys.exit(main())
