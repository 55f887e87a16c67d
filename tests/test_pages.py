"""The pages of docs/ and around: what they name is there, and each can be found from the README."""

import re
from pathlib import Path

import pytest

from tests.functions import CODE, function_text, is_function

ROOT = CODE.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def _links(page: Path) -> set[Path]:
    """The files that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def _rules() -> list[tuple[str, Path, list[str], list[int]]]:
    """Rows of "Where each rule lives": question, file, functions, sections of semantics.md."""
    section = (
        ARCHITECTURE.read_text().partition("## Where each rule lives")[2].partition("\n## ")[0]
    )
    rows = []
    for line in re.findall(r"^\| .*\]\(.*$", section, re.MULTILINE):
        question, link, functions, sections = [cell.strip() for cell in line.strip("|").split("|")]
        target = re.search(r"\]\((.*?)\)", link)
        assert target is not None
        path = (ARCHITECTURE.parent / target[1]).resolve()
        rows.append((question, path, re.findall("`(.*?)`", functions), _numbers(sections)))
    return rows


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_every_rule_lives_in_a_function_that_exists() -> None:
    rules = _rules()
    assert len(rules) >= 10
    headings = _numbers(
        " ".join(re.findall(r"^## \d+", (ROOT / "docs/semantics.md").read_text(), re.MULTILINE))
    )
    for question, path, functions, sections in rules:
        assert functions, question
        for name in functions:
            assert function_text(path, name) is not None, f"{question}: {path.name} {name}"
        assert set(sections) <= set(headings), question


def test_the_line_that_decides_what_a_trim_does_is_two_clicks_from_the_readme() -> None:
    assert ARCHITECTURE in _links(ROOT / "README.md")
    text = ARCHITECTURE.read_text()
    quoted = re.search(r"The line that decides what a TRIM does .*? `(.*?)`", text)
    assert quoted is not None
    _, path, functions, _ = _rules()[1]  # "in the second row", the page says
    assert path in _links(ARCHITECTURE)
    lines = (function_text(path, functions[0]) or "").splitlines()
    assert quoted[1] in [line.strip() for line in lines]


def test_the_index_lists_every_page_and_the_readme_links_to_it() -> None:
    index = ROOT / "docs" / "README.md"
    assert index in _links(ROOT / "README.md")
    assert set((ROOT / "docs").glob("*.md")) - {index} <= _links(index)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_every_link_of_the_pages_around_leads_to_a_file(name: str) -> None:
    for target in _links(ROOT / name):
        assert target.exists(), target


def test_every_file_and_make_target_that_contributing_names_exists() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    words = set(re.findall(r"`([^`\s]+/[^`\s]*)`", page))
    assert words
    for word in words:
        if not re.search(r"NAME|VERB|^[A-Z]+=", word) and "://" not in word:
            places = [ROOT / word, CODE / word]
            assert any(path.exists() or list(path.parent.glob(path.name)) for path in places), word
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", page)):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize(
    "name",
    [
        "state.FleeceState.gone",
        "state.Gone.release",
        "gone.FleeceState.release",
        "transmission.Transmission.serve",  # of which room?
        "state.FleeceState",
    ],
)
def test_a_name_that_is_no_function_is_noticed(name: str) -> None:
    assert is_function("state.FleeceState.release")
    assert is_function("engine.state.FleeceState.release")
    assert not is_function(name)
