"""Which tests of this folder run against `serve` alone, and why: docs/nbdkit.md says the same."""

import importlib
import re
from pathlib import Path

import pytest

from tests.interop.conftest import MARK, REASONS

PAGE = Path(__file__).parents[2] / "docs" / "nbdkit.md"


def _marked() -> dict[str, str]:
    """Name and reason of each test that does not run behind nbdkit."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.interop.{path.stem}")
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", []):
                if name.startswith("test_") and mark.name == MARK:
                    (found[name],) = mark.args
    return found


def _rows() -> dict[str, list[str]]:
    """Of the page's table: reason to the tests that it names."""
    return {
        cells[1].strip(): re.findall(r"`(test_\w+)`", cells[3])
        for line in PAGE.read_text().splitlines()
        if len(cells := line.split("|")) == 5 and cells[1].strip() in REASONS
    }


def test_a_test_is_left_out_for_one_of_the_known_reasons_only() -> None:
    assert set(_marked().values()) <= set(REASONS)


def test_the_page_has_every_reason_with_the_tests_that_are_left_out_for_it() -> None:
    rows = _rows()
    assert list(rows) == list(REASONS)
    listed = {name: reason for reason, names in rows.items() for name in names}
    assert listed == _marked()


def test_a_test_that_is_not_left_out_runs_against_both(
    request: pytest.FixtureRequest, server_kind: str
) -> None:
    own = request.node.originalname
    kinds = {
        item.callspec.params["server_kind"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == own
    }
    assert kinds == {"serve", "nbdkit"}
