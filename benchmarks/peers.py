"""The servers that are compared: each started on the same image, on the same medium."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 120.0

FLEECENBD = "fleecenbd"
QEMU = "QEMU fleecing"
QEMU_NBD = "qemu-nbd"
NBDKIT = "nbdkit file"
DIRECT = "direct"


@dataclass(frozen=True)
class Server:
    """Running processes that serve disks.

    ``guests`` and ``fleeces`` are URIs, one for each disk (``fleeces`` is empty where there is no
    point in time); ``temp`` the file of old data where it has a name.
    """

    guests: tuple[str, ...]
    fleeces: tuple[str, ...]
    pids: tuple[int, ...]
    started: float
    """time.monotonic() just before the first process was made."""
    temp: Path | None = None

    @property
    def guest(self) -> str:
        """The guest export of the first disk."""
        return self.guests[0]

    @property
    def fleece(self) -> str:
        """The fleecing export of the first disk."""
        return self.fleeces[0]

    def cpu_s(self) -> float:
        """CPU seconds that the processes have spent so far, threads that ended included."""
        # The clock of a process, as clock_getcpuclockid(3) makes it from a pid.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)

    def resident_bytes(self) -> int:
        """Memory that the processes hold now (VmRSS)."""
        return sum(status_bytes(pid, "VmRSS") for pid in self.pids)

    def temp_bytes(self) -> int:
        """Space that old data takes: blocks of the named file, else of files without a name."""
        if self.temp is not None:
            return self.temp.stat().st_blocks * 512
        used: dict[tuple[int, int], int] = {}
        for pid in self.pids:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed since the folder was listed
                    name = os.readlink(entry)
                    if name.endswith(" (deleted)") or "/files/temp-" in name:
                        status = entry.stat()
                        used[status.st_dev, status.st_ino] = status.st_blocks * 512
        return sum(used.values())


def status_bytes(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status, such as VmRSS; ``self`` is a pid too."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} has ended: it has no {field}")


@contextlib.contextmanager
def fleecenbd(
    folder: Path,
    *images: Path | str,
    session: bool = True,
    tcp: bool = False,
    options: tuple[str, ...] = (),
    checkout: Path | None = None,
) -> Iterator[Server]:
    """``fleecenbd serve``, with a session begun unless told otherwise; disks vm0, vm1, ...

    The one that is installed beside this interpreter, or that of a checkout.
    """
    names = [f"vm{number}" for number in range(len(images))]
    program = [str(Path(sys.executable).parent / "fleecenbd")]
    environment = None
    if checkout is not None:
        # -P: not from the folder that we happen to be in.
        program = [sys.executable, "-P", "-m", "fleecenbd"]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
    # Each server has a state of its own: the session is a new one, not what the last one left.
    with socket_path() as path, tempfile.TemporaryDirectory(prefix="state-", dir=folder) as state:
        command = [
            *program,
            "serve",
            *(f"{name}={image}" for name, image in zip(names, images, strict=True)),
            *("--state-dir", state, "--log-level", "warning", "--unix", str(path)),
            *(("--begin", "n") if session else ()),
            *options,
        ]
        place: Path | int = path
        if tcp:
            place = _free_port()
            command += ["--port", str(place)]
        with running(command, folder, place, environment) as (pid, started):
            guests = tuple(uri(name, place) for name in names)
            fleeces = tuple(uri(f"{name}@n", place) for name in names) if session else ()
            yield Server(guests, fleeces, (pid,), started)


@contextlib.contextmanager
def qemu_fleecing(folder: Path, image: Path, *, tcp: bool = False) -> Iterator[Server]:
    """qemu-storage-daemon doing the same: copy-before-write and snapshot-access."""
    temp = folder / "qemu-temp.raw"
    with temp.open("wb") as file:
        file.truncate(image.stat().st_size)
    with _place(tcp) as place, contextlib.ExitStack() as stack:
        stack.callback(temp.unlink)
        command = [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
            *("--blockdev", f"driver=file,node-name=temp,filename={temp},discard=unmap"),
            *("--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp"),
            *("--blockdev", "driver=snapshot-access,node-name=access,file=cbw"),
            "--nbd-server",
            f"addr.type=unix,addr.path={place}"
            if isinstance(place, Path)
            else f"addr.type=inet,addr.host=127.0.0.1,addr.port={place}",
            *("--export", "type=nbd,id=guest,node-name=cbw,name=vm,writable=on"),
            *("--export", "type=nbd,id=backup,node-name=access,name=vm@n"),
        ]
        pid, started = stack.enter_context(running(command, folder, place))
        yield Server((uri("vm", place),), (uri("vm@n", place),), (pid,), started, temp)


@contextlib.contextmanager
def qemu_nbd(folder: Path, image: Path, *, tcp: bool = False) -> Iterator[Server]:
    """qemu-nbd on a raw image: no point in time."""
    with _place(tcp) as place:
        where = ["-k"] if isinstance(place, Path) else ["-b", "127.0.0.1", "-p"]
        command = ["qemu-nbd", "-f", "raw", "-t", "-x", "vm", *where, str(place), str(image)]
        with running(command, folder, place) as (pid, started):
            yield Server((uri("vm", place),), (), (pid,), started)


@contextlib.contextmanager
def nbdkit_file(folder: Path, image: Path, *, tcp: bool = False) -> Iterator[Server]:
    """nbdkit's file plugin: no point in time; a pull of it reads the live disk."""
    with _place(tcp) as place:
        where = ["-U"] if isinstance(place, Path) else ["-i", "127.0.0.1", "-p"]
        command = ["nbdkit", "-f", *where, str(place), "file", str(image)]
        with running(command, folder, place) as (pid, started):
            yield Server((uri("vm", place),), (uri("vm", place),), (pid,), started)


@contextlib.contextmanager
def direct(folder: Path, image: Path) -> Iterator[Server]:
    """No server: the image itself, for a client that can open it."""
    yield Server((str(image),), (), (), time.monotonic())


@contextlib.contextmanager
def running(
    command: list[str],
    folder: Path,
    place: Path | int,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[int, float]]:
    """The pid of a server that takes connections at a socket's path, or a port; and its start."""
    log = folder / f"{Path(command[0]).name}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        _wait_for(place, process, log)
        yield process.pid, started
        if process.poll() is not None:
            raise RuntimeError(_ended(process, log))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ended(process: subprocess.Popen[bytes], log: Path) -> str:
    words = process.args if isinstance(process.args, list) else [str(process.args)]
    said = log.read_text(errors="replace")[-2000:]
    return f"{shlex.join(map(str, words))} ended with status {process.poll()}: {said}"


def _wait_for(place: Path | int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a connection is taken; a server that ended is an error, with what it said."""
    deadline = time.monotonic() + START_TIMEOUT_S
    pidfd = os.pidfd_open(process.pid)
    try:
        while not _connects(place):
            if select.select([pidfd], [], [], 0.001)[0]:
                process.wait()
                raise RuntimeError(_ended(process, log))
            if time.monotonic() > deadline:
                raise RuntimeError(f"{log.stem} took no connection within {START_TIMEOUT_S:g} s")
    finally:
        os.close(pidfd)


def _connects(place: Path | int) -> bool:
    family = socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(place) if isinstance(place, Path) else ("127.0.0.1", place))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


@contextlib.contextmanager
def _place(tcp: bool) -> Iterator[Path | int]:
    """A port, or the path of a socket."""
    if tcp:
        yield _free_port()
    else:
        with socket_path() as path:
            yield path


@contextlib.contextmanager
def socket_path() -> Iterator[Path]:
    """A path for a socket: short, as 107 bytes are all that such a path may have."""
    with tempfile.TemporaryDirectory(prefix="fleecenbd-") as name:
        yield Path(name) / "nbd.sock"


def _free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def uri(name: str, place: Path | int) -> str:
    if isinstance(place, Path):
        return f"nbd+unix:///{name}?socket={place}"
    return f"nbd://127.0.0.1:{place}/{name}"
