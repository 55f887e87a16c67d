"""docs/protocol.md names modules and tests that exist."""

import re
from pathlib import Path

from fleecenbd.nbd import constants
from fleecenbd.nbd.handshake import HandshakeLimits

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "protocol.md"


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    return [row for row in cells if row[-1].startswith("test_")]


def test_every_row_names_a_test_that_exists() -> None:
    found = rows()
    assert len(found) > 70
    for row in found:
        assert len(row) == 4, row
        module, _, test = row[-1].partition("::")
        source = (ROOT / "tests" / "nbd" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, row[-1]


def test_every_row_names_a_module_or_a_limit_that_exists() -> None:
    limits = HandshakeLimits()
    for row in rows():
        for name in filter(None, re.split(r", ", row[2])):
            if name.endswith(".py"):
                assert (ROOT / "fleecenbd" / "nbd" / name).is_file(), name
            elif name.startswith("constants."):
                assert hasattr(constants, name.partition(".")[2]), name
            else:
                assert hasattr(limits, name.rpartition(".")[2]), name


def test_every_module_of_the_protocol_is_in_the_table() -> None:
    named = " ".join(row[2] for row in rows())
    modules = {path.name for path in (ROOT / "fleecenbd" / "nbd").glob("*.py")}
    for module in modules - {"__init__.py", "constants.py", "catalog.py"}:
        assert module in named
