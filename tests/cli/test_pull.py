"""``fleecenbd pull`` as a process, from a server, while its guest may write."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controlling import Control
from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.serving import Serving, connected, serving, try_run

SIZE = 12 * MIB + 12288
TIMEOUT_S = 60.0
PULL = (sys.executable, "-m", "tests.durability.pulled", "pull")


class Served:
    """One server for all tests; each begins a session of its own."""

    def __init__(self, server: Serving, image: Path) -> None:
        self.server = server
        self.image = image
        self.control = Control(f"{server.unix}.control")
        self.sessions = 0

    def begin(self, **options: Any) -> str:
        """The URI of a new session's export."""
        self.sessions += 1
        self.name = f"s{self.sessions}"
        self.control.call("PUT", f"sessions/{self.name}", **options)
        return self.server.uri(f"vda@{self.name}")

    def show(self) -> dict[str, Any]:
        """The last session's part of the disk."""
        (disk,) = self.control.call("GET", f"sessions/{self.name}")["disks"]
        return dict(disk)

    def write(self, offset: int, data: bytes) -> None:
        """As the guest."""
        with connected(self.server.uri("vda")) as guest:
            guest.pwrite(data, offset)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pull")
    image = make_disk(folder / "vda.raw", SIZE, islands=60)
    with serving(folder, image) as server:
        yield Served(server, image)


@pytest.fixture
def target(tmp_path: Path, served: Served) -> Iterator[Path]:
    """Where to; the session is finished afterwards, since temp images add up."""
    yield tmp_path / "out.raw"
    served.control.request("DELETE", f"/v1/sessions/{served.name}?result=failed")
    served.control.getresponse().read()


def pull(*words: str | Path, status: int = 0) -> str:
    """Its standard error; what a library has written there counts as a fault."""
    result = try_run(*PULL, *words)
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert all(line.startswith("fleecenbd: ") for line in result.stderr.splitlines())
    return result.stderr


class Pulling:
    """A pull in the background that tells JSON, and listens."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*PULL, "--progress", "json", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first event of the kind whose fields are at least these."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind and all(event[k] >= v for k, v in fields.items()):
                return event
        raise AssertionError(f"no such event: {self.process.communicate()[1]}")

    def tell(self, **command: Any) -> None:
        """A line on its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err


def test_a_session_is_pulled_released_and_told_of_in_one_line(
    served: Served, target: Path, tmp_path: Path
) -> None:
    snapshot = copy_disk(served.image, tmp_path / "snapshot.raw")
    uri = served.begin()
    served.write(0, b"new" * 4096)
    told = pull(uri, target, "--checksum", "sha256", "--verify")
    assert first_difference(target, snapshot) is None
    assert target.stat().st_blocks * 512 < SIZE // 2, "it is sparse"
    assert target.stat().st_mode & 0o777 == 0o600
    note, done = told.splitlines()
    assert note.endswith("is read back")
    assert done.startswith("fleecenbd: done: 12.0 MiB durable in ")
    assert "12.0 MiB released, temp image 12.0 KiB at most when looked at, sha256 " in done
    assert done.endswith(", read back and found right")
    assert served.show()["released"] == SIZE
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.raw",
        "out.raw.sha256",
        "snapshot.raw",
    }


def test_no_trim_releases_nothing(served: Served, target: Path) -> None:
    uri = served.begin()
    pull(uri, target, "--no-trim")
    assert served.show()["released"] == 0
    assert first_difference(target, served.image) is None


def test_a_guest_s_own_disk_is_copied_and_never_discarded(
    served: Served, target: Path, tmp_path: Path
) -> None:
    served.begin()
    before = copy_disk(served.image, tmp_path / "before.raw")
    told = pull(served.server.uri("vda"), target)
    assert "is no fleecing export: it is copied as it is, nothing is released" in told
    assert first_difference(target, before) is None
    assert first_difference(served.image, before) is None


def test_ctrl_c_leaves_what_resume_goes_on_with(served: Served, target: Path) -> None:
    uri = served.begin()
    pulling = Pulling(uri, target, "--rate", "1M")
    pulling.until("progress", read=1)
    pulling.process.send_signal(signal.SIGINT)
    failed = pulling.until("failed")
    assert failed == {"event": "failed", "error": "interrupted", "kept": f"{target}.part"}
    status, err = pulling.end()
    assert status == 130
    assert err == (
        f"fleecenbd: interrupted; {target}.part keeps what is durable: --resume goes on with it "
        "while the session lives\n"
    )
    assert not target.exists()
    told = pull(uri, target, status=1)
    assert f"a pull to it has not ended ({target}.journal): go on with --resume" in told
    resumed = Pulling(uri, target, "--resume")
    assert resumed.until("start")["resumed"] > 0
    assert resumed.end()[0] == 0
    assert first_difference(target, served.image) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_a_window_that_is_closed_stop_it_as_well(
    served: Served, target: Path, number: signal.Signals
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # nohup may run the tests: it stays ignored
    try:
        pulling = Pulling(served.begin(), target, "--rate", "1M")
    finally:
        signal.signal(number, before)
    pulling.until("start")
    pulling.process.send_signal(number)
    status, err = pulling.end()
    assert status == 1
    assert err.startswith("fleecenbd: interrupted")


def test_another_session_is_no_resume(served: Served, target: Path) -> None:
    pulling = Pulling(served.begin(), target, "--rate", "1M")
    pulling.until("progress", read=1)
    pulling.process.send_signal(signal.SIGINT)
    assert pulling.end()[0] == 130
    first = served.name
    told = pull(served.begin(), target, "--resume", status=1)
    assert "what is there is of session " in told
    assert "another moment's image" in told
    served.control.request("DELETE", f"/v1/sessions/{first}?result=failed")
    served.control.getresponse().read()


def test_stdin_pauses_it_and_lets_it_go_on(served: Served, target: Path) -> None:
    pulling = Pulling(served.begin(), target, "--rate", "1M", "--commands")
    pulling.until("progress", read=1)
    pulling.tell(command="pause")
    pulling.until("progress", paused=True)
    pulling.tell(command="rate", bytes_per_s=None)
    pulling.tell(command="resume")
    done = pulling.until("done")
    assert done["durable"] == SIZE
    assert pulling.end()[0] == 0


@pytest.mark.parametrize("way", ["cancel", "end"])
def test_stdin_cancels_it_by_a_word_and_by_its_end(served: Served, target: Path, way: str) -> None:
    pulling = Pulling(served.begin(), target, "--rate", "1M", "--commands")
    pulling.until("start")
    if way == "cancel":
        pulling.tell(command="cancel")
    else:
        assert pulling.process.stdin is not None
        pulling.process.stdin.close()
        pulling.process.stdin = None
    pulling.until("failed")
    assert pulling.end()[0] == 130


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_signal_is_no_cancel_and_keeps_what_is_durable(
    served: Served, target: Path, cancelled: bool
) -> None:
    """systemd sends it to all of a unit, a server and its jobs, where the session lasts."""
    pulling = Pulling(served.begin(), target, "--rate", "4M", "--commands", "--no-keep")
    pulling.until("progress", durable=1, released=1)
    if cancelled:
        pulling.tell(command="cancel")
        pulling.until("failed")
    pulling.process.send_signal(signal.SIGTERM)
    if not cancelled:
        assert pulling.until("failed")["kept"] == f"{target}.part"
    pulling.end()
    assert Path(f"{target}.part").exists() is not cancelled


def _ignores(pid: int, number: signal.Signals) -> bool:
    (line,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(line, 16) >> number - 1 & 1)


@pytest.mark.parametrize("way", ["terminal", "pipe"])
def test_nobody_has_to_look_at_it(served: Served, target: Path, way: str) -> None:
    """As after ``nohup`` or ``disown``, when the window is closed."""
    seen, shown = os.openpty() if way == "terminal" else os.pipe()
    words = ("--rate", "8M", "--progress", "bar", served.begin(), target)
    command = ("nohup", *PULL, *words)
    with subprocess.Popen(command, stderr=shown, stdin=subprocess.DEVNULL) as process:
        os.close(shown)
        assert os.read(seen, 1)
        while not _ignores(process.pid, signal.SIGHUP):  # nohup speaks before it is deaf to it
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        os.close(seen)
        assert process.wait(TIMEOUT_S) == 0
    assert first_difference(target, served.image) is None


def test_percents_go_to_a_descriptor(served: Served, target: Path) -> None:
    reader, writer = os.pipe()
    try:
        process = subprocess.run(
            [*PULL, served.begin(), target, "--progress-fd", str(writer)],
            pass_fds=(writer,),
            stderr=subprocess.PIPE,
            check=True,
        )
    finally:
        os.close(writer)
    with os.fdopen(reader) as file:
        lines = file.read().splitlines()
    assert lines[0] == "0/100"
    assert lines[-1] == "100/100"
    assert b"done: " in process.stderr


def test_a_bitmap_s_changes_are_pulled_alone(served: Served, target: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.raw"
    pull(served.begin(bitmap="chain", bitmap_mode="use-or-new"), full)
    served.control.request("DELETE", f"/v1/sessions/{served.name}")
    served.control.getresponse().read()
    served.write(5 * MIB + 4096, b"changed!" * 512)
    uri = served.begin(bitmap="chain", bitmap_mode="use")
    told = pull(uri, target, status=1)
    assert "may not be read: either the session reads only what changed (give --bitmap" in told
    pulling = Pulling(uri, target, "--bitmap", "chain")
    assert pulling.until("start")["to_copy"] == 65536
    assert pulling.end()[0] == 0
    found = target.read_bytes()
    start = 5 * MIB
    assert found[start + 4096 : start + 8192] == b"changed!" * 512
    assert not any(found[: 4 * MIB])


def test_a_session_that_was_finished_is_told_as_the_server_tells_it(
    served: Served, target: Path
) -> None:
    uri = served.begin()
    served.control.request("DELETE", f"/v1/sessions/{served.name}")
    served.control.getresponse().read()
    told = pull(uri, target, status=1)
    assert f"session {served.name} is finished (success)" in told
    assert os.listdir(target.parent) == []


def test_a_session_that_breaks_ends_it_with_the_server_s_reason(
    served: Served, target: Path
) -> None:
    pulling = Pulling(served.begin(temp_limit=65536), target, "--rate", "1M", "--commands")
    pulling.until("start")
    pulling.tell(command="pause")
    pulling.until("progress", paused=True)
    with connected(served.server.uri("vda")) as guest:
        for offset in range(SIZE - 12288 - 4096, 0, -4096):
            guest.pwrite(b"x" * 4096, offset)
            if served.show()["broken"]:
                break
    assert served.show()["broken"]
    pulling.tell(command="resume")
    failed = pulling.until("failed")
    assert "temp" in failed["error"]
    assert pulling.end()[0] == 1
