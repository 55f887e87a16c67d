"""The command line in this process (fast: everything up to the server), and as a process."""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecenbd.cli.main import run
from tests.serving import FLEECENBD, START_TIMEOUT_S

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_sockets_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def own_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What logs.set_up changes in the interpreter is put back."""
    root, logger = logging.getLogger(), logging.getLogger("fleecenbd")
    before = root.handlers, root.level, logger.level, logging.raiseExceptions
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    logging.captureWarnings(False)
    root.handlers, logging.raiseExceptions = before[0], before[3]
    root.setLevel(before[1])
    logger.setLevel(before[2])


@pytest.fixture
def fails(own_logs: None, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Call the command, which fails: its one line on standard error, and nothing else."""

    def call(*arguments: str | Path, status: int = 1) -> str:
        assert run([str(argument) for argument in arguments]) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert err.endswith("\n")
        (line,) = err.splitlines()
        return line

    return call


@contextmanager
def started(
    directory: Path,
    *command: str | Path,
    environment: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that serves: from READY=1 on; killed at the end if it is still there."""
    notify = directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(notify))
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if stderr is None else stderr,
            text=True,
            pass_fds=pass_fds,
            preexec_fn=_hear_hangups,
            env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": str(notify)},
        )
        try:
            _wait_until_ready(process, ready)
            yield process
        finally:
            process.kill()
            process.wait()
            notify.unlink()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _hear_hangups() -> None:
    """Under nohup the tests ignore SIGHUP, and so would what they start: by design."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _wait_until_ready(process: subprocess.Popen[str], ready: socket.socket) -> None:
    end = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ready, end], [], [], START_TIMEOUT_S)
    finally:
        os.close(end)
    if ready not in readable:
        raise AssertionError(f"it did not get ready: {process.stderr and process.stderr.read()}")
    assert b"READY=1" in ready.recv(4096).splitlines()


SERVE = (FLEECENBD, "serve")
