"""What tests of disks and temp images of every kind share: other NBD servers, and whole backups."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.controlling import Control
from tests.disks import KIB, MIB, first_difference, make_disk
from tests.remembering import Moment, RememberingGuest
from tests.serving import FLEECENBD, Serving, connected, run

SIZE = 8 * MIB + 64 * KIB
TIMEOUT_S = 60.0


def read_all(uri: str) -> bytes:
    with connected(uri) as client:
        data = b""
        while len(data) < client.get_size():
            data += bytes(client.pread(min(MIB, client.get_size() - len(data)), len(data)))
        return data


def children_of(server: Serving) -> list[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        # A thread that ended since: its entry is gone, or what it says cannot be read any more.
        with suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(word) for word in (task / "children").read_text().split()}
    return sorted(found)


def state_of(pid: int) -> str | None:
    """Z: it has ended, and nobody has looked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + TIMEOUT_S
    while state_of(pid) not in (None, "Z"):
        assert time.monotonic() < end, f"{pid} goes on"
        time.sleep(0.01)


@contextmanager
def listening(server: Serving) -> Iterator[list[dict[str, Any]]]:
    """What happens, as it happens. The server is stopped at the end."""
    control = Control(f"{server.unix}.control")
    control.request("GET", "/v1/events")
    answer = control.getresponse()
    told: list[dict[str, Any]] = []

    def listen() -> None:
        while line := answer.readline():
            if line.strip():
                told.append(json.loads(line))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield told
    finally:
        server.stop()
        thread.join(TIMEOUT_S)
        control.close()


def is_backed_up(
    server: Serving, guest: RememberingGuest, folder: Path, name: str, **begin: object
) -> None:
    """A session over a guest that writes, pulled by us and by nbdcopy: its moment, byte by byte.
    ``begin``: fields of the call that begins it."""
    control = Control(f"{server.unix}.control")
    guest.wait(20)
    moment = Moment([guest])
    control.call("PUT", f"sessions/{name}", **begin)
    moment.is_over()
    guest.wait(20)
    copied = folder / f"{name}.copied.raw"
    run("nbdcopy", server.uri(f"vda@{name}"), copied)
    assert moment.is_shown_by(copied.read_bytes())
    pulled = folder / f"{name}.pulled.raw"
    run(FLEECENBD, "pull", server.uri(f"vda@{name}"), pulled)
    assert first_difference(pulled, copied) is None
    with connected(server.uri(f"vda@{name}")) as backup, pytest.raises(nbd.Error, match="Invalid"):
        backup.pread(4096, 0)
    control.call("DELETE", f"sessions/{name}")


class Backend:
    """An nbdkit over a file, that can be killed and come back."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.image = make_disk(folder / "remote.raw", SIZE, islands=60)
        self.socket = folder / "remote.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._words = ("file", self.image, *words)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        pid = self.socket.with_suffix(".pid")
        pid.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["nbdkit", "-f", "-U", self.socket, "-P", pid, *map(str, self._words)]
        )
        while not pid.exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def goes_away(self, seconds: float) -> None:
        """Kill it; it comes back by itself. (A guest of libnbd's lets no thread of ours run.)"""
        command = shlex.join(["nbdkit", "-f", "-U", str(self.socket), *map(str, self._words)])
        self.kill()
        self.socket.unlink()
        self._process = subprocess.Popen(["sh", "-c", f"sleep {seconds}; exec {command}"])

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def backend_over(folder: Path, *words: str | Path) -> Iterator[Backend]:
    backend = Backend(folder, *words)
    backend.start()
    try:
        yield backend
    finally:
        backend.kill()
