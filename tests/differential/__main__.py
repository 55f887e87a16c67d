"""Scripts against us and QEMU from the command line: by seed, or from a file.

python -m tests.differential --seeds 20 --steps 400
python -m tests.differential --seed 7 --show
python -m tests.differential tests/differential/script.txt
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.arguments import positive
from tests.differential.compare import DISK_SIZE, compare
from tests.differential.script import Step, draw, parse

STEPS = 400


def main(arguments: list[str] | None = None) -> int:
    """0 if every answer was right, and every difference is one that is written down."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential")
    parser.add_argument("script", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--seeds", type=positive, default=20, help="seeds 1 to N")
    parser.add_argument("--steps", type=positive, default=STEPS, help="steps that a seed gives")
    parser.add_argument("--show", action="store_true", help="print the scripts")
    options = parser.parse_args(arguments)
    failed: list[str] = []
    for name, steps in _scripts(options):
        if options.show:
            print("\n".join(map(str, steps)))
        with tempfile.TemporaryDirectory() as folder:
            report = compare(Path(folder), steps)
        print(f"{name}: {report}")
        for line in report.wrong:
            print(f"  {line}")
        if report.wrong:
            failed.append(name)
    for name in failed:
        print(f"{name} failed; replay: {_command(name, options)}")
    return 1 if failed else 0


def _command(name: str, options: argparse.Namespace) -> str:
    """What runs one of them alone; make gives every seed the usual number of steps."""
    program = ".venv/bin/python -m tests.differential"
    if options.script is not None:
        return f"{program} {shlex.quote(name)} --show"
    seed = name.removeprefix("seed ")
    if options.steps != STEPS:
        return f"{program} --seed {seed} --steps {options.steps} --show"
    return f"make differential SEED={seed}"


def _scripts(options: argparse.Namespace) -> Iterator[tuple[str, list[Step]]]:
    if options.script is not None:
        yield str(options.script), parse(options.script.read_text().splitlines(), DISK_SIZE)
        return
    seeds = [options.seed] if options.seed is not None else range(1, options.seeds + 1)
    for seed in seeds:
        yield f"seed {seed}", draw(seed, options.steps, DISK_SIZE)


if __name__ == "__main__":
    sys.exit(main())
