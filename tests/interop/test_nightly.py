"""examples/nightly.sh, run night after night as a timer runs it, while a guest writes.

What a night leaves is restored by qemu-img alone, and must be the disk as it was when the night's
session began.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.controlling import Control
from tests.disks import KIB, MIB, copy_disk, first_difference, make_disk
from tests.remembering import Moment, RememberingGuest, remembering
from tests.serving import (
    CLIENTS_PATH,
    COMMAND_TIMEOUT_S,
    FLEECENBD,
    Serving,
    connected,
    run,
    serving,
)

SCRIPT = Path(__file__).parents[2] / "examples" / "nightly.sh"
SIZE = 6 * MIB + 4 * KIB + 512  # no multiple of a bitmap's granule, nor of a page
PAUSE_S = 0.02  # of the guest between writes: a night does not change the whole disk

# What takes the place of a tool: it does a part of its work, or nothing.
BREAKS = {
    "nbdcopy": 'for last; do :; done; head -c 1000000 /dev/urandom >"$last"; exit 1',
    "qemu-io": 'head -n 1 | {real} "$@"; exit 1',
    "mv": "exit 1",
}
FINISH_FAILED = "{fleecenbd} session finish nightly --failed"
ON = 'exec {real} "$@"'


class Nights:
    """A server with a guest, a folder for its backups, and what can go wrong."""

    def __init__(self, server: Serving, folder: Path) -> None:
        self.server = server
        self.backups = folder / "backups of vm"
        self.backups.mkdir()
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{self._bin}:{CLIENTS_PATH}",
            "FLEECENBD_CONTROL": f"{server.unix}.control",
        }

    def replace(self, tool: str, script: str) -> None:
        """Let a shell script take the place of a tool."""
        real = shutil.which(tool, path=CLIENTS_PATH)
        path = self._bin / tool
        path.write_text(f"#!/bin/sh\n{script.format(real=real, fleecenbd=FLEECENBD)}\n")
        path.chmod(0o755)

    def restore_tools(self) -> None:
        """Let every tool be itself again."""
        for path in self._bin.iterdir():
            path.unlink()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a night, in a process group of its own."""
        first = [word for word in arguments if word == "--full"]
        rest = [word for word in arguments if word != "--full"]
        return subprocess.Popen(
            [SCRIPT, *first, self.server.unix, self.backups, *rest],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def night(self, *arguments: str, status: int = 0) -> tuple[list[Path], str]:
        """A night to its end: the files it has made, and what it said on standard error."""
        before = self.made()
        out, err = self._ended(self.start(*arguments), status)
        assert "Traceback" not in err, err
        files = [Path(line) for line in out.splitlines()]
        made = self.made() - before
        assert {path.parent for path in files} == made
        assert all(path.is_file() for path in files)
        assert not (self.backups / ".part").exists()
        assert [one for one in self.sessions() if one["state"] != "finished"] == []
        return files, err

    def _ended(self, process: subprocess.Popen[str], status: int) -> tuple[str, str]:
        with process:
            out, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
        assert process.returncode == status, out + err
        return out, err

    def fails(self, *arguments: str) -> str:
        """A night that fails, and leaves nothing; what it said."""
        files, err = self.night(*arguments, status=1)
        assert files == []
        assert self.sessions()[-1]["result"] == "failed"
        return err

    def made(self) -> set[Path]:
        """The folders of nights."""
        return set(self.backups.glob("[!.]*"))

    def sessions(self) -> list[dict[str, Any]]:
        """What the server says of its sessions."""
        with closing(Control(f"{self.server.unix}.control")) as control:
            return list(control.call("GET", "sessions")["sessions"])


def _restored(backup: Path, folder: Path) -> Path:
    raw = folder / "restored.raw"
    form = "raw" if backup.suffix == ".raw" else "qcow2"
    run("qemu-img", "convert", "-f", form, "-O", "raw", backup, raw)
    return raw


def _builds_on(backup: Path) -> Path:
    """The file that an increment builds on."""
    info = json.loads(run("qemu-img", "info", "--output=json", backup))
    return (backup.parent / info["backing-filename"]).resolve()


@contextmanager
def _nights(tmp_path: Path) -> Iterator[tuple[Nights, RememberingGuest]]:
    """A disk of SIZE that a guest writes to."""
    disk = make_disk(tmp_path / "vm.raw", SIZE, islands=60)
    first = disk.read_bytes()
    with serving(tmp_path, disk) as server:
        guest = RememberingGuest(server.uri("vm"), first, pause_s=PAUSE_S)
        with remembering(guest):
            yield Nights(server, tmp_path), guest


def _good(nights: Nights, guest: RememberingGuest, folder: Path, *arguments: str) -> Path:
    """A night that succeeds and is as it should be: its backup."""
    guest.wait(10)
    moment = Moment([guest])
    (backup,), _ = nights.night(*arguments)
    moment.is_over()
    assert moment.is_shown_by(_restored(backup, folder).read_bytes())
    return backup


def test_nights_with_failures_in_between_make_a_chain_of_whole_backups(tmp_path: Path) -> None:
    with _nights(tmp_path) as (nights, guest):
        nights.replace("nbdcopy", BREAKS["nbdcopy"])
        assert "no backup of vm" in nights.fails()
        nights.restore_tools()
        chain = [_good(nights, guest, tmp_path)]
        assert chain[0].name == "vm.raw"
        nights.replace("qemu-io", BREAKS["qemu-io"])
        nights.fails()
        nights.restore_tools()
        chain.append(_good(nights, guest, tmp_path))
        nights.replace("mv", BREAKS["mv"])
        nights.fails()
        # A new chain that fails leaves the old one whole.
        nights.replace("nbdcopy", BREAKS["nbdcopy"])
        nights.fails("--full")
        nights.restore_tools()
        chain.append(_good(nights, guest, tmp_path))
        for backup, before in zip(chain[1:], chain, strict=False):
            assert backup.name == "vm.qcow2"
            assert _builds_on(backup) == before
            assert backup.stat().st_mode & 0o777 == 0o600, "a guest's disk is not for everybody"
        assert _good(nights, guest, tmp_path, "--full").name == "vm.raw"
    assert len(nights.made()) == len(chain) + 1


def test_an_increment_never_builds_on_a_night_whose_session_counts_as_failed(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        ((full,), _) = nights.night()
        write = tmp_path / "write"
        write.write_text("import os\nh.pwrite(os.urandom(65536), 4096)\n")
        guest = f"nbdsh -u '{server.uri('vm')}' -c \"$(cat {write})\""
        run("sh", "-c", guest)
        # The backup is whole when sync is called. What becomes of its session is another matter.
        for meanwhile, status, words in (
            (guest, 0, "counts as failed: vm@nightly"),
            (FINISH_FAILED, 1, "the next night builds on the backup before it"),
        ):
            before = copy_disk(disk, tmp_path / "before.raw")
            nights.replace("sync", f"{{{{ {meanwhile}; }}}} >&2; {ON}")
            ((odd,), err) = nights.night("--temp-limit", "4k", status=status)
            assert words in err
            assert nights.sessions()[-1]["result"] == "failed"
            assert _builds_on(odd) == full
            assert first_difference(_restored(odd, tmp_path), before) is None
        nights.restore_tools()
        ((backup,), _) = nights.night()
    assert _builds_on(backup) == full
    assert first_difference(_restored(backup, tmp_path), disk) is None


def test_a_predecessor_that_is_gone_makes_a_full_backup_and_a_chain_can_be_moved(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB + 512)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        nights.night()
        ((gone,), _) = nights.night()  # with nothing that has changed
        assert gone.name == "vm.qcow2"
        assert first_difference(_restored(gone, tmp_path), disk) is None
        shutil.rmtree(gone.parent)
        with connected(server.uri("vm")) as guest:
            guest.pwrite(b"changed", 1000)
        ((full,), err) = nights.night()
        assert "whose backup is not in" in err
        assert full.name == "vm.raw"
        with connected(server.uri("vm")) as guest:
            guest.pwrite(b"changed", 200_000)
    with serving(tmp_path, disk) as nights.server:  # it remembers
        ((backup,), _) = nights.night()
    assert _builds_on(backup) == full
    moved = nights.backups.rename(tmp_path / "elsewhere") / backup.parent.name / backup.name
    assert first_difference(_restored(moved, tmp_path), disk) is None


def test_a_chain_is_ended_while_it_can_be_opened(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        nights.environment["FILES_MAX"] = "3"
        names = []
        for _ in range(4):
            ((backup,), err) = nights.night()
            names.append(backup.name)
        assert "whose backup ends a chain of 3 files: a full backup" in err
        assert names == ["vm.raw", "vm.qcow2", "vm.qcow2", "vm.raw"]
        ((increment,), _) = nights.night()
        assert _builds_on(increment) == backup
        backup.unlink()
        ((backup,), err) = nights.night()
        assert "whose backup cannot be opened: a full backup" in err
        assert backup.name == "vm.raw"


def test_a_night_that_is_killed_leaves_nothing_that_the_next_cannot_mend(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    with _nights(tmp_path) as (nights, guest):
        full = _good(nights, guest, tmp_path)
        nights.replace("qemu-io", f"echo >{begun}; exec sleep 1000")
        for how in (signal.SIGTERM, signal.SIGKILL):
            with nights.start() as process:
                begun.read_text()
                os.killpg(process.pid, how)
                process.communicate(timeout=COMMAND_TIMEOUT_S)
            assert nights.made() == {full.parent}
            left = nights.sessions()[-1]
            if how is signal.SIGTERM:
                assert process.returncode == 128 + how
                assert left["result"] == "failed"
                assert not (nights.backups / ".part").exists()
            else:
                assert left["state"] == "active"
        nights.restore_tools()
        guest.wait(10)
        moment = Moment([guest])
        ((backup,), err) = nights.night()
        moment.is_over()
        assert "left by a run that was killed" in err
        assert _builds_on(backup) == full
        assert moment.is_shown_by(_restored(backup, tmp_path).read_bytes())


def test_a_server_that_is_killed_during_a_night_costs_that_night_alone(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    chain: list[tuple[Nights, Path]] = []

    def kill_it_in_the_second_night() -> None:
        with serving(tmp_path, disk) as server:
            nights = Nights(server, tmp_path)
            ((full,), _) = nights.night()
            chain.append((nights, full))
            nights.replace("qemu-io", f"kill -9 {server.pid}; {ON}")
            with nights.start() as process:
                _, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
            assert process.returncode == 1, err

    with pytest.raises(AssertionError, match="the server exited with -9"):
        kill_it_in_the_second_night()
    ((nights, full),) = chain
    assert nights.made() == {full.parent}
    nights.restore_tools()
    with serving(tmp_path, disk) as nights.server:
        (left,) = [one for one in nights.sessions() if one["state"] == "active"]
        with connected(nights.server.uri("vm")) as guest:
            guest.pwrite(b"changed", 200_000)
        ((backup,), err) = nights.night()
        assert "left by a run that was killed" in err
        (made,) = [one for one in nights.sessions() if one["result"] == "success"]
        assert made["id"] != left["id"]
    assert _builds_on(backup) == full
    assert first_difference(_restored(backup, tmp_path), disk) is None


def test_disks_have_their_own_modes_granularities_and_odd_sizes(tmp_path: Path) -> None:
    sizes = {"vda": 2 * MIB + 512, "vdb": MIB + 4 * KIB, "odd": 300_001}
    disks = {
        name: make_disk(tmp_path / f"{name}.img", size, seed=size) for name, size in sizes.items()
    }
    with serving(tmp_path, *(f"{name}={path}" for name, path in disks.items())) as server:
        nights = Nights(server, tmp_path)
        control = ("--control", f"{server.unix}.control")
        # A bitmap of its own making, with bits for less than a cluster of qcow2's usual size.
        run(FLEECENBD, "bitmap", "add", "vdb", "chain", "--granularity", "4k", *control)
        nights.night("--disk", "vda", "--disk", "vdb")
        for name, size in sizes.items():
            with connected(server.uri(name)) as guest:
                guest.pwrite(name.encode() * 1000, 4096 * 3 + 5)
                guest.pwrite(b"end", size - 3)
                guest.zero(70_000, 100_000)
        files, _ = nights.night()
        assert [path.name for path in files] == ["odd.raw", "vda.qcow2", "vdb.qcow2"]
        with connected(server.uri("odd")) as guest:
            guest.trim(9000, 200_000)
            guest.pwrite(b"END", sizes["odd"] - 3)
        files, _ = nights.night()
        info = {
            path.stem: json.loads(run("qemu-img", "info", "--output=json", path)) for path in files
        }
        assert {name: one["cluster-size"] for name, one in info.items()} == {
            "odd": 64 * KIB,
            "vda": 64 * KIB,
            "vdb": 4 * KIB,
        }
        begun = json.loads((files[0].parent / "session.json").read_text())
        for path in files:
            raw = _restored(path, tmp_path)
            # qcow2 counts in sectors; the size itself is in session.json.
            (size,) = [one["size"] for one in begun["disks"] if one["disk"] == path.stem]
            assert size == sizes[path.stem]
            assert raw.stat().st_size == -(-size // 512) * 512
            os.truncate(raw, size)
            assert first_difference(raw, disks[path.stem]) is None


def test_a_session_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        run(FLEECENBD, "session", "begin", "nightly", "--control", f"{server.unix}.control")
        with nights.start() as process:
            _, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
        assert process.returncode == 1
        assert "no session, so no backup" in err
        assert [one["state"] for one in nights.sessions()] == ["active"]
        assert nights.made() == set()
        assert not (nights.backups / ".part").exists()


def test_two_nights_at_once_into_one_folder_are_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        with subprocess.Popen(
            ["flock", nights.backups / ".lock", "sh", "-c", "echo locked; read _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"locked\n"
            _, err = nights.night(status=1)
            other.communicate(b"\n")
        assert "another backup into" in err
        nights.night()


def test_no_space_is_a_clear_failure(tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(os.urandom(2 * MIB))
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    with serving(tmp_path, disk) as server:
        nights = Nights(server, tmp_path)
        script = (
            'mount -t tmpfs -o size=3m tmpfs "$2"; "$0" "$1" "$2" || exit 9; $3; "$0" "$1" "$2"'
        )
        change = tmp_path / "change"
        change.write_text(
            f"#!{sys.executable}\nimport nbd, os\nh = nbd.NBD()\n"
            f"h.connect_uri({server.uri('vm')!r})\n"
            f"h.pwrite(os.urandom({2 * MIB}), 0)\nh.shutdown()\n"
        )
        change.chmod(0o755)
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                *user,
                "sh",
                "-c",
                script,
                SCRIPT,
                server.unix,
                nights.backups,
                change,
            ],
            env=nights.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "no backup of vm" in done.stderr
        assert "No space left" in done.stderr
        assert [one["result"] for one in nights.sessions()] == ["success", "failed"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "usage: "),
        (("--full", "f.sock"), 2, "usage: "),
        (("none.sock", "."), 1, "none.sock is no socket: does the server run?"),
    ],
)
def test_wrong_arguments_are_told(
    tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    done = subprocess.run(
        [SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk) as server:
        done = subprocess.run(
            [SCRIPT, server.unix, tmp_path / "none"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert "none is no folder" in done.stderr
