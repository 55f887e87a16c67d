"""The engine alone, in a process of its own: what a request costs with so many sessions.

    python -m benchmarks.scale_engine IMAGE FOLDER SESSIONS REQUESTS

The command line begins one session at most; here the engine is driven without a server, 32
requests at a time. Prints JSON: requests a second, and the memory that arming and all requests
have added, in MiB.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from benchmarks.peers import status_bytes
from benchmarks.work import BLOCK, MIB
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import Session, SessionOptions, arm
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.temp import TempImage

IN_FLIGHT = 32


async def measure(image: Path, folder: Path, sessions: int, requests: int) -> dict[str, float]:
    """Rates of guest reads, first-touch and second-touch writes of 4 KiB at random."""
    disk = Disk("vm", FileDevice.open(image))
    before = status_bytes("self", "VmRSS")
    armed = [await _armed(f"s{number}", disk, folder) for number in range(sessions)]
    blocks = random.Random(1).sample(range(disk.size // BLOCK), requests)
    data = b"\xa5" * BLOCK

    async def read(block: int) -> None:
        if disk.read_now(block * BLOCK, BLOCK) is None:
            await disk.read(block * BLOCK, BLOCK)

    async def write(block: int) -> None:
        if not disk.write_now(block * BLOCK, data):
            await disk.write(block * BLOCK, data)

    figures = {
        "read": await _rate(read, blocks),
        "first-touch": await _rate(write, blocks),
        "second-touch": await _rate(write, blocks),
        "memory": (status_bytes("self", "VmRSS") - before) / MIB,
    }
    for session in armed:
        if session.state != "active":
            raise RuntimeError(f"session {session.name} is {session.state}: figures mean nothing")
        session.finish()
    disk.device.close()
    return figures


async def _armed(name: str, disk: Disk, folder: Path) -> Session:
    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
        return TempImage.create(folder, name, disk.size, cluster_size=cluster_size)

    return await arm(name, [disk], SessionOptions(), make_temp, clock=time.time)


async def _rate(request: Callable[[int], Awaitable[None]], blocks: list[int]) -> float:
    """Requests a second, one for each block."""
    left = iter(blocks)

    async def worker() -> None:
        for block in left:
            await request(block)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return len(blocks) / (time.perf_counter() - started)


def main() -> None:
    """Print the figures of one run."""
    image, folder, sessions, requests = sys.argv[1:]
    work = measure(Path(image), Path(folder), int(sessions), int(requests))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(work)))


if __name__ == "__main__":
    main()
