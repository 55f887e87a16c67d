"""``fleecenbd pull``: what is typed, what is shown, what stdin may say."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli import pulling
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.main import run
from fleecenbd.cli.pull_view import PullView, facts, summary
from fleecenbd.client.controls import Controls
from fleecenbd.client.events import Checksum, Done, Failed, Note, Progress, Start
from fleecenbd.client.options import PullOptions
from tests.cli.conftest import Fails

URI = "nbd+unix:///vda@n?socket=/run/f.sock"

PROGRESS = Progress(
    durable=512 << 20,
    read=300 << 20,
    to_copy=1 << 30,
    released=256 << 20,
    rate=100 << 20,
    eta_s=7.25,
    temp_bytes=12 << 20,
    elapsed_s=3.0,
    paused=False,
)
DONE = Done(
    durable=1 << 30,
    released=1 << 30,
    read=600 << 20,
    elapsed_s=6.0,
    checksum=Checksum("blake2b", "7c1f"),
    verified=True,
    temp_peak=12 << 20,
)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("vm.raw", "out.raw"), "'vm.raw' is no NBD URI, as in nbd+unix:///"),
        ((URI, ""), "TARGET is empty"),
        ((URI, "qcow2:"), "TARGET is empty"),
        ((URI, "-"), "standard output can be none (a file that is called - is ./-)"),
        ((URI, "qcow:t"), "not qcow:…; a raw file of that name is raw:qcow:t"),
        ((URI, "http://h/t"), "not http:…"),
        ((URI, "/b/t.qcow2"), "write qcow2:/b/t.qcow2 for that, or raw:/b/t.qcow2 if"),
        ((URI, "/b/t.VMDK"), "whatever its name says; write raw:/b/t.VMDK if"),
        ((URI, "t\udcff"), r"TARGET: 't\udcff' is no UTF-8 text"),
        ((URI, "t", "--read-once", "--no-trim"), "--read-once releases, and --no-trim does not"),
        ((URI, "t", "--compress"), "--compress is for qcow2: targets, and t is none"),
        ((URI, "t", "--bitmap", "a b"), "'a b' cannot be a bitmap's name"),
        ((URI, "t", "--checksum", "crc7"), "--checksum is one of blake2b, blake2s,"),
        ((URI, "t", "--rate", "fast"), "--rate: 'fast' is no size"),
        ((URI, "t", "--rate", "0"), "--rate: 0 bytes a second would never end"),
        ((URI, "t", "--connections", "0"), "--connections: '0' is no number from 1 to 16"),
        ((URI, "t", "--requests", "x"), "--requests: 'x' is no number from 1 to 1024"),
        ((URI, "t", "--retries", "-1"), "--retries: '-1' is no number from 0 to 1024"),
        ((URI, "t", "--progress", "dots"), "--progress is one of auto, bar, json, none"),
        ((URI, "t", "--progress-fd", "two"), "--progress-fd: 'two' is no file descriptor"),
        ((URI, "t", "--progress-fd", "777"), "--progress-fd: 777: Bad file descriptor"),
        ((URI,), "Missing argument 'TARGET'"),
        ((URI, "t", "--resume", "--resume"), "Invalid value for --resume: it is given twice"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    fails: Fails, words: tuple[str, ...], text: str
) -> None:
    line = fails("pull", *words, status=2)
    assert text in line


def test_nothing_to_resume_is_told_before_anything_is_opened(fails: Fails, tmp_path: Path) -> None:
    line = fails("pull", URI, tmp_path / "out.raw", "--resume")
    assert f"out.raw: nothing can be resumed: there is no {tmp_path}/out.raw.journal" in line


def test_a_device_s_journal_has_a_place_in_the_state_directory(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    line = fails("pull", URI, "nbd://backup/vda", "--resume")
    folder = tmp_path / "fleecenbd" / "pulls"
    assert f"there is no {folder}/nbd-backup-vda-" in line
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "there is no here.journal" in fails(
        "pull", URI, "nbd://backup/vda", "--resume", "--journal", "here.journal"
    )


# -- what is shown -------------------------------------------------------------------------------


def test_facts_beside_the_bar_say_how_far_how_fast_how_long_and_what_the_server_holds() -> None:
    assert facts(PROGRESS) == ("512.0 MiB of 1.0 GiB  100.0 MiB/s  7.2 s left  temp 12.0 MiB")
    paused = Progress(0, 0, 1 << 20, 0, 0.0, None, None, 0.0, paused=True)
    assert facts(paused) == "0 B of 1.0 MiB  0 B/s  paused"


def test_the_summary_has_what_a_log_should_keep() -> None:
    assert summary(DONE) == (
        "done: 1.0 GiB durable in 6.0 s, 600.0 MiB read (100.0 MiB/s), 1.0 GiB released, temp "
        "image 12.0 MiB at most when looked at, blake2b 7c1f, read back and found right"
    )
    assert summary(Done(5, 0, 5, 0.0, None, verified=False)) == (
        "done: 5 B durable in 0.0 ms, 5 B read (0 B/s), 0 B released"
    )


def test_json_is_one_line_for_each_event_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    shown = (
        Start(URI, "t", None, 9, 9, 0),
        PROGRESS,
        Note("a retry"),
        DONE,
        Failed("gone", "t.part"),
    )
    with PullView("json") as view:
        for event in shown:
            view(event)
    out, err = capfd.readouterr()
    assert err == ""
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in found] == ["start", "progress", "note", "done", "failed"]
    assert found[0] == {
        "event": "start",
        "source": URI,
        "target": "t",
        "session_id": None,
        "size": 9,
        "to_copy": 9,
        "resumed": 0,
    }
    assert found[1]["eta_s"] == 7.25
    assert found[3]["checksum"] == {"algorithm": "blake2b", "root": "7c1f"}


def test_a_reader_of_json_who_sleeps_misses_progress_and_one_who_went_misses_all() -> None:
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    view = PullView("json", stdout=writer)
    view(PROGRESS)  # would block
    os.close(reader)
    view(DONE)
    view(DONE)
    os.close(writer)


def test_percents_are_written_once_each_and_100_is_for_what_is_complete() -> None:
    reader, writer = os.pipe()
    view = PullView("none", writer)
    for durable in (0, 100, 110, 950, 1000):
        view(Progress(durable, 0, 1000, 0, 0.0, None, None, 0.0, paused=False))
    view(DONE)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"0/100\n10/100\n11/100\n95/100\n99/100\n100/100\n"


def test_a_bar_is_drawn_on_a_terminal_and_wiped_for_the_summary(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with PullView("auto") as view:
        view(PROGRESS)
        view(DONE)
    drawn = screen.getvalue()
    assert "50 %" in drawn
    assert "512.0 MiB of 1.0 GiB  100.0 MiB/s  7.2 s left  temp 12.0 MiB" in drawn
    assert "\x1b[2K" in drawn
    assert "done: 1.0 GiB" in capfd.readouterr().err


def test_where_nobody_looks_there_is_no_bar_but_notes_and_a_summary(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with PullView("auto") as view:
        for event in (PROGRESS, Note("connected anew"), DONE):
            view(event)
    out, err = capfd.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "fleecenbd: connected anew"
    assert second.startswith("fleecenbd: done: ")


def test_none_shows_what_goes_wrong_only(capfd: pytest.CaptureFixture[str]) -> None:
    with PullView("none") as view:
        for event in (PROGRESS, Note("connected anew"), DONE):
            view(event)
    assert capfd.readouterr().err == "fleecenbd: connected anew\n"


# -- what it is told -----------------------------------------------------------------------------


async def _told(*lines: object) -> tuple[Controls, bool]:
    """What controls and a task become of these lines."""
    controls = Controls()
    task = asyncio.create_task(asyncio.Event().wait())
    for line in lines:
        pulling.obey(line if isinstance(line, str) else json.dumps(line), controls, task)
    await asyncio.sleep(0)
    was_cancelled = task.cancelled()
    task.cancel()
    return controls, was_cancelled


async def test_stdin_pauses_resumes_limits_and_cancels() -> None:
    controls, was_cancelled = await _told({"command": "pause"})
    assert controls.is_paused
    assert not was_cancelled
    controls, _ = await _told({"command": "pause"}, {"command": "resume"})
    assert not controls.is_paused
    controls, _ = await _told({"command": "rate", "bytes_per_s": 4096})
    assert controls.rate.bytes_per_s == 4096
    controls, _ = await _told(
        {"command": "rate", "bytes_per_s": 4096}, {"command": "rate", "bytes_per_s": None}
    )
    assert controls.rate.bytes_per_s is None
    _, was_cancelled = await _told({"command": "cancel"})
    assert was_cancelled


@pytest.mark.parametrize(
    "line",
    [
        "",
        "pause",
        "[]",
        '{"command": "dance"}',
        '{"command": "rate"}',
        '{"command": "rate", "bytes_per_s": -1}',
    ],
)
async def test_a_line_that_is_no_command_is_told_and_changes_nothing(
    line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    controls, was_cancelled = await _told(line)
    assert not was_cancelled
    assert not controls.is_paused
    assert controls.rate.bytes_per_s is None
    assert "a line on stdin is no command" in capfd.readouterr().err


async def test_the_end_of_stdin_cancels_and_keeps_what_is_durable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"command": "pause"}\n'))
    timers: list[object] = []
    monkeypatch.setattr(signal, "setitimer", lambda *timer: timers.append(timer))
    controls = Controls()

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        pulling.listen(controls, task)
        await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(work())
    assert controls.is_paused
    assert controls.keeps
    assert timers == [(signal.ITIMER_REAL, pulling.LEFT_ALONE_S)], "a pull that hangs ends, too"


def test_a_cancel_keeps_as_was_asked_for(monkeypatch: pytest.MonkeyPatch, own_logs: None) -> None:
    asked: list[PullOptions] = []

    async def never(options: PullOptions, told: Any, **_: Any) -> None:
        asked.append(options)

    monkeypatch.setattr(pulling, "pull", never)
    for words, keep in (((), True), (("--no-keep",), False)):
        assert run(["pull", URI, "/t", *words]) == 0
        assert asked.pop().keep == keep


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_a_signal_cancels_and_the_exit_status_tells_which(number: int, status: int) -> None:
    async def work() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    with pytest.raises(pulling.Interrupted) as caught:
        pulling.run_until_signal(work)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "; t.part keeps what is durable: --resume goes on with it while the session lives"),
        ({"read_once": True}, "; t.part keeps what is durable; what was read once and is not"),
    ],
)
def test_a_failure_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], text: str
) -> None:
    async def fail(_options: PullOptions, told: Any, **_: Any) -> None:
        told(Failed("gone", "t.part"))
        raise OSError(5, "gone", "vda@n")

    monkeypatch.setattr(pulling, "pull", fail)
    with pytest.raises(CommandError, match="vda@n: gone") as caught:
        pulling.run_pull(PullOptions(URI, "t", **options), PullView("none"))
    assert text in str(caught.value)
