"""A server that is stopped, killed and started again under its clients.

Two kinds, with the same calls. OwnSocket makes its socket anew at each start: while it is away,
whoever connects is refused. HeldSocket has its socket from systemd-socket-activate, and a
supervisor keeps it: while the server is away, whoever connects waits.
"""

import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tests.serving import FLEECENBD, START_TIMEOUT_S, STOP_TIMEOUT_S

SUPERVISOR = Path(__file__).parent / "supervisor.sh"

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class _Notices:
    """The socket where servers say READY=1; the kernel adds who says it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(str(path))

    def wait_ready(self, ended: int | IO[bytes], log: Path) -> int:
        """The pid of the server that is ready now. `ended` becomes readable at its end."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            left = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self.socket, ended], [], [], left)
            if self.socket in readable:
                message, ancillary, _, _ = self.socket.recvmsg(4096, 256)
                if b"READY=1" in message.splitlines():
                    pid: int = _CREDENTIALS.unpack(ancillary[0][2])[0]
                    return pid
            else:
                word = "ended before it was" if readable else "did not get"
                raise AssertionError(f"the server {word} ready:\n{log.read_text()}")


class OwnSocket:
    """`fleecenbd serve ARGUMENTS -U SOCKET`, again and again."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.unix = folder / "f.sock"
        self.log = folder / "server.log"
        self._notices = _Notices(folder / "notify")
        self._command = [str(FLEECENBD), "serve", *map(str, arguments), "-U", str(self.unix)]
        self._command += ["--state-dir", str(folder / "state")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the server that runs now."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("ab") as log_file:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env={**os.environ, "NOTIFY_SOCKET": str(self._notices.path)},
            )
        end_of_process = os.pidfd_open(self._process.pid)
        try:
            self._notices.wait_ready(end_of_process, self.log)
        finally:
            os.close(end_of_process)

    def end_by(self, number: signal.Signals) -> int:
        """Send it a signal that ends it, and wait for that; its exit status as sh has it."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)  # it may have been stopped
        status = self._process.wait(STOP_TIMEOUT_S)
        return 128 - status if status < 0 else status

    def close(self) -> None:
        """End it by force, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._notices.socket.close()


class HeldSocket:
    """`fleecenbd serve ARGUMENTS` on a socket that outlives it, again and again."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.unix = folder / "f.sock"
        self.log = folder / "server.log"
        self._notices = _Notices(folder / "notify")
        self.pid = 0
        self._supervisor = subprocess.Popen(
            [
                *("systemd-socket-activate", "-l", str(self.unix)),
                *("-E", f"NOTIFY_SOCKET={self._notices.path}"),
                *("sh", str(SUPERVISOR), str(self.log)),
                *(str(FLEECENBD), "serve", *map(str, arguments)),
                *("--state-dir", str(folder / "state")),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._supervisor.stderr is not None
        line = self._supervisor.stderr.readline()
        assert line.startswith(b"Listening on"), line.decode()
        # Nothing is run before a first client comes: let it be one that goes at once.
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.connect(str(self.unix))

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.write(b"start\n")
        self._supervisor.stdin.flush()
        self.pid = self._notices.wait_ready(self._supervisor.stdout, self.log)

    def end_by(self, number: signal.Signals) -> int:
        """Send it a signal that ends it, and wait for that; its exit status as sh has it."""
        assert self._supervisor.stdout is not None
        os.kill(self.pid, number)
        with suppress(ProcessLookupError):  # its parent is quick
            os.kill(self.pid, signal.SIGCONT)  # it may have been stopped
        readable, _, _ = select.select([self._supervisor.stdout], [], [], STOP_TIMEOUT_S)
        assert readable, f"the server did not stop:\n{self.log.read_text()}"
        word, status = self._supervisor.stdout.readline().split()
        assert word == b"ended"
        self.pid = 0
        return int(status)

    def close(self) -> None:
        """End it by force, if it still runs, and give up the socket."""
        if self.pid:
            self.end_by(signal.SIGKILL)
        self._supervisor.kill()
        self._supervisor.wait()
        self._notices.socket.close()


@contextmanager
def restarting(
    kind: type[OwnSocket] | type[HeldSocket], folder: Path, *arguments: str | Path
) -> Iterator[OwnSocket | HeldSocket]:
    """A server of this kind, started; stopped at the end, which must go well."""
    server = kind(folder, *arguments)
    try:
        server.start()
        yield server
        status = server.end_by(signal.SIGTERM)
        messages = server.log.read_text()
        assert status == 0, f"the server exited with {status}:\n{messages}"
        assert "Traceback" not in messages, messages
    except BaseException:
        print(f"server's log:\n{server.log.read_text() if server.log.exists() else ''}")
        raise
    finally:
        server.close()
