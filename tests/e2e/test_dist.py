"""`make dist`: what it builds can be installed where nothing else is, served from, and tested."""

import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fleecenbd
from tests.behind_nbdkit import behind_nbdkit
from tests.disks import MIB, make_disk
from tests.serving import COMMAND_TIMEOUT_S, connected, serving, try_run

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".venv" / "wheels"
"""The dependencies: `make tools` fetched them, so that nothing here needs a network."""

IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line] + [
    ".git"
]


def _run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _files(root: Path) -> set[str]:
    """What is there and not ignored by git, relative to ``root``."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file()
        and not any(
            fnmatch(part, pattern) for part in path.relative_to(root).parts for pattern in IGNORED
        )
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which `make dist` has run: the checkout itself is left alone."""
    tree = tmp_path_factory.mktemp("dist") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
    # The copy has no .venv: it is told that it needs not be made.
    _run("make", "dist", f"PYTHON={sys.executable}", "--old-file=.venv/.ready", cwd=tree)
    return tree


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, what it depends on, and no more."""
    place = tmp_path_factory.mktemp("clean") / "env"
    (wheel,) = (tree / "dist").glob("*.whl")
    _run("/usr/bin/python3", "-m", "venv", place, cwd=place.parent)
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--isolated", "--no-index"]
    _run(*pip, f"--find-links={WHEELS}", wheel, cwd=place.parent)
    return place / "bin"


def test_one_wheel_and_one_source_archive_are_built_with_the_version_of_the_code(
    tree: Path,
) -> None:
    version = fleecenbd.__version__
    assert {path.name for path in (tree / "dist").iterdir()} == {
        f"fleecenbd-{version}-py3-none-any.whl",
        f"fleecenbd-{version}.tar.gz",
    }


def test_the_installed_command_tells_its_version(installed: Path) -> None:
    result = try_run(installed / "fleecenbd", "--version")
    assert result.stdout == f"fleecenbd {fleecenbd.__version__}\n"


def test_the_installed_server_serves_a_disk_and_a_session(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.serving.FLEECENBD", installed / "fleecenbd")
    disk = make_disk(tmp_path / "vm.raw", MIB)
    before = disk.read_bytes()
    with (
        serving(tmp_path, disk, "--begin", "nightly") as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@nightly")) as backup,
    ):
        guest.pwrite(b"\x55" * MIB, 0)
        assert backup.pread(MIB, 0) == before
        backup.trim(MIB, 0)
    # It is the installed code that served, not that of the checkout.
    home = _run(
        installed / "python", "-c", "import fleecenbd; print(fleecenbd.__file__)", cwd=tmp_path
    )
    assert Path(home.strip()).is_relative_to(installed.parent)


def test_the_source_archive_holds_the_whole_checkout_and_its_tests_run(
    tree: Path, tmp_path: Path
) -> None:
    (archive,) = (tree / "dist").glob("*.tar.gz")
    _run("tar", "-xzf", archive, cwd=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert _files(tree) - _files(folder) == set()
    assert _files(folder) - _files(tree) == {"PKG-INFO", "setup.cfg"}
    some = ["tests/test_house.py", "tests/nbd/test_wire.py", "tests/nbd/test_protocol_table.py"]
    _run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *some, cwd=folder)


def test_the_installed_plugin_serves_a_disk_and_a_session_behind_nbdkit(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = installed.parent / "share" / "fleecenbd" / "fleece.py"
    monkeypatch.setattr("tests.behind_nbdkit.PLUGIN", plugin)
    monkeypatch.setattr("tests.behind_nbdkit.ENVIRONMENT", {})
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    disk = make_disk(tmp_path / "vm.raw", MIB)
    before = disk.read_bytes()
    with (
        behind_nbdkit(tmp_path, disk, "--begin", "nightly") as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@nightly")) as backup,
    ):
        guest.pwrite(b"\x55" * MIB, 0)
        assert backup.pread(MIB, 0) == before
        # It is the installed code that serves, with the libraries that were installed with it.
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert f"{installed.parent}/lib/" in maps
        assert ".venv" not in maps
