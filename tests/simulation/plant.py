"""``python -m tests.simulation.plant "NAME OF A BUG" [pytest arguments]``: tests with it planted.

Does a test catch what it is there for? Exit status 1 means that it does.
"""

from __future__ import annotations

import sys

import pytest

from . import mutations
from .planted import PLANTED

DIRECTED = "tests/engine/races"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(*(bug.name for bug in PLANTED), sep="\n")
        return 2
    name, *pytest_arguments = arguments
    matching = [bug for bug in PLANTED if name == bug.name]
    matching = matching or [bug for bug in PLANTED if name in bug.name]
    if len(matching) != 1:
        print(f"{name!r} names {len(matching)} planted bugs, not one")
        return 2
    mutations.plant_for_good(matching[0])
    return int(pytest.main([*(pytest_arguments or [DIRECTED]), "-q", "-x", "--tb=line"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
