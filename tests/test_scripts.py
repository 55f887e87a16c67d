"""What .ci/run runs, setup.sh installs and debian-folder.sh finds out, shown on stubs."""

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

# What setup.sh itself is written with; everything else that it looks for is a stub in these tests.
SHELL_TOOLS = ["sh", "dirname", "id", "env"]


def _stub(folder: Path, name: str, body: str) -> None:
    """A command of this name in `folder` that is the shell script `body`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _ci(tmp_path: Path, make: str, *, limit_s: int | None = None) -> tuple[int, list[str]]:
    """.ci/run in a folder of its own, with `make` a stub: exit status, and the lines printed."""
    text = (ROOT / ".ci" / "run").read_text()
    if limit_s is not None:
        text, found = re.subn(r"^limit_s=\d+$", f"limit_s={limit_s}", text, flags=re.MULTILINE)
        assert found == 1
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text(text)
    _stub(tmp_path / "bin", "make", make)
    ended = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    lines = re.sub(r"after \d+ s$", "after N s", ended.stdout, flags=re.MULTILINE).splitlines()
    return ended.returncode, lines


def test_ci_runs_both_parts_and_says_so(tmp_path: Path) -> None:
    status, lines = _ci(tmp_path, 'echo "make $* CI=$CI"')
    assert status == 0
    assert lines == [
        "make test CI=true",
        "ci: make test: passed after N s",
        "make interop PEERS=trixie CI=true",
        "ci: make interop PEERS=trixie: passed after N s",
    ]


def test_ci_stops_at_the_first_part_that_fails(tmp_path: Path) -> None:
    status, lines = _ci(tmp_path, "exit 2")
    assert status == 2
    assert lines == [
        "ci: make test: FAILED (status 2) after N s",
        "ci: make interop PEERS=trixie: not run",
    ]


def test_ci_fails_when_only_the_second_part_does(tmp_path: Path) -> None:
    status, lines = _ci(tmp_path, '[ "$1" = test ] || exit 3')
    assert status == 3
    assert lines[-1] == "ci: make interop PEERS=trixie: FAILED (status 3) after N s"


def test_ci_ends_what_hangs_and_fails(tmp_path: Path) -> None:
    status, lines = _ci(tmp_path, "exec sleep 100", limit_s=1)
    assert status == 124
    assert lines[0] == "ci: make test: FAILED (ended, 1 s were over) after N s"


def test_a_part_of_ci_that_begins_past_the_limit_is_ended_as_well(tmp_path: Path) -> None:
    status, lines = _ci(tmp_path, '[ "$1" = test ] || exec sleep 100', limit_s=0)
    assert status == 124
    assert lines[-1].startswith("ci: make interop PEERS=trixie: FAILED (ended")


def _set_up(tmp_path: Path, part: str, commands: set[str]) -> tuple[int, str, str]:
    """setup.sh on a machine with these commands: exit status, what it said, calls of apt-get."""
    here = tmp_path / "bin"
    here.mkdir()
    for name in SHELL_TOOLS:
        found = shutil.which(name)
        assert found is not None
        (here / name).symlink_to(found)
    for name in commands:
        _stub(here, name, "exit 0")
    if "apt-get" in commands:
        _stub(here, "apt-get", f'echo "$@" >>{tmp_path / "asked"}')
        _stub(here, "sudo", 'exec "$@"')
    ended = subprocess.run(
        [here / "sh", SCRIPTS / "setup.sh", part],
        env={"PATH": str(here)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    asked = tmp_path / "asked"
    return ended.returncode, ended.stdout, asked.read_text() if asked.exists() else ""


PEERS = {"debootstrap", "mount", "umount", "unshare", "pivot_root", "flock", "gpgv", "apt-get"}


@pytest.mark.parametrize("missing", ["debootstrap", "gpgv"])
def test_setting_up_for_peers_installs_what_is_missing(tmp_path: Path, missing: str) -> None:
    status, _, asked = _set_up(tmp_path, "peers", PEERS - {missing})
    assert status == 0
    update, install = asked.splitlines()
    assert update.endswith(" update")
    assert missing in install.split()
    assert "mount" not in install.split()


def test_debian_13_checks_signatures_without_gpgv(tmp_path: Path) -> None:
    status, _, asked = _set_up(tmp_path, "peers", PEERS - {"gpgv"} | {"sqv"})
    assert status == 0
    assert "gpgv" not in asked


def test_setting_up_asks_apt_for_nothing_where_nothing_is_missing(tmp_path: Path) -> None:
    assert _set_up(tmp_path, "lint", {"shellcheck", "apt-get"}) == (0, "", "")


def test_setting_up_without_apt_names_the_packages(tmp_path: Path) -> None:
    status, said, _ = _set_up(tmp_path, "lint", set())
    assert status == 1
    assert "missing: shellcheck" in said


def _call(
    tmp_path: Path, call: str, environment: dict[str, str] | None = None, archives: str = ""
) -> "subprocess.CompletedProcess[str]":
    """A function of debian-folder.sh, where apt knows `archives` (one a line)."""
    _stub(tmp_path / "bin", "apt-get", f"cat <<'END'\n{archives}\nEND")
    return subprocess.run(
        ["sh", "-c", f". {SCRIPTS}/debian-folder.sh; {call}"],
        env={
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "who": "test",
            "repository": str(ROOT),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


ARCHIVES = (
    "https://example.org/apt\nhttp://one.example/debian-security/\nhttp://one.example/debian/"
)


def test_the_mirror_of_a_folder_is_the_one_that_apt_uses(tmp_path: Path) -> None:
    assert _call(tmp_path, "mirror", archives=ARCHIVES).stdout == "http://one.example/debian/\n"


def test_a_mirror_that_is_named_goes_before_the_one_of_apt(tmp_path: Path) -> None:
    named = {"DEBIAN_MIRROR": "http://two.example/debian"}
    assert _call(tmp_path, "mirror", named, ARCHIVES).stdout == "http://two.example/debian\n"


def test_where_apt_knows_no_mirror_the_message_says_what_to_set(tmp_path: Path) -> None:
    ended = _call(tmp_path, "mirror", archives="https://example.org/apt")
    assert ended.returncode == 1
    assert "set DEBIAN_MIRROR" in ended.stderr


def test_folders_that_pip_is_told_to_look_into_are_handed_on(tmp_path: Path) -> None:
    links, index, configured = tmp_path / "links", tmp_path / "index", tmp_path / "configured"
    for folder in (links, index / "simple", configured, tmp_path / ".config" / "pip"):
        folder.mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text(
        f"[global]\nfind-links = {configured}\n    /not/there\n"
    )
    environment = {
        "PIP_FIND_LINKS": str(links),
        "PIP_EXTRA_INDEX_URL": f"https://example.org/simple file://{index}/simple/",
    }
    named = _call(tmp_path, "pip_folders", environment).stdout.splitlines()
    assert {str(links), str(index), str(configured)} <= set(named)
    assert "/not/there" not in named


def _locking(kind: str, file: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["sh", "-c", f". {SCRIPTS}/debian-folder.sh; lock {kind} {file}; say mine"],
        env={"PATH": os.environ["PATH"], "who": "test", "repository": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_who_shares_a_folder_does_not_wait(tmp_path: Path) -> None:
    file = tmp_path / "trixie.lock"
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert _locking("shared", file).communicate(timeout=60)[0] == "test: mine\n"


@pytest.mark.parametrize(
    ("first", "second"), [(fcntl.LOCK_EX, "shared"), (fcntl.LOCK_SH, "exclusive")]
)
def test_who_comes_second_says_that_it_waits_and_goes_on_when_the_first_is_done(
    tmp_path: Path, first: int, second: str
) -> None:
    file = tmp_path / "trixie.lock"
    with file.open("w") as held:
        fcntl.flock(held, first)
        process = _locking(second, file)
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == f"test: waiting for another that uses {file.with_suffix('')}\n"
    assert process.communicate(timeout=60)[0] == "test: mine\n"
    assert process.returncode == 0


def test_every_line_of_the_peers_list_is_one_package() -> None:
    lines = (SCRIPTS / "peers.list").read_text().splitlines()
    names = [line.split("#")[0].strip() for line in lines]
    names = [name for name in names if name]
    assert [name for name in names if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name)] == []
    assert len(names) == len(set(names)) > 0
