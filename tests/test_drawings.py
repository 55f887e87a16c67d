"""The drawings of docs/: each is that of its source, and names functions that exist."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.drawings import IMAGES, draw, stamp
from tests.functions import is_function

SOURCES = sorted(IMAGES.glob("*.dot"))


def _names(source: Path) -> list[str]:
    return re.findall(r"<i>(.*?)</i>", source.read_text())


def _texts(svg: str) -> list[str]:
    return sorted(
        "".join(text.itertext()).replace("\N{NO-BREAK SPACE}", " ")
        for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    )


def test_every_drawing_has_its_source_and_every_source_its_drawing() -> None:
    assert {path.stem for path in IMAGES.glob("*.svg")} == {path.stem for path in SOURCES}
    assert len(SOURCES) >= 6


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_drawing_is_that_of_its_source(source: Path) -> None:
    drawn = source.with_suffix(".svg").read_text()
    assert drawn.splitlines()[0] == stamp(source), f"{source.name} changed: make drawings"
    assert _texts(drawn) == _texts(draw(source)), "not what `make drawings` draws"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_function_that_a_drawing_namesis_function(source: Path) -> None:
    assert [name for name in _names(source) if not is_function(name)] == []
    assert _names(source) or source.stem == "fleecing"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_drawing_is_shown_on_a_page_and_has_a_text_for_who_cannot_see_it(
    source: Path,
) -> None:
    root = IMAGES.parents[1]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    shown = [
        text
        for page in pages
        for text, target in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text())
        if (page.parent / target).resolve() == source.with_suffix(".svg")
    ]
    assert shown, f"{source.stem}.svg is shown nowhere"
    assert all(len(text) > 40 for text in shown)
