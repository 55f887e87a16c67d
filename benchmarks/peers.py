"""The servers that are compared: each started on its own copy of the image, on the same medium."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Peer:
    """A running server: NBD URIs of the guest's disk and of its point in time."""

    name: str
    guest: str
    fleece: str
    pid: int
    temp: Path

    def cpu_s(self) -> float:
        """CPU seconds spent by the process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_image(path: Path, size: int) -> None:
    """A raw image of random data, so that nothing can be saved on zeroes."""
    with path.open("wb") as image, open("/dev/urandom", "rb") as noise:
        block = noise.read(8 << 20)
        for index in range(0, size, len(block)):
            # Each block differs, and none is cheap to make: the noise, turned by its number.
            turn = (index // len(block)) % len(block)
            image.write((block[turn:] + block[:turn])[: size - index])


def _uri(name: str, socket: Path) -> str:
    return f"nbd+unix:///{name}?socket={socket}"


def _wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the socket is there; a server that ended is an error, with what it said."""
    deadline = time.monotonic() + START_TIMEOUT_S
    pidfd = os.pidfd_open(process.pid)
    try:
        while not socket.exists():
            if select.select([pidfd], [], [], 0.01)[0]:
                status = process.wait()
                raise RuntimeError(f"{process.args!r} ended with {status}: {log.read_text()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{process.args!r} did not make {socket}")
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def _running(command: list[str], socket: Path, log: Path) -> Iterator[int]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_for(socket, process, log)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def fleecenbd(folder: Path, image: Path) -> Iterator[Peer]:
    """fleecenbd with a session begun."""
    socket = folder / "fleecenbd.sock"
    state = folder / "state"
    command = [
        str(Path(sys.executable).parent / "fleecenbd"),
        *("serve", f"vm={image}", "--begin", "n", "--unix", str(socket)),
        *("--state-dir", str(state)),
    ]
    with _running(command, socket, folder / "fleecenbd.log") as pid:
        yield Peer("fleecenbd", _uri("vm", socket), _uri("vm@n", socket), pid, state)


@contextlib.contextmanager
def qemu_fleecing(
    folder: Path, image: Path, program: str = "qemu-storage-daemon"
) -> Iterator[Peer]:
    """qemu-storage-daemon doing the same: copy-before-write and snapshot-access."""
    socket = folder / "qemu.sock"
    temp = folder / "qemu-temp.raw"
    with temp.open("wb") as file:
        file.truncate(image.stat().st_size)
    command = [
        program,
        *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
        *("--blockdev", f"driver=file,node-name=temp,filename={temp},discard=unmap"),
        *("--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp"),
        *("--blockdev", "driver=snapshot-access,node-name=access,file=cbw"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=guest,node-name=cbw,name=vm,writable=on"),
        *("--export", "type=nbd,id=backup,node-name=access,name=vm@n"),
    ]
    with _running(command, socket, folder / "qemu.log") as pid:
        yield Peer("QEMU fleecing", _uri("vm", socket), _uri("vm@n", socket), pid, temp)


def version(*command: str) -> str:
    """The first line that a program prints about itself."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is missing: make tools installs it")
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[0]
