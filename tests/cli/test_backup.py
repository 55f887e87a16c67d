"""``fleecenbd backup`` as a process, against a server whose guest may write."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli.backup_copy import PullAsk, PullDisk
from fleecenbd.cli.backup_owner import Owner
from fleecenbd.cli.backup_pairs import Pair, Pairs
from fleecenbd.cli.backup_view import BackupView
from fleecenbd.cli.backup_work import Work
from fleecenbd.cli.main import run
from fleecenbd.client import chains
from tests.controlling import Control
from tests.disks import KIB, MIB, copy_disk, first_difference, make_disk
from tests.mounts import unmount
from tests.serving import CLIENTS_PATH, Serving, connected, serving
from tests.serving import run as run_tool

SIZE = 6 * MIB + 4096
TIMEOUT_S = 60.0
BACKUP = (sys.executable, "-m", "tests.durability.pulled", "backup")


class Served:
    """One server for all tests, with two disks."""

    def __init__(self, server: Serving, images: dict[str, Path]) -> None:
        self.server = server
        self.images = images
        self.control = Control(f"{server.unix}.control")
        self.writes = 0


class Backups:
    """What one test does with the server, in this process where it does not matter."""

    def __init__(self, served: Served, capfd: pytest.CaptureFixture[str], *, push: bool) -> None:
        self.more = ("--push",) if push else ()
        self._served = served
        self._capfd = capfd
        self.server = served.server
        self.control = served.control

    def sessions(self) -> list[dict[str, Any]]:
        return list(self.control.call("GET", "sessions")["sessions"])

    def last(self) -> dict[str, Any]:
        return self.sessions()[-1]

    def write(self, disk: str = "vda", offset: int | None = None) -> None:
        """As the guest: something new, somewhere, and zeroes elsewhere."""
        self._served.writes += 1
        with connected(self.server.uri(disk)) as guest:
            at = self._served.writes * 300_000 % (5 * MIB) // 512 * 512
            at = at if offset is None else offset
            guest.pwrite(os.urandom(70 * KIB), at)
            guest.zero(100 * KIB, (at + 2 * MIB) % (4 * MIB))

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """As a process of its own, that can be killed."""
        return subprocess.Popen(
            [*BACKUP, *map(str, words), *self.more],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str | Path, status: int = 0) -> tuple[str, str]:
        """What it prints, and what it says."""
        self._capfd.readouterr()
        assert run(["backup", *map(str, words), *self.more]) == status, self._capfd.readouterr()
        out, err = self._capfd.readouterr()
        assert all(line.startswith("fleecenbd: ") for line in err.splitlines()), err
        return out, err

    def backup(self, *words: str | Path, status: int = 0) -> tuple[list[Path], str]:
        """The files it prints, and what it says."""
        out, err = self.call(*words, status=status)
        return [Path(line) for line in out.splitlines()], err

    def fails(self, *words: str | Path) -> str:
        """One that makes nothing, and leaves nothing that was not there."""
        folder = Path(str(words[1]).rpartition(":")[2]).parent
        before = sorted(folder.iterdir())
        files, err = self.backup(*words, status=1)
        assert files == []
        assert sorted(folder.iterdir()) == before
        assert all(one["state"] == "finished" for one in self.sessions())
        return err

    def is_shown_by(self, path: Path, disk: str = "vda") -> bool:
        """Does a backup restore to the disk as it is now?"""
        image = self._served.images[disk]
        if path.suffix == ".raw":
            return first_difference(path, image) is None
        raw = path.with_name("restored")
        run_tool("qemu-img", "convert", "-O", "raw", path, raw)
        try:
            return first_difference(raw, image) is None
        finally:
            raw.unlink()

    def keep_moment(self, path: Path, disk: str = "vda") -> Path:
        """A copy of the disk as it is now."""
        return copy_disk(self._served.images[disk], path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("backup")
    images = {
        name: make_disk(folder / f"{name}.raw", SIZE, islands=60, seed=seed)
        for seed, name in enumerate(("vda", "vdb"))
    }
    with serving(folder, *(f"{name}={path}" for name, path in images.items())) as server:
        yield Served(server, images)


@pytest.fixture
def backups(
    request: pytest.FixtureRequest,
    served: Served,
    own_logs: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Backups:
    monkeypatch.setenv("FLEECENBD_CONTROL", f"{served.server.unix}.control")
    monkeypatch.setenv("PATH", CLIENTS_PATH)
    return Backups(served, capfd, push=getattr(request, "param", "pull") == "push")


either_way = pytest.mark.parametrize("backups", ["pull", "push"], indirect=True)
"""Copied by this process, and by a job of the server."""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@either_way
def test_a_full_backup_is_whole_written_down_and_its_session_finished(
    backups: Backups, tmp_path: Path
) -> None:
    target = tmp_path / "vda.raw"
    files, err = backups.backup("vda", target, "--verify", "--checksum", "sha256", "--ttl", "600")
    assert files == [target]
    assert backups.is_shown_by(target)
    assert target.stat().st_mode & 0o777 == 0o600
    assert _names(tmp_path) == ["vda.raw", "vda.raw.backup.json", "vda.raw.sha256"]
    last = backups.last()
    assert (last["name"], last["result"], last["ttl"]) == ("backup", "success", 600)
    assert err.splitlines()[-1].startswith("fleecenbd: the backup of vda as of 20")
    record = json.loads((tmp_path / "vda.raw.backup.json").read_text())
    assert record["id"] == last["id"]
    root = record["disks"][0]["checksum"]["root"]
    assert f"root {root}\n" in (tmp_path / "vda.raw.sha256").read_text()
    told = backups.fails("vda", target)
    assert "vda.raw: it is there already" in told
    files, _ = backups.backup("vda", target, "--force")
    assert backups.is_shown_by(target)
    assert _names(tmp_path) == ["vda.raw", "vda.raw.backup.json"], "the checksum was of another"


@either_way
def test_a_chain_of_qcow2_files_finds_what_it_builds_on(backups: Backups, tmp_path: Path) -> None:
    backups.backup("vda", tmp_path / "mon.raw", "--bitmap", "c1")
    for name, words in (
        ("tue", ()),
        ("wed", ("--onto", tmp_path / "tue.qcow2")),
    ):
        backups.write()
        (file,), err = backups.backup(
            "vda", f"qcow2:{tmp_path}/{name}.qcow2", "--incremental", "c1", *words
        )
        assert "what has changed, about " in err
        assert backups.is_shown_by(file)
    info = json.loads(run_tool("qemu-img", "info", "--backing-chain", "--output=json", file))
    assert [one.get("backing-filename") for one in info] == ["tue.qcow2", "mon.raw", None]
    # Neither the middle of the chain nor a file below may be written over.
    assert "wed.qcow2 builds on it" in backups.fails(
        "vda", f"qcow2:{tmp_path}/tue.qcow2", "--force"
    )


def test_what_does_not_fit_is_refused_before_a_session_is_begun(
    backups: Backups, tmp_path: Path
) -> None:
    mon, tue = tmp_path / "mon.raw", f"qcow2:{tmp_path}/tue.qcow2"
    count = len(backups.sessions())
    assert "vda has no bitmap c2 yet: a full backup is needed" in backups.fails(
        "vda", tue, "--incremental", "c2"
    )
    assert len(backups.sessions()) == count
    backups.backup("vda", mon, "--bitmap", "c2")
    backups.backup("vda", tmp_path / "else.raw")
    count = len(backups.sessions())
    told = backups.fails("vda", tue, "--incremental", "c2", "--onto", tmp_path / "else.raw")
    assert "else.raw is of session " in told
    assert "what has changed is counted from session " in told
    assert "--or-full makes where it must be" in told
    before = mon.stat()
    os.utime(mon)
    assert "mon.raw was written to since" in backups.fails("vda", tue, "--incremental", "c2")
    os.utime(mon, ns=(before.st_atime_ns, before.st_mtime_ns))
    mon.rename(tmp_path / "moved")
    assert "mon.raw is gone" in backups.fails("vda", tue, "--incremental", "c2")
    (tmp_path / "moved").rename(mon)
    (tmp_path / "mon.raw.backup.json").rename(tmp_path / "hidden")
    assert "no backup of session " in backups.fails("vda", tue, "--incremental", "c2")
    told = backups.fails("vda", tue, "--incremental", "c2", "--onto", mon)
    assert "mon.raw has no record (mon.raw.backup.json)" in told
    assert len(backups.sessions()) == count
    (file,), err = backups.backup("vda", tue, "--incremental", "c2", "--or-full")
    assert "a full backup: no backup of session" in err
    assert backups.is_shown_by(file)
    assert backups.last()["disks"][0]["bitmap"]["mode"] == "new"


@pytest.mark.parametrize("way", [("--json",), ("--progress", "json")])
def test_a_machine_is_told_that_there_is_no_backup(
    backups: Backups, tmp_path: Path, way: tuple[str, ...]
) -> None:
    target = tmp_path / "there.raw"
    target.touch()
    out, err = backups.call("vda", target, *way, status=1)
    told = json.loads(out)
    assert (told["result"], told["files"]) == ("failed", [])
    assert told["error"] in err
    assert "it is there already" in told["error"]


@either_way
def test_nights_of_all_disks_are_folders_of_one_moment(backups: Backups, tmp_path: Path) -> None:
    nights = []
    for _ in range(3):
        files, _ = backups.backup("--all", tmp_path, "--incremental", "c3", "--or-full")
        for path in files:
            assert backups.is_shown_by(path, path.stem)
        nights.append(files)
        backups.write("vdb")
    assert [path.name for path in nights[0]] == ["vda.raw", "vdb.raw"]
    assert [path.name for path in nights[2]] == ["vda.qcow2", "vdb.qcow2"]
    assert {path.parent for path in nights[2]} == {nights[2][0].parent}
    assert nights[2][0].parent.stat().st_mode & 0o777 == 0o700
    assert _names(nights[2][0].parent) == ["session.json", "vda.qcow2", "vdb.qcow2"]
    # A link of the chain is gone: a full backup of all, at one moment, that says why.
    shutil.rmtree(nights[2][0].parent)
    files, err = backups.backup("--all", tmp_path, "--incremental", "c3", "--or-full")
    assert "a full backup: no backup of session " in err
    assert [path.name for path in files] == ["vda.raw", "vdb.raw"]
    # All can be moved.
    backups.write("vdb")
    files, _ = backups.backup("--disk", "vdb", tmp_path, "--incremental", "c3")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert backups.is_shown_by(moved / files[0].relative_to(tmp_path), "vdb")
    moved.rename(tmp_path)


def test_a_chain_is_ended_before_qemu_cannot_open_it(
    backups: Backups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "FILES_MAX", 2)
    words = ("--all", tmp_path, "--incremental", "c3b")
    backups.backup(*words, "--or-full")
    backups.backup(*words)
    before = len(backups.sessions())
    told = backups.backup(*words, status=1)[1]
    assert "is as long as QEMU can open it" in told
    assert "a full backup is needed" in told
    assert len(backups.sessions()) == before, "it was known before"
    files, err = backups.backup(*words, "--or-full")
    assert "a full backup: the chain that ends in " in err
    assert [path.name for path in files] == ["vda.raw", "vdb.raw"]
    flat = tmp_path / "vda.qcow2"
    backups.backup("vda", f"qcow2:{flat}", "--bitmap", "c3c")
    backups.backup("vda", f"qcow2:{tmp_path}/b", "--incremental", "c3c")
    told = backups.backup("vda", f"qcow2:{tmp_path}/c", "--incremental", "c3c", status=1)[1]
    assert "is as long as QEMU can open it" in told


@either_way
def test_in_place_a_full_backup_is_brought_up_to_date(backups: Backups, tmp_path: Path) -> None:
    target = tmp_path / "vda.raw"
    bitmap = f"c4{''.join(backups.more)}"
    words = ("vda", target, "--incremental", bitmap, "--in-place")
    told = backups.fails(*words)
    assert f"vda has no bitmap {bitmap} yet" in told
    for count in range(3):
        _, err = backups.backup(*words, "--or-full", "--verify")
        assert ("a full backup" in err) is (count == 0)
        assert backups.is_shown_by(target)
        assert _names(tmp_path) == ["vda.raw", "vda.raw.backup.json"]
        backups.write()
    above = tmp_path / "above.qcow2"
    backups.backup("vda", f"qcow2:{above}", "--incremental", bitmap, "--onto", target)
    assert "above.qcow2 builds on it" in backups.fails(*words)
    above.unlink()
    told = backups.fails(*words)
    assert "what has changed is counted from session" in told
    target.write_bytes(b"somebody's own")
    (tmp_path / "vda.raw.backup.json").unlink()
    told = backups.fails(*words, "--or-full")
    assert "is no backup of this disk" in told
    assert target.read_bytes() == b"somebody's own"


@pytest.mark.parametrize("seed", [1])
def test_in_place_over_kills_it_is_always_the_old_moment_or_the_new_one(
    backups: Backups, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    target = tmp_path / "vda.raw"
    words = ("vda", target, "--incremental", "c5", "--in-place", "--or-full")
    backups.backup(*words)
    moments = [backups.keep_moment(tmp_path / "m0")]
    for count in range(1, 5):
        backups.write()
        moments.append(backups.keep_moment(tmp_path / f"m{count}"))
        with backups.start(*words, "--progress", "json") as process:
            _until(process, "done" if count % 2 else "start")
            try:
                process.wait(dice.uniform(0, 0.02))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        if target.exists():
            assert any(first_difference(target, moment) is None for moment in moments)
        else:
            assert (tmp_path / "vda.raw.rolling").exists()
    backups.call("--roll-forward", target)
    assert target.exists()
    backups.backup(*words)
    assert backups.is_shown_by(target)


def _until(process: subprocess.Popen[str], kind: str, **least: int) -> None:
    """Until it tells of such an event, whose fields are that much; or has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == kind and all(event[name] >= much for name, much in least.items()):
            return
    assert process.stderr is not None
    assert process.wait() == 0, process.stderr.read()


def _until_it_copies(process: subprocess.Popen[str]) -> None:
    _until(process, "progress", read=1)
    assert process.poll() is None


@either_way
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind_and_forgets_nothing(
    backups: Backups, tmp_path: Path, how: signal.Signals
) -> None:
    bitmap = f"c6-{how}"
    backups.backup("vda", tmp_path / "full.raw", "--bitmap", bitmap)
    for _ in range(4):
        backups.write()
    before = _names(tmp_path)
    words = ("vda", f"qcow2:{tmp_path}/inc.qcow2", "--incremental", bitmap)
    with backups.start(*words, "--rate", "32k", "--progress", "json") as process:
        _until_it_copies(process)
        process.send_signal(how)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (130 if how == signal.SIGINT else 1)
    assert "interrupted" in err
    assert _names(tmp_path) == before
    assert backups.last()["result"] == "failed"
    (file,), _ = backups.backup(*words)
    assert backups.is_shown_by(file)


@either_way
def test_a_killed_run_is_recognised_and_its_session_counts_as_failed(
    backups: Backups, tmp_path: Path
) -> None:
    words = ("vda", tmp_path / "vda.raw", "--bitmap", "c7")
    with backups.start(*words, "--rate", "1M", "--progress", "json") as process:
        _until_it_copies(process)
        told = backups.backup("vdb", tmp_path / "other.raw", status=1)[1]
        assert "another backup is at work in session backup; wait for it" in told
        told = backups.backup(*words, "--session", "another", status=1)[1]
        assert f"another backup to {tmp_path}/vda.raw is at work; wait for it" in told
        process.kill()
        process.communicate()
    left = backups.last()
    assert left["state"] == "active"
    assert (tmp_path / "vda.raw.backing-up.part").exists()
    # Under another name: what is left of the killed one goes all the same.
    files, err = backups.backup("vda", tmp_path / "another.raw", "--bitmap", "c7")
    assert "session backup was left unfinished by an earlier run; it counts as failed" in err
    assert backups.is_shown_by(files[0])
    assert [one["result"] for one in backups.sessions()[-2:]] == ["failed", "success"]
    assert _names(tmp_path) == ["another.raw", "another.raw.backup.json"]


@either_way
def test_resume_goes_on_with_the_moment_of_a_killed_run(backups: Backups, tmp_path: Path) -> None:
    moment = backups.keep_moment(tmp_path / "moment", "vdb")
    folder = tmp_path / "nights"
    folder.mkdir()
    words = ("--all", folder, "--bitmap", "c8")
    with backups.start(*words, "--rate", "4M", "--progress", "json") as process:
        _until_it_copies(process)
        process.kill()
        process.communicate()
    left = backups.last()
    backups.write("vdb")
    told = backups.backup("--all", folder, "--bitmap", "c9", "--resume", status=1)[1]
    assert "was not begun with these targets and this bitmap" in told
    told = backups.backup("vda", folder / "vda.raw", "--bitmap", "c8", "--resume", status=1)[1]
    assert "session backup is over vda, vdb, not vda" in told
    files, _ = backups.backup(*words, "--resume")
    assert [path.name for path in files] == ["vda.raw", "vdb.raw"]
    assert backups.last()["id"] == left["id"]
    assert first_difference(files[1], moment) is None
    told = backups.backup(*words, "--resume", status=1)[1]
    assert "nothing can be resumed: there is no session backup" in told


@either_way
def test_resume_goes_on_in_what_is_no_file(
    backups: Backups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    moment = backups.keep_moment(tmp_path / "moment")
    image = tmp_path / "target.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    with serving(tmp_path, f"t={image}") as target:
        words = ("vda", target.uri("t"))
        with backups.start(*words, "--rate", "1M", "--progress", "json") as process:
            _until(process, "progress", released=1)  # and it is durable here
            process.kill()
            process.communicate()
        backups.write()
        backups.backup(*words, "--resume")
    assert first_difference(image, moment) is None


def test_somebody_else_s_session_is_left_alone(backups: Backups, tmp_path: Path) -> None:
    for name in ("mine", "fleecenbd backup mine"):
        backups.control.call("PUT", "sessions/backup", owner=name)
        told = backups.backup("vda", tmp_path / "vda.raw", status=1)[1]
        assert "it is not of fleecenbd backup; finish it" in told
        assert backups.last()["state"] == "active"
        backups.control.call("DELETE", "sessions/backup")
    owner = Owner()
    backups.control.call("PUT", "sessions/backup", owner=owner.name)
    assert "another backup is at work" in backups.backup("vda", tmp_path / "v.raw", status=1)[1]
    owner.close()
    # Its process is gone, and somebody goes on reading: a job, say.
    with connected(backups.server.uri("vda@backup")):
        told = backups.backup("vda", tmp_path / "v.raw", status=1)[1]
        assert "another backup is at work" in told
    assert "left unfinished by an earlier run" in backups.backup("vda", tmp_path / "v.raw")[1]
    assert _names(tmp_path) == ["v.raw", "v.raw.backup.json"]


def test_another_session_of_the_name_is_not_copied_for_the_one_that_is_gone(
    backups: Backups, tmp_path: Path
) -> None:
    session = backups.control.call("PUT", "sessions/backup", bitmap="e1", bitmap_mode="new")
    (answer,) = (disk for disk in session["disks"] if disk["disk"] == "vda")
    destination = Pairs([Pair("vda", str(tmp_path / "vda.raw"))]).destination("vda", None)
    gone = "11111111-2222-3333-4444-555555555555"
    work = Work("backup", gone, answer, destination)
    copy = PullDisk(PullAsk({"retries": 0}), BackupView("none", None))
    try:
        with pytest.raises(OSError, match=f"session {session['id']} answers there, and not {gone}"):
            asyncio.run(copy(work))  # type: ignore[arg-type]
        assert backups.last()["disks"][0]["released"] == 0
        assert _names(tmp_path) == []
    finally:
        backups.control.call("DELETE", "sessions/backup")


def test_a_full_target_and_a_broken_session_leave_nothing_and_say_why(
    backups: Backups, tmp_path: Path
) -> None:
    backups.backup("vda", tmp_path / "full.raw", "--bitmap", "d1")
    before = _names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
    try:
        told = backups.backup("vda", tmp_path / "more.raw", status=1)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no file of" in told
    assert _names(tmp_path) == before
    assert backups.last()["result"] == "failed"
    words = ("vda", tmp_path / "more.raw", "--temp-limit", "4k", "--progress", "json")
    with backups.start(*words, "--rate", "1M", "--no-trim") as running:
        _until_it_copies(running)
        backups.write(offset=5 * MIB)
        _, err = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert "temp image" in err
    assert _names(tmp_path) == before
    assert backups.last()["result"] == "failed"


def test_what_was_made_is_told_as_json(backups: Backups, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    words = ("vda", tmp_path / "a.raw", "vdb", tmp_path / "b.raw", "--json", "--progress", "none")
    out, err = backups.call(*words, "--progress-fd", str(writer))
    os.close(writer)
    with os.fdopen(reader) as file:
        percents = [int(line.partition("/")[0]) for line in file]
    assert percents == sorted(set(percents))
    assert (percents[0], percents[-1]) == (0, 100)
    told = json.loads(out)
    assert [disk["kind"] for disk in told["disks"]] == ["full", "full"]
    assert told["disks"][1]["target"] == str(tmp_path / "b.raw")
    assert told["disks"][0]["done"]["durable"] == SIZE
    assert told["result"] == "success"
    assert told["id"] == backups.last()["id"]
    assert "done: " not in err
    for disk, name in (("vda", "a"), ("vdb", "b")):
        assert backups.is_shown_by(tmp_path / f"{name}.raw", disk)
    out, _ = backups.call("vda", tmp_path / "c.raw", "--progress", "json")
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert (events[0], events[-2:]) == ("start", ["done", "backup"])


def test_a_push_to_a_full_file_system_leaves_nothing_and_says_how_much_is_missing(
    backups: Backups, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
    try:
        told = backups.backup("vda", small / "vda.raw", "--push", status=1)[1]
        assert re.search(r"job \S+ has failed: .*No space left.* are missing", told), told
        assert list(small.iterdir()) == []
    finally:
        unmount(small)
    assert backups.last()["result"] == "failed"


def test_a_pushed_disk_is_copied_by_the_server_under_its_own_control(
    backups: Backups, tmp_path: Path
) -> None:
    words = ("vda", tmp_path / "a.raw", "--push", "--rate", "64k", "--progress", "json")
    with backups.start(*words) as process:
        _until_it_copies(process)
        job = backups.control.call("GET", "jobs")["jobs"][-1]
        backups.control.call("POST", f"jobs/{job['id']}/rate", rate=1 << 30)
        process.communicate(timeout=TIMEOUT_S)
    assert job["target"] == f"raw:{tmp_path}/a.raw.backing-up"
    assert (job["rate"], job["finish"]) == (65536, False)
    assert process.returncode == 0
    assert backups.is_shown_by(tmp_path / "a.raw")
    # And one that somebody else has cancelled has failed.
    words = ("vda", tmp_path / "b.raw", "--push", "--rate", "64k", "--progress", "json")
    with backups.start(*words) as process:
        _until_it_copies(process)
        job = backups.control.call("GET", "jobs")["jobs"][-1]
        backups.control.call("POST", f"jobs/{job['id']}/cancel")
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert f"job {job['id']} was cancelled" in err
    assert backups.last()["result"] == "failed"
    assert not list(tmp_path.glob("b.raw*"))


def test_guests_wait_for_no_slow_target_of_a_push(backups: Backups, tmp_path: Path) -> None:
    """Every write of the target takes 200 ms; the guest's take a few milliseconds."""
    sock, listens = tmp_path / "slow", tmp_path / "pid"
    nbdkit = ("nbdkit", "-f", "--exit-with-parent", "-U", sock, "-P", listens)
    nbdkit += ("--filter=delay", "memory")
    with subprocess.Popen([*nbdkit, str(SIZE), "wdelay=200ms"]) as slow:
        try:
            while not listens.exists():
                assert slow.poll() is None
                time.sleep(0.01)
            words = ("vda", f"nbd+unix:///?socket={sock}", "--push", "--progress", "json")
            with backups.start(*words) as process:
                _until(process, "start")
                waits = []
                with connected(backups.server.uri("vda")) as guest:
                    while process.poll() is None:
                        started = time.monotonic()
                        guest.pwrite(os.urandom(4 * KIB), len(waits) * 4 * KIB % SIZE)
                        waits.append(time.monotonic() - started)
                process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0
        finally:
            slow.kill()
    assert len(waits) > 100
    # Not the slowest: a machine that has other work may stall any of them.
    assert sorted(waits)[len(waits) * 9 // 10] < 0.1
