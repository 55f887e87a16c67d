"""The work that a server is put to, and the figures that come of it, by name."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import clients, images
from benchmarks.peers import Server

GIB = 1 << 30
MIB = 1 << 20
BLOCK = 4096
LARGE_SIZE = 1 << 40
CLIENTS = 64
DISKS = 10


@dataclass(frozen=True)
class Place:
    """Where a suite runs: a folder with nothing in it but its image of ``size`` bytes."""

    folder: Path
    image: Path
    size: int
    limit_s: float
    """Seconds that one call of fio may take, and that those take that go by time."""
    checkout: Path | None = None
    """Whose fleecenbd is run; None: the one that is installed."""


def pull(metric: str, server: Server, place: Place) -> dict[str, float]:
    cpu_s = server.cpu_s()
    seconds = clients.nbdcopy(server.fleece)
    cpu_s = server.cpu_s() - cpu_s
    figures = {metric: place.size / seconds / 1e6}
    if metric == "pull":
        figures["cpu-pull"] = cpu_s * GIB / place.size
    return figures


def cold_pull(server: Server, place: Place) -> dict[str, float]:
    images.drop(place.image)
    return pull("pull-cold", server, place)


def warm_pull(server: Server, place: Place) -> dict[str, float]:
    images.warm(place.image)
    return pull("pull-warm", server, place)


def _write(part: int, server: Server, place: Place) -> clients.FioResult:
    """4 KiB at random, depth 32, to one block in ``part``: always the same ones."""
    length = whole(place.size // part)
    return clients.fio([server.guest], "randwrite", depth=32, size=place.size, length=length)


def first_touch(server: Server, place: Place) -> dict[str, float]:
    cpu_s = server.cpu_s()
    result = _write(16, server, place)
    cpu_s = server.cpu_s() - cpu_s
    return {
        "first-touch": result.rate,
        "cpu-first-touch": cpu_s * 1e6 / result.requests,
        "temp-size": server.temp_bytes() / MIB,
    }


def fill(server: Server, place: Place) -> dict[str, float]:
    _write(4, server, place)
    return {}


def second_touch(server: Server, place: Place) -> dict[str, float]:
    cpu_s = server.cpu_s()
    result = _write(4, server, place)
    cpu_s = server.cpu_s() - cpu_s
    return {"second-touch": result.rate, "cpu-second-touch": cpu_s * 1e6 / result.requests}


def random_requests(
    kind: str, depth: int, part: int, server: Server, place: Place
) -> dict[str, float]:
    result = clients.fio(
        [server.guest],
        f"rand{kind}",
        depth=depth,
        size=place.size,
        length=whole(place.size // part),
        limit_s=place.limit_s,
    )
    return {f"{kind}-{depth}": result.rate}


def cold_read(server: Server, place: Place) -> dict[str, float]:
    images.drop(place.image)
    return {"read-32-cold": random_requests("read", 32, 64, server, place)["read-32"]}


def warm_read(server: Server, place: Place) -> dict[str, float]:
    images.warm(place.image)
    return {"read-32-warm": random_requests("read", 32, 2, server, place)["read-32"]}


def qemu_client(kind: str, depth: int, server: Server, place: Place) -> dict[str, float]:
    # Enough of them for a client that tells its time in milliseconds.
    count = max(2048, place.size // BLOCK // (4 if depth > 1 else 16))
    rate = clients.qemu_bench(server.guest, write=kind == "write", depth=depth, count=count)
    return {f"{kind}-{depth}": rate}


def latency(server: Server, place: Place) -> dict[str, float]:
    with clients.pulling(server.fleece, place.size) as pulled_bytes:
        began, pulled = time.monotonic(), pulled_bytes()
        result = clients.fio(
            [server.guest],
            "randwrite",
            depth=1,
            size=place.size,
            limit_s=place.limit_s / 4,
            once=False,
            timed=True,
        )
        rate = (pulled_bytes() - pulled) / (time.monotonic() - began)
    return {"p99": result.p99_s * 1e6, "pull": rate / 1e6}


def storm(release: bool, server: Server, place: Place) -> dict[str, float]:
    with (
        clients.storm(server.guest, place.size, lambda: server.temp_bytes() > 0),
        clients.peak(server.temp_bytes) as peak,
    ):
        began = time.monotonic()
        clients.pull(server.fleece, release=release)
        seconds = time.monotonic() - began
        return {"temp-peak": peak() / MIB, "pull": place.size / seconds / 1e6}


def mixed(server: Server, place: Place) -> dict[str, float]:
    size = whole(place.size // DISKS)
    limit_s = place.limit_s / 4
    result = clients.fio(server.guests, "randrw", depth=8, size=size, limit_s=limit_s, timed=True)
    return {"mixed": result.rate}


def first_reply(server: Server, place: Place) -> dict[str, float]:
    client = clients.connect(server.fleece)
    client.pread(BLOCK, 0)
    seconds = time.monotonic() - server.started
    client.shutdown()
    return {"start": seconds * 1e3}


def memory(server: Server, place: Place) -> dict[str, float]:
    """One guest that has written 4096 blocks all over the disk; all others have read 1 MiB."""
    dice = random.Random(1)
    handles = [clients.connect(server.guest)]
    handles += [clients.connect(server.fleece) for _ in range(CLIENTS - 1)]
    for _ in range(4096):
        handles[0].pwrite(b"\xa5" * BLOCK, dice.randrange(LARGE_SIZE // BLOCK) * BLOCK)
    for number, handle in enumerate(handles):
        handle.pread(MIB, number * MIB)
    resident = server.resident_bytes()
    for handle in handles:
        handle.shutdown()
    return {"memory": resident / MIB}


def whole(length: int) -> int:
    """Whole blocks of what is asked, at least one."""
    return max(BLOCK, length // BLOCK * BLOCK)
