"""A quick paired comparison with QEMU's own fleecing, on one image in memory.

    pull               nbdcopy of the whole fleecing export to null:, nothing written before
    first-touch write  fio, 4 KiB at random, depth 32, each block once: copies before it writes
    second-touch write the same blocks again
    random read        fio, 4 KiB at random, depth 32, on the guest export

Each round starts both servers afresh, in turn, and measures every row; what counts is the ratio
within a round. Printed: medians, the spread of the ratio, and every round's rates.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import Peer, fleecenbd, make_image, qemu_fleecing, version

ROWS = ("pull", "first-touch write", "second-touch write", "random read")
UNITS = {"pull": "MB/s"}


def pull(peer: Peer, size: int) -> float:
    """MB/s."""
    started = time.monotonic()
    subprocess.run(["nbdcopy", peer.fleece, "null:"], check=True)
    return size / (time.monotonic() - started) / 1e6


def fio(peer: Peer, kind: str, length: int, size: int) -> float:
    """Requests a second, 4 KiB at random at depth 32, ``length`` bytes in all."""
    result = subprocess.run(
        [
            *("fio", "--name=row", "--ioengine=nbd", f"--uri={peer.guest}", f"--rw={kind}"),
            *("--bs=4k", "--iodepth=32", f"--size={size}", f"--io_size={length}"),
            *("--randseed=1", "--allrandrepeat=1", "--output-format=json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    return float(job["write" if kind == "randwrite" else "read"]["iops"])


def measure(peer: Peer, size: int) -> dict[str, float]:
    """Every row, in an order in which none spoils the next."""
    return {
        "pull": pull(peer, size),
        "random read": fio(peer, "randread", size, size),
        "first-touch write": fio(peer, "randwrite", size // 2, size),
        "second-touch write": fio(peer, "randwrite", size // 2, size),
    }


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="MiB of the image")
    parser.add_argument("--folder", default="/dev/shm", help="where the images lie")
    parser.add_argument("--qemu", default="qemu-storage-daemon")
    arguments = parser.parse_args()
    size = arguments.size << 20
    starts: list[Callable[[Path, Path], object]] = [fleecenbd, qemu_fleecing]
    print(version(arguments.qemu, "--version"))
    print(version("nbdcopy", "--version"), "/", version("fio", "--version"))
    print(f"{arguments.size} MiB of random data in {arguments.folder}, {arguments.rounds} rounds\n")
    rounds: list[list[dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        original = folder / "original.raw"
        make_image(original, size)
        for number in range(arguments.rounds):
            results = []
            for start in starts:
                image = folder / "vm.raw"
                shutil.copyfile(original, image)
                run = (
                    fleecenbd(folder, image)
                    if start is fleecenbd
                    else qemu_fleecing(folder, image, arguments.qemu)
                )
                with run as peer:
                    results.append(measure(peer, size))
                image.unlink()
                for left in ("qemu-temp.raw", "qemu.sock"):
                    (folder / left).unlink(missing_ok=True)
            rounds.append(results)
            print(
                f"round {number + 1}: "
                + ", ".join(f"{row} {results[0][row]:.0f} : {results[1][row]:.0f}" for row in ROWS),
                flush=True,
            )
    print(f"\n{'row':<20}{'fleecenbd':>12}{'QEMU':>12}{'ratio':>8}   lowest..highest")
    for row in ROWS:
        ours = [results[0][row] for results in rounds]
        theirs = [results[1][row] for results in rounds]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{row:<20}{statistics.median(ours):>12.0f}{statistics.median(theirs):>12.0f}"
            f"{statistics.median(ratios):>8.2f}   {min(ratios):.2f}..{max(ratios):.2f}"
            f"   {UNITS.get(row, 'requests/s')}"
        )


if __name__ == "__main__":
    main()
