"""``python -m tests.orders``: explore every order of each scenario; replay one of them.

Without options: the long set, where events come between any two callbacks of the loop ("step"),
after those scenarios that are too long for the quick set even as it has them, where events come
when nobody is ready ("quiet").
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from dataclasses import replace

from tests.arguments import positive
from tests.simulation import engine

from . import planted
from .choices import NotReplayable, parsed, written
from .explorer import SECONDS_MAX, Exploration, explore, replay, shortest
from .scenario import Scenario
from .scenarios import SCENARIOS

HEADER = (
    f"{'scenario':27}{'grain':6}{'states':>9}{'transitions':>13}{'runs':>9}{'orders':>10}"
    f"{'depth':>7}{'s':>8}"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.orders", description=__doc__)
    parser.add_argument("--scenario", nargs="+", metavar="NAME", help="these scenarios alone")
    parser.add_argument("--list", action="store_true", help="what scenarios there are")
    parser.add_argument("--quick", action="store_true", help="as in make test: coarser, in seconds")
    parser.add_argument(
        "--limit", type=positive, metavar="STATES", help="states per scenario, at most"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS_MAX, help="per scenario, at most")
    parser.add_argument("--replay", metavar="CHOICES", help="the trace of one run of --scenario")
    parser.add_argument("--bug", metavar="NAME", help="with this planted bug in the engine")
    parser.add_argument("--planted", action="store_true", help="hunt every planted bug; a table")
    options = parser.parse_args(arguments)
    chosen = [s for s in SCENARIOS if not options.scenario or s.name in options.scenario]
    if options.scenario and len(chosen) < len(options.scenario):
        parser.error(f"--scenario takes names of: {' '.join(s.name for s in SCENARIOS)}")
    if options.quick:
        chosen = [s for s in chosen if s.quick or options.scenario]
    else:
        long = [s for s in chosen if not s.quick and not options.replay and not options.list]
        chosen = [*long, *(replace(scenario, every_step=True) for scenario in chosen)]
    if options.list:
        for scenario in chosen:
            print(f"{scenario.name:27}{scenario.about}")
        return 0
    if options.planted:
        return planted.table(options.limit or planted.STATES_MAX)
    try:
        under_test = planted.planted(options.bug) if options.bug else engine.real()
    except ValueError as error:
        parser.error(str(error))
    if options.replay is not None:
        if len(chosen) != 1:
            parser.error("--replay is of one --scenario")
        return show(chosen[0], options.replay, under_test)
    return run(chosen, under_test, options.limit, options.seconds, options.bug)


def show(scenario: Scenario, choices: str, under_test: engine.Engine) -> int:
    """Print the trace of one run."""
    try:
        trace, violation = replay(scenario, parsed(choices), under_test)
    except (NotReplayable, ValueError) as error:
        print(f"these are not choices of {scenario.name}: {error}")
        return 2
    print(*trace, sep="\n")
    if violation is None:
        print("no violation")
    return 1 if violation else 0


def run(
    scenarios: list[Scenario],
    under_test: engine.Engine,
    limit: int | None,
    seconds: float,
    bug: str | None,
) -> int:
    """Explore the scenarios, a line each; the shortest trace of what is found.

    ``bug``: the name of what is planted in the engine, for the command that replays.
    """
    print(HEADER, flush=True)
    found = 0
    sums = [0, 0, 0, 0.0]
    for scenario in scenarios:
        result = explore(scenario, under_test, states_max=limit, seconds_max=seconds)
        print(line(result), flush=True)
        sums[0] += result.states
        sums[1] += result.transitions
        sums[2] += result.runs
        sums[3] += result.spent_s
        if result.violation is not None:
            found += 1
            tell(result, under_test, bug)
    print(f"{len(scenarios):<33}{sums[0]:9,}{sums[1]:13,}{sums[2]:9,}{'':17}{sums[3]:8.1f}")
    return 1 if found else 0


def line(result: Exploration) -> str:
    """A row of the table."""
    grain = "step" if result.scenario.every_step else "quiet"
    orders = f"{result.orders:.3g}" if result.complete else "cut off"
    return (
        f"{result.scenario.name:27}{grain:6}{result.states:9,}{result.transitions:13,}{result.runs:9,}"
        f"{orders:>10}{result.depth_max:7}{result.spent_s:8.1f}"
    )


def tell(result: Exploration, under_test: engine.Engine, bug: str | None) -> None:
    """What was found, with the shortest trace that shows a violation."""
    scenario = result.scenario
    short = shortest(scenario, under_test)
    if short.violation is not None:
        result = short
    trace, _ = replay(scenario, result.choices, under_test)
    print(f"    {result.violation}")
    print(*(f"      {text}" for text in trace), sep="\n")
    print(f"    replay: {replay_command(scenario, result.choices, bug)}")


def replay_command(scenario: Scenario, choices: list[int], bug: str | None) -> str:
    """A line for a shell: it goes through make, and through the shell of make's own."""
    arguments = ["--scenario", scenario.name, *([] if scenario.every_step else ["--quick"])]
    arguments += ["--bug", bug] if bug else []
    options = f"{shlex.join(arguments)} --replay '{written(choices)}'"
    quoted = shlex.quote(options) if set(options) & set('"$`\\') else f'"{options}"'
    return f"make explore ORDERS={quoted}"


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # of this process: what a run finds is printed
    sys.exit(main())
