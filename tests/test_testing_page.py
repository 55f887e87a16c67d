"""docs/testing.md names the planted bugs and scenarios that there are, and counts none of them."""

import re
from pathlib import Path

import pytest

from tests.cli.planted_backup import BACKUP_BUGS, BackupBug
from tests.client.planted_pull import PULL_BUGS, PullBug
from tests.orders.planted import BUGS
from tests.orders.scenarios import SCENARIOS
from tests.simulation.chain_planted import CHAIN_PLANTED
from tests.simulation.planted import PLANTED, PlantedBug

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"
TABLES: dict[str, tuple[PlantedBug | PullBug | BackupBug, ...]] = {
    "after seeds": PLANTED,
    "after chains": CHAIN_PLANTED,
    "after pulls": PULL_BUGS,
    "after backups": BACKUP_BUGS,
    "scenario": BUGS,
}
"""The planted bugs by the column after the checker's."""
CHECKERS = {"T0", "S", "B", "X", "L", "G", "A", "C", "R", "E", "M", "N", "F", "own"}


def _rows(column: str) -> list[list[str]]:
    """The cells of the table whose fourth column is this."""
    text = PAGE.read_text()
    head = f"| planted bug | in | checker | {column} |"
    assert text.count(head) == 1, head
    table = text.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


@pytest.mark.parametrize("column", TABLES)
def test_the_bugs_of_a_table_are_those_of_the_code_in_their_order(column: str) -> None:
    bugs = TABLES[column]
    told = [(name, module) for name, module, *_ in _rows(column)]
    assert told == [(bug.name, bug.module) for bug in bugs], (
        "hunt them anew and put the table on the page: python -m tests.simulation.mutations, "
        "python -m tests.orders --planted, python -m tests.client.hunt_pull --planted, "
        "python -m tests.cli.sim_backup --planted"
    )


@pytest.mark.parametrize("column", TABLES)
def test_every_bug_of_a_table_is_caught_by_a_checker(column: str) -> None:
    assert {checker for _, _, checker, *_ in _rows(column)} <= CHECKERS


def test_every_scenario_that_the_page_names_exists() -> None:
    names = {scenario.name for scenario in SCENARIOS}
    rows = _rows("scenario")
    assert {row[3].split("`")[1] for row in rows} <= names
    named = re.findall(r"--scenario (\w+)", PAGE.read_text())
    assert named
    assert set(named) <= names


def test_scenarios_and_planted_bugs_are_not_counted_on_the_page() -> None:
    counts = r"\d+ (?:scenarios|planted bugs)|aught are \d+|All \d+"
    counted = re.findall(counts, PAGE.read_text())
    assert counted == []
