"""``fleecenbd events``, as a process beside a server: what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from fleecenbd.cli import control_client
from fleecenbd.cli.main import run
from fleecenbd.server.control.application import EVENT_LISTENERS_MAX
from tests.cli.conftest import Fails, started
from tests.controlling import Control
from tests.disks import KIB, MIB
from tests.serving import FLEECENBD, Serving, connected, serving

TIMEOUT_S = 60.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk without a hole: every first write to it copies."""
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(MIB))
    return path


class Listening:
    """The command, from the moment on at which it misses nothing any more."""

    def __init__(self, control: str, words: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [str(FLEECENBD), "events", "--control", control, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        listens = f"fleecenbd: listening to the server at {control}"
        assert self._next(self.process.stderr) == listens

    def line(self) -> str:
        """The next line, without its end."""
        assert self.process.stdout is not None
        return self._next(self.process.stdout)

    def _next(self, stream: IO[str]) -> str:
        # Ends the wait, and what it waits for: there is a line, or the end, after that.
        timer = threading.Timer(TIMEOUT_S, self.process.kill)
        timer.start()
        try:
            return stream.readline().removesuffix("\n")
        finally:
            timer.cancel()

    def ends(self) -> tuple[int, str, str]:
        """Its status, and what it has printed since: output, errors."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err


@contextmanager
def listening(server: Serving, *words: str) -> Iterator[Listening]:
    listener = Listening(f"{server.unix}.control", words)
    try:
        yield listener
    finally:
        listener.process.kill()
        listener.process.communicate()


def test_what_happens_to_a_session_and_its_temp_image_is_told_as_it_happens(
    tmp_path: Path, image: Path
) -> None:
    with serving(tmp_path, image) as server, listening(server) as listener:
        control = Control(f"{server.unix}.control")
        begun = control.call("PUT", "sessions/n", temp_limit=512 * KIB)
        assert listener.line().split(maxsplit=1)[1] == f"session-begun    n over vda, {begun['id']}"
        with connected(server.uri("vda")) as guest:
            assert listener.line().endswith(f" client-came      vda: pid {os.getpid()}")
            for number in range(7):
                guest.pwrite(b"x" * 64 * KIB, number * 64 * KIB)
            assert listener.line().endswith(
                " temp-low         vda@n: 448.0 KiB of 512.0 KiB in use"
            )
            for number in range(7, 9):
                guest.pwrite(b"x" * 64 * KIB, number * 64 * KIB)
            told = {line.split()[1]: line for line in (listener.line(), listener.line())}
            assert "vda@n: " in told["session-broken"]
            assert told["temp-full"].endswith(" of 512.0 KiB in use")
        assert listener.line().endswith(f" client-went      vda: pid {os.getpid()}")
        control.call("DELETE", "sessions/n?result=failed")
        assert listener.line().endswith(f" session-finished n: failed, {begun['id']}")
        control.close()
        server.stop()
        stopped = f"fleecenbd: the server at {server.unix}.control has stopped\n"
        assert listener.ends() == (0, "", stopped)


def test_only_what_was_asked_for_is_told_and_only_so_often(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "vdb.raw"
    other.write_bytes(bytes(MIB))
    with (
        serving(tmp_path, image, other) as server,
        listening(server, "--session", "n", "--json") as of_session,
        listening(server, "--disk", "vdb", "--count", "4") as of_disk,
        listening(server, "--kind", "session-begun", "--kind", "client-went", "--json") as kinds,
        listening(server, "--kind", "session-begun", "--count", "5") as too_many,
        listening(server, "--disk", "vdb", "--kind", "session-finished", "--count", "1") as ended,
    ):
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/other", disks=["vda"])
        control.call("PUT", "sessions/n", disks=["vdb"])
        for export in ("vda", "vdb", "vda@other", "vdb@n", "vdb@n+once"):
            with connected(server.uri(export)):
                pass
        control.call("DELETE", "sessions/other?result=success")
        control.call("DELETE", "sessions/n?result=success")
        control.close()
        server.stop()
        status, out, _ = of_session.ends()
        found = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert [event["event"] for event in found] == [
            "session-begun",
            *("client-came", "client-went") * 2,
            "session-finished",
        ]
        assert [event.get("export") for event in found[1:5]] == ["vdb@n"] * 2 + ["vdb@n+once"] * 2
        assert found[0]["disks"] == ["vdb"]
        status, out, err = of_disk.ends()
        assert (status, err) == (0, "")
        assert [line.split()[1:3] for line in out.splitlines()] == [
            ["session-begun", "n"],
            ["client-came", "vdb:"],
            ["client-went", "vdb:"],
            ["client-came", "vdb@n:"],
        ]
        names = [json.loads(line)["event"] for line in kinds.ends()[1].splitlines()]
        assert names == ["session-begun"] * 2 + ["client-went"] * 5
        status, out, err = ended.ends()
        assert (status, out.split()[1:3], err) == (0, ["session-finished", "n:"], "")
        status, out, err = too_many.ends()
        assert (status, len(out.splitlines())) == (1, 2)
        assert err.endswith(" has stopped, after 2 of 5 events\n")


def test_a_server_that_is_killed_is_no_server_that_stopped(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, image) as server, listening(server) as listener:
        server.status = -signal.SIGKILL
        server.kill()
        status, out, err = listener.ends()
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert "went away in the middle of its answer" in line


def test_a_server_that_says_nothing_for_long_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control_client, "SILENCE_S", 8.0)
    (tmp_path / "vm.raw").write_bytes(bytes(MIB))
    socket = tmp_path / "f.sock"
    words = ("serve", tmp_path / "vm.raw", "-U", socket, "--state-dir", tmp_path / "state")
    with started(tmp_path, FLEECENBD, *words):
        # It imports what answers when its first client comes, which may take long.
        assert run(["status", "--control", f"{socket}.control"]) == 0
        capfd.readouterr()
        assert run(["events", "--control", f"{socket}.control"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    listens, told = err.splitlines()
    assert listens == f"fleecenbd: listening to the server at {socket}.control"
    assert "no answer from the server" in told


@pytest.mark.parametrize(("words", "status"), [((), 0), (("--count", "3"), 130)])
def test_ctrl_c_ends_it(tmp_path: Path, image: Path, words: Sequence[str], status: int) -> None:
    with serving(tmp_path, image) as server, listening(server, *words) as listener:
        listener.process.send_signal(signal.SIGINT)
        assert listener.ends() == (status, "", "")


def test_nobody_reading_it_ends_it(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, image) as server, listening(server) as listener:
        assert listener.process.stdout is not None
        listener.process.stdout.close()
        with connected(server.uri("vda")):
            pass
        assert listener.process.wait(TIMEOUT_S) == 1
        assert listener.process.stderr is not None
        assert listener.process.stderr.read() == ""


def test_one_listener_too_many_is_told(tmp_path: Path, image: Path, fails: Fails) -> None:
    with serving(tmp_path, image) as server:
        others = [Control(f"{server.unix}.control") for _ in range(EVENT_LISTENERS_MAX)]
        for other in others:
            other.request("GET", "/v1/events")
            assert other.getresponse().status == 200
        told = fails("events", "--control", f"{server.unix}.control")
        assert told == f"fleecenbd: {EVENT_LISTENERS_MAX} clients listen to events already"
        for other in others:
            other.close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--kind", "temp-lo"), "--kind temp-lo: there is no such event; --help lists them"),
        (("--session", "a@b"), "'a@b' cannot be a session's name"),
        (("--disk", "a/b"), "'a/b' cannot be a disk's name"),
        (("--count", "0"), "--count"),
        (("--count", "many"), "--count"),
        (("nightly",), "nightly"),
    ],
)
def test_what_cannot_be_asked_for_is_wrong_usage(
    fails: Fails, words: Sequence[str], told: str
) -> None:
    assert told in fails("events", *words, status=2)
