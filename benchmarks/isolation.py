"""What a guest feels of others: a disk that stalls 200 ms a call, a backup that reads nothing.

    python -m benchmarks.isolation FOLDER SOCKET WHAT

serves ``FOLDER/vm.raw`` and ``FOLDER/other.raw``, a session begun over both, with WHAT of the other
disk stalling: ``nothing``, ``disk``, ``temp``, ``sync``. ``felt`` starts it, keeps that disk's
clients busy, and measures the first disk's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import uvloop

from benchmarks import clients, images, peers
from benchmarks.peers import Server
from benchmarks.stalls import CALLS, STALL_S, StallingDevice
from benchmarks.work import BLOCK, MIB
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions
from fleecenbd.server import server as servers
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.temp import TempImage

STALLS = {"nothing": (), "disk": CALLS, "temp": CALLS, "sync": ("flush",)}
BUSY_CLIENTS = 8
SIZE = 256 * MIB
UNREAD_REQUESTS = 48
PART_S = 2.0
"""Seconds for each figure."""


# --- the server's process --------------------------------------------------------------------


async def _serve(folder: Path, path: Path, what: str) -> None:
    server = servers.Server(shared=0)
    for name in ("vm", "other"):
        device: Device = FileDevice.open(folder / f"{name}.raw")
        if name == "other" and what in ("disk", "sync"):
            device = StallingDevice(device, STALLS[what])
        server.add_disk(Disk(name, device))

    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
        temp = TempImage.create(folder, disk.name, disk.size, cluster_size=cluster_size)
        stalls = disk.name == "other" and what == "temp"
        return StallingDevice(temp, STALLS[what]) if stalls else temp

    await server.begin("n", None, SessionOptions(cbw_timeout_s=0), make_temp)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server.listen(listener)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    folder, path, what = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(folder), Path(path), what))


# --- what others do, and what the guest feels of it --------------------------------------------


def felt(folder: Path, other: str) -> dict[str, float]:
    """Latencies of a disk's clients, one request at a time each, while others do as told.

    ``other``: what of the other disk stalls, or ``unread``: a backup of this disk that has asked
    for 48 MiB and reads none of it.
    """
    what = other if other in STALLS else "nothing"
    vm, slow = folder / "vm.raw", folder / "other.raw"
    try:
        images.make_image(vm, SIZE)
        images.make_image(slow, SIZE)
        with _serving(folder, what) as server, _others(server, other):
            figures = {
                "guest write": _p99_us(server.guest, "randwrite"),
                "guest read": _p99_us(server.guest, "randread"),
                "fleecing read": _p99_us(server.fleece, "randread"),
            }
            figures["memory"] = server.resident_bytes() / MIB
    finally:
        vm.unlink(missing_ok=True)
        slow.unlink(missing_ok=True)
    return figures


@contextlib.contextmanager
def _serving(folder: Path, what: str) -> Iterator[Server]:
    with peers.socket_path() as path:
        command = [sys.executable, "-m", "benchmarks.isolation", str(folder), str(path), what]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with peers.running(command, folder, path, environment) as (pid, started):
            guests = (peers.uri("vm", path), peers.uri("other", path))
            fleeces = (peers.uri("vm@n", path), peers.uri("other@n", path))
            yield Server(guests, fleeces, (pid,), started)


def _p99_us(uri: str, kind: str) -> float:
    return clients.fio([uri], kind, depth=1, size=SIZE, limit_s=PART_S, timed=True).p99_s * 1e6


@contextlib.contextmanager
def _others(server: Server, other: str) -> Iterator[None]:
    if other == "nothing":
        yield
    elif other == "unread":
        handle = clients.connect(server.fleece)
        # libnbd reads replies as it is polled, which here it never is.
        held = [nbd.Buffer(MIB) for _ in range(UNREAD_REQUESTS)]
        for number, buffer in enumerate(held):
            handle.aio_pread(buffer, number * MIB)
        yield
    else:
        with _Busy(server.guests[1], syncs=other == "sync"):
            yield


class _Busy:
    """Clients that write all the time, each to a part of the disk of its own, block by block."""

    def __init__(self, uri: str, *, syncs: bool) -> None:
        self._ended = threading.Event()
        self._slowest_s = 0.0
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(clients.connect(uri), number, syncs))
            for number in range(BUSY_CLIENTS)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if kind is None and (self._errors or self._slowest_s < STALL_S):
            said = self._errors[0] if self._errors else f"{self._slowest_s:.3f} s at most"
            raise RuntimeError(f"the other disk did not stall as it should: {said}")

    def _run(self, handle: nbd.NBD, number: int, syncs: bool) -> None:
        part = SIZE // BUSY_CLIENTS
        offset = number * part
        try:
            while not self._ended.is_set():
                started = time.monotonic()
                handle.pwrite(b"\xa5" * BLOCK, offset)
                if syncs:
                    handle.flush()
                self._slowest_s = max(self._slowest_s, time.monotonic() - started)
                offset = number * part + (offset + BLOCK) % part
            handle.shutdown()
        except nbd.Error as error:
            self._errors.append(str(error))


if __name__ == "__main__":
    main()
