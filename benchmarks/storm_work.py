"""One pull under a write storm: fio writes 4 KiB at random all over the disk, as fast as it goes.

The pull's target takes a fixed rate (nbdkit's rate filter), as a disk or a network does; how long
the guest writes beside it is then the target's doing, and not the kind of pull's.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import clients, images, peers

SAMPLE_S = 0.05
HASH_LENGTH = 4 << 20

FLEECENBD = str(Path(sys.executable).parent / "fleecenbd")
TRIM = "pull with TRIM"
ONCE = "pull with READ_ONCE"
WITHOUT = "pull without"
NBDCOPY_ONCE = "nbdcopy, READ_ONCE"
NBDCOPY = "nbdcopy, without"

Pull = Callable[[str, str], list[str]]
PULLS: dict[str, Pull] = {
    TRIM: lambda source, target: _pull(source, target),
    ONCE: lambda source, target: _pull(source, target, "--read-once"),
    WITHOUT: lambda source, target: _pull(source, target, "--no-trim"),
    NBDCOPY_ONCE: lambda source, target: ["nbdcopy", source.replace("@n", "@n+once"), target],
    NBDCOPY: lambda source, target: ["nbdcopy", source, target],
}
"""Kind -> its command, from the URI of the fleecing export and that of the target."""
COMPARED = {TRIM: WITHOUT, ONCE: WITHOUT, NBDCOPY_ONCE: NBDCOPY}
"""Kinds that release, and the one that does not to which they are compared."""


@dataclass(frozen=True)
class Outcome:
    """What one pull came to. Bytes, seconds; ``samples``: (seconds, bytes in the temp image)."""

    seconds: float
    temp_peak: int
    copies: int
    cancelled: int
    guest_rate: float
    """Guest writes a second."""
    guest_p99_s: float
    samples: list[tuple[float, int]]


def pull_in_storm(folder: Path, kind: str, size: int, rate: int) -> Outcome:
    """Pull a disk of ``size`` bytes to a target of ``rate`` bytes a second while a guest writes.

    Raises RuntimeError, also where the target does not hold what the disk held at arming.
    """
    image, target = folder / "storm.raw", folder / "storm-target.raw"
    images.make_image(image, size)
    with target.open("wb") as file:
        file.truncate(size)
    before = _digest(image)
    try:
        with peers.fleecenbd(folder, image) as server, _slow_target(folder, target, rate) as uri:
            with _Watch(server) as watch, _storm(server.guest, size) as storm:
                watch.begin()
                started = time.monotonic()
                clients.run(PULLS[kind](server.fleece, uri))
                seconds = time.monotonic() - started
                watch.end()
            told = watch.look()
        if _digest(target) != before:
            raise RuntimeError(f"{kind}: the target is not what the disk was at arming")
    finally:
        image.unlink()
        target.unlink()
    fio = storm()
    return Outcome(
        seconds,
        told["temp"]["peak"],
        told["copies"]["done"],
        told["copies"]["cancelled"],
        fio.rate,
        fio.p99_s,
        watch.samples,
    )


def _pull(source: str, target: str, *options: str) -> list[str]:
    return [FLEECENBD, "pull", "--progress", "none", "--force", *options, source, target]


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while piece := file.read(HASH_LENGTH):
            digest.update(piece)
    return digest.digest()


@contextlib.contextmanager
def _slow_target(folder: Path, target: Path, rate: int) -> Iterator[str]:
    """Writes of ``rate`` bytes a second, without a burst at the start."""
    with peers.socket_path() as path:
        command = ["nbdkit", "-f", "-U", str(path), "--filter=rate", "file", str(target)]
        command += [f"rate={rate * 8}", "burstiness=0.1"]
        with peers.running(command, folder, path):
            yield f"nbd+unix:///?socket={path}"


@contextlib.contextmanager
def _storm(uri: str, size: int) -> Iterator[Callable[[], clients.FioResult]]:
    """fio at depth 32 while the block runs; what it tells, after it."""
    command = ["fio", "--name=storm", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k"]
    command += ["--iodepth=32", f"--size={size}", "--randseed=1", "--norandommap", "--time_based"]
    command += [f"--runtime={round(clients.RUN_TIMEOUT_S)}", "--output-format=json"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    result: list[clients.FioResult] = []
    try:
        yield lambda: result[0]
        if process.poll() is not None:
            raise RuntimeError(f"the storm ended early: {process.communicate()[1][-500:]}")
        process.send_signal(signal.SIGINT)  # it ends its writes, and tells
        out, _ = process.communicate(timeout=clients.RUN_TIMEOUT_S)
        result.append(clients.parse_fio(out))
    finally:
        process.kill()
        process.wait()


class _Control(http.client.HTTPConnection):
    """HTTP over the server's control socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60.0)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class _Watch:
    """Asks the server for the state of the session's disk, over and over."""

    def __init__(self, server: peers.Server) -> None:
        self.samples: list[tuple[float, int]] = []
        self._control = _Control(server.guest.partition("socket=")[2] + ".control")
        self._thread = threading.Thread(target=self._run, name="watch")
        self._ended = threading.Event()
        self._error: Exception | None = None

    def look(self) -> dict[str, Any]:
        """``temp``, ``copies`` and the rest, as docs/control.md tells."""
        self._control.request("GET", "/v1/sessions/n")
        answer = json.loads(self._control.getresponse().read())
        disk: dict[str, Any] = answer["disks"][0]
        if disk["broken"] is not None:
            raise RuntimeError(f"the session broke: {disk['broken']}")
        return disk

    def begin(self) -> None:
        """Once the storm's first write has been copied."""
        deadline = time.monotonic() + peers.START_TIMEOUT_S
        while not self._storm_has_begun():
            if time.monotonic() > deadline:
                raise RuntimeError("the storm did not begin")
            time.sleep(SAMPLE_S / 10)
        self._thread.start()

    def _storm_has_begun(self) -> bool:
        try:
            return bool(self.look()["copies"]["done"])
        except (FileNotFoundError, ConnectionRefusedError):
            self._control.close()
            return False  # the control socket comes after the others

    def end(self) -> None:
        """Look no more. Raises what looking failed with."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        started = time.monotonic()
        try:
            while not self._ended.wait(SAMPLE_S):
                found = self.look()["temp"]["now"]
                self.samples.append((round(time.monotonic() - started, 3), found))
        except Exception as error:
            self._error = error

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
