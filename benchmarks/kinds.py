"""``python -m benchmarks.kinds``: what each kind of disk costs, beside a raw file (docs/images.md).

    raw      a file
    qcow2    the same content in a qcow2 image, kept by the server's qemu-storage-daemon
    nbd      the same file behind an nbdkit on a Unix socket

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

KINDS = ("raw", "qcow2", "nbd")
LIMIT_S = 4.0
DEPTH = 16


@contextlib.contextmanager
def _disk(kind: str, folder: Path, raw: Path) -> Iterator[Path | str]:
    if kind == "raw":
        yield raw
    elif kind == "qcow2":
        path = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, path], check=True)
        yield f"qcow2:{path}"
        path.unlink()
    else:
        with peers.nbdkit_file(folder, raw) as server:
            yield server.guest


def _measure(server: peers.Server, size: int) -> dict[str, float]:
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
    found["temp image, MiB"] = server.temp_bytes() / MIB
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128)
    asked = parser.parse_args()
    size = asked.mib * MIB
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    dice = random.Random(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for _ in range(asked.rounds):
            for kind in dice.sample(KINDS, len(KINDS)):
                raw = folder / "disk.raw"
                images.make_image(raw, size)
                with _disk(kind, folder, raw) as disk, peers.fleecenbd(folder, disk) as server:
                    for row, value in _measure(server, size).items():
                        found[row, kind].append(value)
                raw.unlink()
    print(f"| {asked.mib} MiB, {asked.rounds} rounds | raw | qcow2 | : raw | nbd | : raw |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in dict.fromkeys(row for row, _ in found):
        cells = [f"{statistics.median(found[row, 'raw']):,.0f}"]
        for kind in KINDS[1:]:
            ratios = [
                value / base
                for value, base in zip(found[row, kind], found[row, "raw"], strict=True)
            ]
            cells.append(f"{statistics.median(found[row, kind]):,.0f}")
            cells.append(f"{statistics.median(ratios):.2f}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
