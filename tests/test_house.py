"""The house keeps its own rules: imports point one way, links lead somewhere, help is complete."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import itself and these.
ALLOWED = {
    "nbd": set(),
    "engine": {"storage.device"},
    "storage": set(),
    "server": {"engine", "nbd", "storage"},
    "client": {"engine", "nbd", "storage"},
    "cli": {"client", "engine", "nbd", "server", "storage"},
    "plugin": {"cli", "engine", "nbd", "server", "storage"},
}


def _imports(path: Path) -> set[str]:
    """Names of modules that a file imports, absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            # `from fleecenbd.storage import device` imports a module as well as `.device` would.
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def _points_the_wrong_way(room: str, name: str) -> bool:
    if not name.startswith("fleecenbd."):
        return False
    inside = name.removeprefix("fleecenbd.")
    if inside == "__version__":
        return False
    return not any(
        inside == allowed or inside.startswith(f"{allowed}.") for allowed in {room, *ALLOWED[room]}
    )


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "fleecenbd" / room).rglob("*.py"))
        for name in sorted(_imports(path))
        if _points_the_wrong_way(room, name)
    ]
    assert wrong == []


def test_an_import_that_points_the_wrong_way_is_noticed() -> None:
    assert _points_the_wrong_way("nbd", "fleecenbd.engine.disk.Disk")
    assert _points_the_wrong_way("engine", "fleecenbd.storage.file.FileDevice")
    assert not _points_the_wrong_way("engine", "fleecenbd.storage.device.Device")
    assert not _points_the_wrong_way("server", "fleecenbd.nbd.handshake.Handshake")


def test_the_protocol_room_knows_no_loop_no_socket_and_no_clock() -> None:
    banned = {"asyncio", "socket", "time", "select", "threading", "uvloop"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "fleecenbd" / "nbd").rglob("*.py"))
        for name in sorted(_imports(path))
        if name.split(".")[0] in banned
    ]
    assert wrong == []


def test_no_module_is_longer_than_four_hundred_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "fleecenbd").rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert listed is not None
    shown = subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    for target in listed[1].split():
        assert f"make {target} " in shown, target


def test_every_variable_that_a_user_may_set_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    set_there = set(re.findall(r"^(?:export )?([A-Z]+) :=", makefile, re.MULTILINE))
    used = set(re.findall(r"\$\(([A-Z]+)\)", makefile)) - set_there
    assert {"SEEDS", "ORDERS", "PEERS"} <= used
    end = makefile.partition("\nhelp:")[2].partition("\n\n")[0]
    assert {name for name in used if f"{name}=" not in end} == set()


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs"])
def test_every_link_between_pages_leads_to_a_file(page: str) -> None:
    start = ROOT / page
    pages = sorted(start.rglob("*.md")) if start.is_dir() else [start]
    assert pages
    for path in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_every_module_named_on_the_architecture_page_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room, body in re.findall(r"### (\w+): .*?\n(.*?)(?=\n##)", page, re.DOTALL):
        for row in re.findall(r"^\| (`.*?) \|", body, re.MULTILINE):
            for name in re.findall(r"`(\w+\.py)`", row):
                assert (ROOT / "fleecenbd" / room / name).exists(), f"{room}/{name}"
