"""What is measured as work grows: the disk's size, sessions, clients, fragmentation."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import clients, images, isolation, peers
from benchmarks.peers import Server
from benchmarks.work import BLOCK, MIB

Figures = dict[str, float]

GIB = 1 << 30
LIMIT_S = 20.0


@dataclass(frozen=True)
class Amount:
    """How much work there is: a folder, requests for each figure, the size of an image of data."""

    folder: Path
    requests: int
    size: int


@dataclass(frozen=True)
class Dimension:
    """One table: a column for each value, measured by ``work`` under the column's name."""

    name: str
    columns: Mapping[str, Callable[[Amount], Figures]]
    units: Mapping[str, str]
    """Of each row, in the table's order."""


def _random(
    uris: Sequence[str], kind: str, amount: Amount, size: int, *, depth: int = 32
) -> clients.FioResult:
    """``amount.requests`` in all, the same blocks each time (those of a read and a write, too)."""
    length = max(1, amount.requests // len(uris)) * BLOCK
    return clients.fio(
        uris, kind, depth=depth, size=size, length=length, limit_s=LIMIT_S, once=False
    )


def _first_reply_ms(server: Server) -> float:
    client = clients.connect(server.fleece)
    client.pread(BLOCK, 0)
    seconds = time.monotonic() - server.started
    client.shutdown()
    return seconds * 1e3


# --- the disk's size -------------------------------------------------------------------------


def disk_size(size: int, cluster_size: str | None, amount: Amount) -> Figures:
    """A sparse disk, with data in the blocks that will be written."""
    with _image(amount) as image:
        images.make_sparse(image, size)
        with peers.fleecenbd(amount.folder, image, session=False) as server:
            _random([server.guest], "randwrite", amount, size)
        options = () if cluster_size is None else ("--cluster-size", cluster_size)
        with peers.fleecenbd(amount.folder, image, options=options) as server:
            figures = {"start": _first_reply_ms(server)}
            figures["memory at start"] = server.resident_bytes() / MIB
            for name, kind in (
                ("guest read", "randread"),
                ("first touch", "randwrite"),
                ("second touch", "randwrite"),
            ):
                figures[name] = _random([server.guest], kind, amount, size).rate
            figures["fleecing read"] = _random([server.fleece], "randread", amount, size).rate
            figures["memory"] = server.resident_bytes() / MIB
            figures["temp image"] = server.temp_bytes() / MIB
    return figures


# --- sessions --------------------------------------------------------------------------------


def sessions(count: int, amount: Amount) -> Figures:
    """The engine in a process of its own, on a disk full of data."""
    with _image(amount) as image:
        images.make_image(image, amount.size)
        command = [sys.executable, "-m", "benchmarks.scale_engine", str(image)]
        command += [str(amount.folder), str(count), str(amount.requests)]
        figures: Figures = json.loads(clients.run(command))
    return figures


# --- clients ---------------------------------------------------------------------------------


def many_clients(count: int, amount: Amount) -> Figures:
    """So many clients, four requests in flight each: first of the fleecing export, then guests."""
    with _image(amount) as image:
        images.make_image(image, amount.size)
        with peers.fleecenbd(amount.folder, image, options=("--shared", "0")) as server:
            pulls = _random([server.fleece] * count, "randread", amount, amount.size, depth=4)
            guests = _random([server.guest] * count, "randread", amount, amount.size, depth=4)
            held = [clients.connect(server.fleece) for _ in range(count)]
            for handle in held:
                handle.pread(MIB, 0)
            memory = server.resident_bytes() / MIB
            for handle in held:
                handle.shutdown()
    return {
        "fleecing read": pulls.rate,
        "fleecing read p99": pulls.p99_s * 1e6,
        "guest read": guests.rate,
        "memory": memory,
    }


# --- fragmentation ---------------------------------------------------------------------------


def fragmentation(percent: int, amount: Amount) -> Figures:
    """So much of the blocks copied at random, before anything is measured."""
    written = amount.size * percent // 100 // BLOCK * BLOCK
    corner = min(amount.size, max(BLOCK, amount.requests * BLOCK))
    with _image(amount) as image:
        images.make_image(image, amount.size)
        with peers.fleecenbd(amount.folder, image) as server:
            if written:
                # All of it, however long it takes: a part would be another column.
                clients.fio(
                    [server.guest], "randwrite", depth=32, size=amount.size, length=written,
                    limit_s=clients.RUN_TIMEOUT_S,
                )  # fmt: skip
            figures = {"pull": amount.size / clients.nbdcopy(server.fleece) / 1e6}
            figures["guest read"] = _random([server.guest], "randread", amount, amount.size).rate
            figures["fleecing read"] = _random(
                [server.fleece], "randread", amount, amount.size
            ).rate
            started = time.monotonic()
            clients.run(["nbdinfo", "--map=x-fleecenbd:access", server.fleece])
            figures["map"] = (time.monotonic() - started) * 1e3
            # A corner of the disk where every block is copied, whatever the rest is like.
            clients.fio([server.guest], "randwrite", depth=32, size=corner, length=corner)
            figures["second touch"] = clients.fio(
                [server.guest], "randwrite", depth=32, size=corner, length=corner
            ).rate
            figures["memory"] = server.resident_bytes() / MIB
    return figures


# --- isolation -------------------------------------------------------------------------------


def _felt(other: str, amount: Amount) -> Figures:
    return isolation.felt(amount.folder, other)


@contextlib.contextmanager
def _image(amount: Amount) -> Iterator[Path]:
    path = amount.folder / "vm.raw"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


# --- the tables ------------------------------------------------------------------------------

_DISK_UNITS = {
    "start": "ms",
    "guest read": "/s",
    "first touch": "/s",
    "second touch": "/s",
    "fleecing read": "/s",
    "memory at start": "MiB",
    "memory": "MiB",
    "temp image": "MiB",
}

_SIZES = {"1 GiB": GIB, "100 GiB": 100 * GIB, "1 TiB": 1024 * GIB, "16 TiB": 16384 * GIB}


def _sizes(cluster_size: str | None) -> Mapping[str, Callable[[Amount], Figures]]:
    return {name: partial(disk_size, size, cluster_size) for name, size in _SIZES.items()}


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension("disk size", _sizes(None), _DISK_UNITS),
    Dimension("disk size, clusters of 256 KiB", _sizes("256k"), _DISK_UNITS),
    Dimension(
        "sessions (the engine alone)",
        {str(count): partial(sessions, count) for count in (0, 1, 2, 4)},
        {"read": "/s", "first-touch": "/s", "second-touch": "/s", "memory": "MiB"},
    ),
    Dimension(
        "clients",
        {str(count): partial(many_clients, count) for count in (1, 16, 64)},
        {"fleecing read": "/s", "fleecing read p99": "us", "guest read": "/s", "memory": "MiB"},
    ),
    Dimension(
        "blocks copied, at random",
        {f"{percent} %": partial(fragmentation, percent) for percent in (0, 25, 50)},
        {
            "pull": "MB/s",
            "guest read": "/s",
            "fleecing read": "/s",
            "second touch": "/s",
            "map": "ms",
            "memory": "MiB",
        },
    ),
    Dimension(
        "isolation, p99 while",
        {
            "nobody else": partial(_felt, "nothing"),
            "another disk stalls": partial(_felt, "disk"),
            "another's temp image": partial(_felt, "temp"),
            "another's fsync": partial(_felt, "sync"),
            "a backup reads nothing": partial(_felt, "unread"),
        },
        {"guest write": "us", "guest read": "us", "fleecing read": "us", "memory": "MiB"},
    ),
)
