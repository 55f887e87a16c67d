"""The same requests to us and to QEMU's copy-before-write and snapshot-access, answer by answer.

The QEMU is the one on this machine's path: 7.2 on Debian 12, with what it is known to get wrong,
10.0 on Debian 13. Whatever QEMU says, our own answers must be right.
"""

import re
from pathlib import Path

import pytest

from tests.differential.compare import DISK_SIZE, Report, compare, offers
from tests.differential.daemon import qemu_version
from tests.differential.differences import (
    DIFFERENCES,
    FAULTY_BEFORE,
    OFFERS,
    SPARED_TRIM,
    WRONG_ACROSS,
)
from tests.differential.script import draw, parse

SCRIPT = Path(__file__).with_name("script.txt")
PAGE = Path(__file__).parents[2] / "docs" / "semantics.md"

# Whether a file system shows these depends on its kind, and on what it has in its cache.
NOT_ALWAYS_MET = {"trimmed-bytes", "zeroes-found", "zeroes-missed"}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the written script met."""
    steps = parse(SCRIPT.read_text().splitlines(), DISK_SIZE)
    return compare(tmp_path_factory.mktemp("scripted"), steps)


def test_the_script_is_answered_as_qemu_answers_it(scripted: Report) -> None:
    assert scripted.wrong == []
    assert scripted.steps > 150


def test_the_script_meets_every_difference_that_is_written_down(scripted: Report) -> None:
    assert set(DIFFERENCES) - NOT_ALWAYS_MET <= set(scripted.met)


def test_nothing_is_forgiven_to_a_qemu_that_has_been_mended(scripted: Report) -> None:
    forgiven = {WRONG_ACROSS, SPARED_TRIM} & set(scripted.met)
    assert bool(forgiven) == (qemu_version() < FAULTY_BEFORE), forgiven


def test_the_temp_image_holds_no_more_than_qemus(scripted: Report) -> None:
    assert 0 < scripted.space <= scripted.space_in_qemu


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_script_drawn_from_a_seed_is_answered_as_qemu_answers_it(
    tmp_path: Path, seed: int
) -> None:
    report = compare(tmp_path, draw(seed, 300, DISK_SIZE))
    assert report.wrong == []
    assert set(report.met) <= {*DIFFERENCES, WRONG_ACROSS, SPARED_TRIM}
    assert report.space <= report.space_in_qemu


def test_the_exports_offer_what_qemus_do_but_for_what_is_written_down(tmp_path: Path) -> None:
    assert offers(tmp_path) == OFFERS


def test_every_difference_has_its_reason_on_the_page() -> None:
    section = PAGE.read_text().partition("## 12. Where QEMU answers otherwise")[2]
    assert tuple(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == DIFFERENCES
    for offer in {name for _, name in OFFERS}:
        assert f"`{offer}`" in section, offer
