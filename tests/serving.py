"""A `fleecenbd serve` of its own for a test: started, known to be ready, ended and looked at.

Readiness is told by the server (sd_notify), so nothing here waits by sleeping: the wait ends with
the datagram or with the end of the process, whichever comes first.
"""

import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import nbd

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 120.0

# Beside the interpreter that runs the tests, whatever PATH says.
FLEECENBD = Path(sys.executable).parent / "fleecenbd"

# Clients that are Python scripts (nbdsh) take the first python3 on their path, which must be one
# that has libnbd's module; mkfs and its like live in sbin.
CLIENTS_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


class Serving:
    """A running server with a Unix socket, and a TCP port if asked for."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        unix: Path,
        port: int | None,
        log: Path,
        *,
        is_tcp_only: bool = False,
    ) -> None:
        self.process = process
        self.unix = unix
        self.port = port
        self.log = log
        self.is_tcp_only = is_tcp_only
        self.status = 0
        """What it must exit with."""

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self.process.pid

    def uri(self, export: str) -> str:
        """The NBD URI of an export on the Unix socket, if there is one."""
        if self.is_tcp_only:
            return self.tcp_uri(export)
        return f"nbd+unix:///{quote(export, safe='@+')}?socket={self.unix}"

    def tcp_uri(self, export: str) -> str:
        """The NBD URI of an export on the TCP port."""
        assert self.port is not None, "this server was started without a TCP port"
        return f"nbd://127.0.0.1:{self.port}/{quote(export, safe='@+')}"

    def messages(self) -> str:
        """All that the server has written to its standard error so far."""
        return self.log.read_text()

    def descriptors(self) -> Iterator[tuple[Path, str]]:
        """The server's open file descriptors, and what each refers to (needs procfs).

        What is closed since the folder was listed is left out; a reader of an entry has to be
        ready for the same.
        """
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                yield entry, os.readlink(entry)

    def open_files(self) -> list[str]:
        """What the server's file descriptors refer to, sorted (needs procfs)."""
        return sorted(name for _, name in self.descriptors())

    def open_flags(self, path: Path) -> set[int]:
        """The flags (open(2)) with which the server has ``path`` open (needs procfs)."""
        found = set()
        for entry, name in self.descriptors():
            if name == str(path):
                info = Path(f"/proc/{self.pid}/fdinfo/{entry.name}")
                with suppress(FileNotFoundError):
                    found |= {
                        int(flags, 8)
                        for flags in re.findall(r"^flags:\s*(\d+)$", info.read_text(), re.M)
                    }
        return found

    def temp_bytes(self) -> int:
        """The space that open temp images take: files of their own below the state directory, or
        files without a name, and there are no others (procfs)."""
        used = {}
        for entry, name in self.descriptors():
            if name.endswith(" (deleted)") or "/files/temp-" in name:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    used[status.st_dev, status.st_ino] = status.st_blocks * 512
        return sum(used.values())

    def kill(self) -> None:
        """SIGKILL, as a power cut or the kernel's out-of-memory killer would end it."""
        self.status = -signal.SIGKILL
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, wait, and hand back the exit status; a server that hangs is killed and told."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop:\n{self.messages()}") from None


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(
    directory: Path,
    *arguments: str | Path,
    tcp: bool = False,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Serving]:
    """Run `fleecenbd serve ARGUMENTS` with its sockets, state and log in `directory`.

    `prefix` is a command that runs the server, such as unshare. At the end the server is stopped
    with SIGTERM, unless it was killed; it must exit with status 0, and without a traceback in its
    log.
    """
    unix = directory / "f.sock"
    log = directory / "server.log"
    port = free_port() if tcp else None
    command = [*prefix, str(FLEECENBD), "serve", *map(str, arguments)]
    command += ["-U", str(unix), "--state-dir", str(directory / "state")]
    if port is not None:
        command += ["-p", str(port)]
    notify = directory / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log.open("wb") as log_file:
        ready.bind(str(notify))
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": str(notify)},
        )
        server = Serving(process, unix, port, log)
        try:
            _wait_until_ready(process, ready, server)
            yield server
        except BaseException:
            process.kill()
            process.wait()
            print(f"server's log ({shlex.join(command)}):\n{server.messages()}")
            raise
        status = server.stop()
    assert status == server.status, f"the server exited with {status}:\n{server.messages()}"
    assert "Traceback" not in server.messages(), server.messages()


def _wait_until_ready(
    process: subprocess.Popen[bytes], ready: socket.socket, server: Serving
) -> None:
    end_of_process = os.pidfd_open(process.pid)
    try:
        while True:
            readable, _, _ = select.select([ready, end_of_process], [], [], START_TIMEOUT_S)
            if ready in readable:
                if b"READY=1" in ready.recv(4096).splitlines():
                    return
            elif end_of_process in readable:
                raise AssertionError(f"the server ended before it was ready:\n{server.messages()}")
            else:
                raise AssertionError(f"the server did not get ready:\n{server.messages()}")
    finally:
        os.close(end_of_process)


@contextmanager
def connected(uri: str, prepare: Callable[[nbd.NBD], object] | None = None) -> Iterator[nbd.NBD]:
    """A libnbd client on a URI, gone at the end of the block; `prepare` comes before connect."""
    client = nbd.NBD()
    if prepare is not None:
        prepare(client)
    client.connect_uri(uri)
    try:
        yield client
    finally:
        # There is no call that closes: the connection ends by DISC, or when the object does.
        if client.aio_is_ready() or client.aio_is_processing():
            try:
                client.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)
            except nbd.Error as error:
                # A server that was killed has no goodbye, and its kernel may say so.
                if error.errno not in ("ECONNRESET", "EPIPE"):
                    raise


def run(*command: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a client to its end; its standard output. It must succeed."""
    result = try_run(*command, timeout_s=timeout_s)
    assert result.returncode == 0, (
        f"{shlex.join(map(str, command))} exited with {result.returncode}:\n"
        f"{result.stdout}{result.stderr}"
    )
    return result.stdout


def try_run(
    *command: str | Path, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a client to its end, whatever comes of it."""
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": CLIENTS_PATH},
        timeout=timeout_s,
        check=False,
    )
