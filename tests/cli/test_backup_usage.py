"""``fleecenbd backup``: what is typed, what contradicts itself, and whose session it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fleecenbd.cli import backup_owner, backup_run
from fleecenbd.cli.backup_copy import PullAsk, PullDisk
from fleecenbd.cli.backup_nights import Nights
from fleecenbd.cli.backup_owner import Owner, is_alive, is_backup
from fleecenbd.cli.backup_sessions import to_its_end
from fleecenbd.cli.backup_view import BackupView
from fleecenbd.cli.backup_work import Ask, Outcome
from fleecenbd.cli.errors import CommandError
from tests.cli.conftest import Fails


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("vda",), "'vda' is one too many: each DISK has a TARGET after it"),
        (("vda", "a.raw", "vda", "b.raw"), "a disk is given twice"),
        (("vda", "a.raw", "vdb", "./a.raw"), "two disks go to ./a.raw"),
        (("v d a", "a.raw"), "'v d a' cannot be a disk's name"),
        (("vda", ""), "TARGET is empty"),
        (("vda", "t\udcff"), r"TARGET: 't\udcff' is no UTF-8 text"),
        (("vda", "qcow2:"), "TARGET is empty"),
        (("vda", "vmdk:t"), "not vmdk:…; a raw file of that name is raw:vmdk:t"),
        (("vda", "t.qcow2"), "write qcow2:t.qcow2 for that, or raw:t.qcow2"),
        (("vda", "/tmp"), "/tmp is a folder; name a file in it, or give --all"),
        (("--all", "a", "b"), "with --all or --disk there is one FOLDER, not 'a b'"),
        (("--all", "--disk", "vda", "a"), "--all is all disks, and --disk some of them"),
        (("--disk", "vda", "--disk", "vda", "a"), "a disk is given twice"),
        (("--all", "a", "--force"), "--force is for TARGETs"),
        (("--all", "a", "--incremental", "c", "--onto", "b"), "--onto is for one TARGET"),
        (("--all", "a", "--incremental", "c", "--in-place"), "--in-place is for TARGETs"),
        (("vda", "a", "--bitmap", "c", "--incremental", "c"), "give one of them"),
        (("vda", "a", "--or-full"), "--or-full goes with --incremental NAME"),
        (("vda", "a", "--onto", "b"), "--onto goes with --incremental NAME"),
        (("vda", "a", "--in-place"), "--in-place goes with --incremental NAME"),
        (("vda", "a", "--bitmap", "a b"), "'a b' cannot be a bitmap's name"),
        (("vda", "a", "--incremental", "c"), "write qcow2:a, or --in-place"),
        (("vda", "qcow2:a", "--incremental", "c", "--in-place"), "--in-place is for raw files"),
        (("vda", "a", "--incremental", "c", "--in-place", "--onto", "b"), "leave --onto out"),
        (
            ("vda", "a", "--incremental", "c", "--in-place", "--checksum", "sha256"),
            "--checksum is of what is copied",
        ),
        (
            ("vda", "qcow2:a", "vdb", "qcow2:b", "--incremental", "c", "--onto", "x"),
            "--onto is for one disk",
        ),
        (("vda", "nbd://h/x", "--bitmap", "c"), "nbd://h/x is no file, and only files have a"),
        (("vda", "/dev/null", "--bitmap", "c"), "/dev/null is no file"),
        (("vda", "a", "--compress"), "--compress is for qcow2: targets, and a is none"),
        (("vda", "a", "--read-once", "--no-trim"), "--read-once releases"),
        (("vda", "a", "--session", "a/b"), "'a/b' cannot be a session's name"),
        (("vda", "a", "--rate", "0"), "--rate: 0 bytes a second would never end"),
        (("vda", "a", "--ttl", "0"), "--ttl: '0' is no time"),
        (("vda", "a", "--cbw-timeout", "x"), "--cbw-timeout: 'x' is no time"),
        (("vda", "a", "--progress", "dots"), "--progress is one of auto, bar, json, none"),
        (("vda", "a", "--progress-fd", "two"), "--progress-fd: 'two' is no file descriptor"),
        ((), "Missing argument"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert text in fails("backup", *words, status=2)
    assert not [path for path in tmp_path.iterdir() if path.name != "state"]


def test_no_server_and_no_folder_are_told(fails: Fails, tmp_path: Path) -> None:
    control = ("--control", tmp_path / "none.sock")
    assert "no server is there" in fails("backup", "vda", tmp_path / "a.raw", *control)
    told = fails("backup", "vda", tmp_path / "none" / "a.raw", *control)
    assert "a.raw: its folder does not exist; make it" in told
    assert "none: it is no folder (mkdir makes one)" in fails(
        "backup", "--all", tmp_path / "none", *control
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_pending_is_rolled_forward_without_a_server(
    fails: Fails, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = fails("backup", "--roll-forward", tmp_path / "a.raw")
    assert "a.raw: there is no such file, and nothing pending for it" in told
    (tmp_path / "a.raw").touch()
    backup_run.roll_forward([str(tmp_path / "a.raw")])
    assert "a.raw: nothing is pending" in capfd.readouterr().err
    (tmp_path / "a.raw.roll-forward").write_text("spoilt")
    told = fails("backup", "--roll-forward", tmp_path / "a.raw")
    assert "a.raw.roll-forward: what is to be put into the full cannot be told" in told


def test_a_backup_whose_session_cannot_be_finished_is_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Outcome("backup", "id-1", 1.0, None, files=[tmp_path / "a.raw"], error="it is gone")
    monkeypatch.setattr(backup_run, "run_until_signal", lambda _work: made)
    view = BackupView("auto", None)
    pulls = PullDisk(PullAsk(), view)
    with pytest.raises(CommandError) as caught:
        backup_run.run(
            None, Ask("backup", {}), Nights(tmp_path, None), lambda _: pulls, view, as_json=False
        )
    assert caught.value.status == 1
    text = str(caught.value)
    assert text.startswith("the backup is whole, but session backup could not be finished: it is")
    assert "the next increment builds on the backup before this one" in text
    out, _ = capfd.readouterr()
    assert out == f"{tmp_path}/a.raw\n"


def test_a_run_is_alive_as_long_as_it_holds_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    assert is_backup(owner.name)
    assert is_alive(owner.name)
    with pytest.raises(OSError, match="in use"):
        Owner(owner.name)
    owner.close()
    assert not is_alive(owner.name)
    again = Owner(owner.name)
    assert is_alive(owner.name)
    again.close()
    for name in (None, "", "cron", backup_owner.PREFIX, f"{backup_owner.PREFIX}mine"):
        assert not is_backup(name)


async def test_a_call_that_is_interrupted_comes_to_its_end_and_is_undone() -> None:
    going = asyncio.Event()
    undone: list[int] = []

    async def call() -> int:
        await going.wait()
        return 7

    async def undo(result: int) -> None:
        undone.append(result)

    task = asyncio.create_task(to_its_end(call(), undo))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    going.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == [7]
    going.clear()
    task = asyncio.create_task(to_its_end(call()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    going.set()
    assert await task == 7, "without undoing it counts"
