"""What the README tells people to type, typed: its commands and its Python, in an empty folder."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.serving import CLIENTS_PATH, COMMAND_TIMEOUT_S, connected, run, serving, try_run

README = (Path(__file__).parents[2] / "README.md").read_text()
SOCKET = "/run/vm.sock"


def _blocks() -> list[str]:
    """The indented blocks of the page, without the indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in found]


def _lines(word: str) -> list[str]:
    """Commands of the page in which a word stands."""
    joined = "\n".join(_blocks()).replace("\\\n", " ")
    return [line for line in joined.splitlines() if word in line]


def _python() -> str:
    """The client of one's own."""
    (script,) = [block for block in _blocks() if block.startswith("import nbd")]
    return script


def _shell(folder: Path, line: str) -> None:
    state = {"PATH": CLIENTS_PATH, "XDG_STATE_HOME": str(folder), "HOME": str(folder)}
    line = line.replace("fleecenbd serve", f"fleecenbd serve --state-dir {folder / 'state'}")
    subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env={**os.environ, **state},
        stdin=subprocess.DEVNULL,
        timeout=COMMAND_TIMEOUT_S,
        check=True,
    )


@pytest.mark.parametrize("line", [*_lines("--run"), *_lines("-- [")])
def test_the_one_shot_commands_make_a_backup(tmp_path: Path, line: str) -> None:
    disk = make_disk(tmp_path / "vm.raw", 2 * MIB + 512)
    _shell(tmp_path, line)
    assert first_difference(disk, tmp_path / "backup.raw") is None


def test_the_pulls_and_the_python_against_a_server_make_backups(tmp_path: Path) -> None:
    pulls = [line for line in _lines("vm@nightly?") if re.match("nbdcopy|qemu-img", line)]
    script = _python()
    assert len(pulls) == 2
    disk = make_disk(tmp_path / "vm.raw", 2 * MIB + 512)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        for line in pulls:
            _shell(tmp_path, line.replace(SOCKET, str(server.unix)))
        script = script.replace(SOCKET, str(server.unix)).replace("backup.raw", "trimmed.raw")
        subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=COMMAND_TIMEOUT_S
        )
        assert server.temp_bytes() == 0
    run("qemu-img", "convert", "-O", "raw", tmp_path / "backup.qcow2", tmp_path / "qemu.raw")
    for name in ("backup.raw", "qemu.raw", "trimmed.raw"):
        assert first_difference(before, tmp_path / name) is None, name


def test_the_python_releases_nothing_that_its_full_target_has_not_stored(tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(random.Random("full").randbytes(4 * MIB))
    small = tmp_path / "small"
    small.mkdir()
    # Space for one step and a part of the second, of which a write stores what it can.
    mount = f'mount -t tmpfs -o size=1500k tmpfs {small} && cd {small} && exec "$@"'
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        script = _python().replace(SOCKET, str(server.unix))
        result = try_run(
            *("unshare", "--mount", *user, "sh", "-c", mount, "sh"), sys.executable, "-c", script
        )
        assert result.returncode != 0
        assert "No space left" in result.stderr
        with connected(server.uri("vm@nightly")) as backup:
            assert bytes(backup.pread(3 * MIB, MIB)) == disk.read_bytes()[MIB:]


def test_qemu_takes_the_block_device_of_the_page(tmp_path: Path) -> None:
    (line,) = _lines("-blockdev")
    found = re.search(r"-blockdev (\S+)", line)
    assert found is not None
    disk = make_disk(tmp_path / "vm.raw", 2 * MIB)
    with serving(tmp_path, disk) as server:
        device = found[1].replace(SOCKET, str(server.unix)).replace("node-name=vm,", "")
        run("qemu-io", "--image-opts", "-c", "write -P 7 0 64k", "-c", "flush", device)
    assert disk.read_bytes()[: 64 << 10] == b"\x07" * (64 << 10)
