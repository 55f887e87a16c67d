"""No example is forgotten: each is on the page of examples, and in a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = EXAMPLES / "README.md"
LEFT_BEHIND = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def _examples() -> list[str]:
    """Paths of all examples, as the page writes them."""
    return sorted(
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*")
        if path.is_file() and path != PAGE and not LEFT_BEHIND & set(path.parts)
    )


def _strings_of_tests() -> set[str]:
    """Every string in the tests' code; what comments and docstrings say counts for nothing."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__):
            tree = ast.parse(path.read_text())
            said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found |= {
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node not in said
            }
    return found


def test_there_are_examples() -> None:
    assert "demo.py" in _examples()


@pytest.mark.parametrize("example", _examples())
def test_every_example_is_on_the_page(example: str) -> None:
    assert f"({example})" in PAGE.read_text(), f"examples/README.md has no link to {example}"


@pytest.mark.parametrize("example", [name for name in _examples() if not name.endswith(".md")])
def test_every_example_is_in_a_test(example: str) -> None:
    name = Path(example).name
    whole = re.compile(rf"(^|[/\s]){re.escape(name)}$")
    assert any(whole.search(text) for text in _strings_of_tests()), f"no test names {name}"


def test_every_link_on_the_page_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", PAGE.read_text()):
        assert "://" in target or (EXAMPLES / target).exists(), target
