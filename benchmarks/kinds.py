"""``python -m benchmarks.kinds``: what each kind of disk costs, beside a raw file (docs/images.md).

    raw      a file
    qcow2    the same content in a qcow2 image, kept by the server's qemu-storage-daemon
    nbd      the same file behind an nbdkit on a Unix socket

With ``--temps``: what each kind of temp image costs, of a raw disk, beside a raw one:

    raw      a sparse file
    prealloc the same, with its space taken at the start
    qcow2    a qcow2 file, kept by the server's qemu-storage-daemon; with clusters of 4 and 64 KiB
    nbd      a sparse file behind an nbdkit on a Unix socket

With ``--throttle``: what that policy costs while the temp image is far from full.

All in memory. In each round the kinds take turns, in an order drawn anew; a row is a guest's random
4 KiB requests, or a pull of the fleecing export by nbdcopy. Told are medians, and medians of the
ratios to raw within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import clients, images, peers
from benchmarks.work import MIB

DISKS = ("raw", "qcow2", "nbd")
TEMPS = ("raw", "prealloc", "qcow2", "qcow2, 64k", "nbd")
LIMIT_S = 4.0
DEPTH = 16


Place = tuple[Path | str, tuple[str, ...], Path | None]
"""A disk as it is served, options of the server's, and the temp image's file, if it is ours."""


@contextlib.contextmanager
def _disk(kind: str, folder: Path, raw: Path) -> Iterator[Place]:
    if kind == "raw":
        yield raw, (), None
    elif kind == "qcow2":
        path = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, path], check=True)
        yield f"qcow2:{path}", (), None
        path.unlink()
    else:
        with peers.nbdkit_file(folder, raw) as server:
            yield server.guest, (), None


@contextlib.contextmanager
def _temp(kind: str, folder: Path, raw: Path) -> Iterator[Place]:
    if kind == "raw":
        yield raw, (), None
    elif kind == "throttle":
        # The limit is far away: nothing is to be delayed.
        yield (
            raw,
            ("--on-cbw-error", "throttle", "--temp-limit", str(16 * raw.stat().st_size)),
            None,
        )
    elif kind == "prealloc":
        yield raw, ("--temp-prealloc",), None
    elif kind == "qcow2":
        yield raw, ("--temp", "qcow2"), None
    elif kind == "qcow2, 64k":
        yield raw, ("--temp", "qcow2", "--cluster-size", "64k"), None
    else:
        path = folder / "temp.raw"
        with path.open("wb") as file:
            file.truncate(raw.stat().st_size)
        with peers.nbdkit_file(folder, path) as server:
            yield raw, ("--temp", server.guest), path
        path.unlink()


def _measure(server: peers.Server, size: int, state: Path, temp: Path | None) -> dict[str, float]:
    def rate(kind: str) -> float:
        result = clients.fio(
            [server.guest], kind, depth=DEPTH, size=size, limit_s=LIMIT_S, timed=True, once=False
        )
        return result.rate

    rows: dict[str, Callable[[], float]] = {
        "guest's reads, /s": lambda: rate("randread"),
        "guest's first writes, /s": lambda: (
            clients.fio([server.guest], "randwrite", depth=DEPTH, size=size, limit_s=LIMIT_S).rate
        ),
        "guest's second writes, /s": lambda: rate("randwrite"),
        "pull, MiB/s": lambda: size / MIB / clients.nbdcopy(server.fleece),
    }
    found = {name: row() for name, row in rows.items()}
    # As the command line has them, a temp image's file has a name.
    (file,) = [temp] if temp is not None else state.glob("state-*/files/temp-*")
    found["temp image, MiB"] = file.stat().st_blocks * 512 / MIB
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--temps", action="store_true", help="temp images, and not disks")
    parser.add_argument("--throttle", action="store_true", help="that policy, below its mark")
    asked = parser.parse_args()
    kinds: tuple[str, ...] = TEMPS if asked.temps else DISKS
    place = _temp if asked.temps else _disk
    if asked.throttle:
        kinds, place = ("raw", "throttle"), _temp
    size = asked.mib * MIB
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    dice = random.Random(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for _ in range(asked.rounds):
            for kind in dice.sample(kinds, len(kinds)):
                raw = folder / "disk.raw"
                images.make_image(raw, size)
                with (
                    place(kind, folder, raw) as (disk, options, temp),
                    peers.fleecenbd(folder, disk, options=options) as server,
                ):
                    for row, value in _measure(server, size, folder, temp).items():
                        found[row, kind].append(value)
                raw.unlink()
    others = " | ".join(f"{kind} | : raw" for kind in kinds[1:])
    print(f"| {asked.mib} MiB, {asked.rounds} rounds | raw | {others} |")
    print(f"|{' --- |' * (2 * len(kinds))}")
    for row in dict.fromkeys(row for row, _ in found):
        cells = [f"{statistics.median(found[row, 'raw']):,.0f}"]
        for kind in kinds[1:]:
            ratios = [
                value / base
                for value, base in zip(found[row, kind], found[row, "raw"], strict=True)
            ]
            cells.append(f"{statistics.median(found[row, kind]):,.0f}")
            cells.append(f"{statistics.median(ratios):.2f}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
