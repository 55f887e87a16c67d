"""What a guest's write waits for whose range is released, where the temp image's device is slow.

    python -m benchmarks.slow_temp IMAGE SOCKET URI

serves IMAGE as ``vm``, a session ``n`` begun, with the NBD export at URI for its temp image.
``waits`` puts nbdkit's delay filter there: every temp write takes 50 ms. A guest write comes, and
some milliseconds later nothing, a TRIM, or a READ that releases.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import uvloop

from benchmarks import clients, images, peers
from benchmarks.work import BLOCK, MIB
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions
from fleecenbd.server.server import Server
from fleecenbd.storage.device import Buffer, Data, Device, Extent
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.nbd_client import NbdClient

DELAY_S = 0.05
"""What each temp write takes."""
LATER_S = 0.005
"""From the guest's write to what releases its range."""
SIZE = 16 * MIB

WAYS = ("nothing", "TRIM", "READ_ONCE")
"""What comes after a guest's write."""


class NbdTemp:
    """An NBD export as a temp image: storage.device.Device, nothing of it now."""

    hole_size = BLOCK

    def __init__(self, client: NbdClient) -> None:
        self.name = client.name
        self.size = client.size
        self.pread = client.pread
        self.pwrite = client.pwrite
        self.zero = client.zero
        self.trim = client.trim
        self.flush = client.flush
        self.close = client.close
        self.wait_closed = client.wait_closed

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        return None

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        return False

    def pwrite_now(self, offset: int, data: Data) -> bool:
        return False

    def flush_now(self) -> bool:
        return False

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Never asked of a temp image."""
        return [(length, 0)]


async def _serve(image: Path, path: Path, temp_uri: str) -> None:
    server = Server()
    server.add_disk(Disk("vm", FileDevice.open(image)))

    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
        return NbdTemp(await NbdClient.open(temp_uri))

    await server.begin("n", None, SessionOptions(cluster_size=BLOCK), make_temp)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server.listen(listener)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    image, path, temp_uri = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(image), Path(path), temp_uri))


def waits(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Seconds that a guest's write waits, median and most of ``count``, by what comes after it."""
    image = folder / "slow.raw"
    images.make_image(image, SIZE)
    try:
        with _serving(folder, image) as server:
            return {
                way: _summary(_waits(server, way, number * count, count))
                for number, way in enumerate(WAYS)
            }
    finally:
        image.unlink()


@contextlib.contextmanager
def _serving(folder: Path, image: Path) -> Iterator[peers.Server]:
    with peers.socket_path() as temp, peers.socket_path() as path:
        nbdkit = ["nbdkit", "-f", "-U", str(temp), "--filter=delay", "memory", str(SIZE)]
        nbdkit.append(f"wdelay={round(DELAY_S * 1000)}ms")
        with peers.running(nbdkit, folder, temp):
            uri = f"nbd+unix:///?socket={temp}"
            command = [sys.executable, "-m", "benchmarks.slow_temp", str(image), str(path), uri]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
            with peers.running(command, folder, path, environment) as (pid, started):
                guest, fleece = peers.uri("vm", path), peers.uri("vm@n", path)
                yield peers.Server((guest,), (fleece,), (pid,), started)


def _waits(server: peers.Server, way: str, first: int, count: int) -> list[float]:
    """Seconds of each guest write, one after the other, to blocks of the disk that are new."""
    guest = clients.connect(server.guest)
    backup = clients.connect(server.fleece.replace("vm@n", "vm@n+once"))
    release: Callable[[int], object] = {
        "nothing": lambda offset: None,
        "TRIM": lambda offset: backup.aio_trim(BLOCK, offset),
        "READ_ONCE": lambda offset: backup.aio_pread(nbd.Buffer(BLOCK), offset),
    }[way]
    found = []
    for number in range(first, first + count):
        offset = number * BLOCK
        released = False
        started = time.monotonic()
        cookie = guest.aio_pwrite(b"\xa5" * BLOCK, offset)
        while not guest.aio_command_completed(cookie):
            left = LATER_S - (time.monotonic() - started)
            if not released and left <= 0:
                released = True
                release(offset)
            guest.poll(1000 if released else max(1, round(left * 1000)))
        found.append(time.monotonic() - started)
        while backup.aio_in_flight():
            backup.poll(1000)
    guest.shutdown()
    backup.shutdown()
    # Temp writes that nobody waits for: nbdkit before 1.34 may abort where a client goes with some
    # in flight.
    time.sleep(3 * DELAY_S)
    return found


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "most": max(seconds)}


if __name__ == "__main__":
    main()
