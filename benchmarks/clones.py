"""``python -m benchmarks.clones``: does a copy that shares blocks pay? (docs/images.md)

A copy of old data, from the active image to the temp image, is made in three ways: pread and
pwrite; the ioctl FICLONERANGE; copy_file_range. On XFS and btrfs, each a loop device of its own
(direct I/O to the disk below); for several lengths; with the source dirty in the page cache (a
guest has just written there), clean and cached, and uncached. Each copy is followed by what it is
made for: the guest's own write of the same range.

The three ways take turns, each turn at a place of its own, in an order drawn anew; told are medians
and their ratio to pread and pwrite. Needs root, mkfs.xfs and mkfs.btrfs.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import random
import statistics
import struct
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

from fleecenbd.engine import copy_reads
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions, arm
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.temp import TempImage

FICLONERANGE = 0x4020940D
IMAGE_SIZE = 1 << 30
STEP = 2 << 20
"""Bytes between the places of two copies: no two share a read-ahead."""
LENGTHS = (4 << 10, 64 << 10, 256 << 10, 1 << 20)
STATES = ("dirty", "cached", "uncached")
FORMATS = {
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


def plain(source: int, target: int, offset: int, length: int) -> None:
    os.pwrite(target, os.pread(source, length, offset), offset)


def clone(source: int, target: int, offset: int, length: int) -> None:
    fcntl.ioctl(target, FICLONERANGE, struct.pack("=qQQQ", source, offset, length, offset))


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    assert os.copy_file_range(source, target, length, offset, offset) == length


WAYS: dict[str, Callable[[int, int, int, int], None]] = {
    "plain": plain,
    "clone": clone,
    "copy_file_range": copy_range,
}


@dataclass
class Times:
    """Seconds."""

    copies: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """A new file system of this kind: where it is mounted, and its block device's name."""
    image = folder / f"{kind}.img"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 << 30)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    place = folder / kind
    place.mkdir()
    try:
        subprocess.run([*FORMATS[kind], device], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", device, place], check=True)
        try:
            yield place, os.path.basename(device)
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        image.unlink()


def written_bytes(device: str) -> int:
    return int(Path(f"/sys/block/{device}/stat").read_text().split()[6]) * 512


def filled(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, IMAGE_SIZE)
    for offset in range(0, IMAGE_SIZE, 1 << 20):
        os.pwrite(descriptor, os.urandom(1 << 20), offset)
    os.fsync(descriptor)
    return descriptor


def empty(path: Path) -> int:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, IMAGE_SIZE)
    return descriptor


def prepare(source: int, state: str, offset: int, length: int) -> None:
    if state == "dirty":
        os.pwrite(source, os.urandom(length), offset)
    elif state == "cached":
        os.pread(source, length, offset)
    else:
        os.posix_fadvise(source, offset - offset % STEP, STEP, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[..., object], *arguments: object) -> float:
    started = perf_counter()
    call(*arguments)
    return perf_counter() - started


def copies(place: Path, length: int, state: str, rounds: int) -> dict[str, Times]:
    """One table row: each way ``rounds`` times, in turns."""
    source, target = os.open(place / "active", os.O_RDWR), empty(place / "temp")
    times: dict[str, Times] = defaultdict(Times)
    places = random.sample(range(0, IMAGE_SIZE, STEP), rounds * len(WAYS))
    new = os.urandom(length)
    os.sync()
    for _ in range(rounds):
        for name in random.sample(list(WAYS), len(WAYS)):
            offset = places.pop() + 4096 * random.randrange((STEP - length) // 4096)
            prepare(source, state, offset, length)
            times[name].copies.append(timed(WAYS[name], source, target, offset, length))
            times[name].writes.append(timed(os.pwrite, source, new, offset))
    os.close(source)
    os.close(target)
    return times


def to_the_end(place: Path, device: str, length: int, name: str, count: int) -> tuple[float, float]:
    """(ms, bytes written to the device / bytes copied) of many copies and writes, and a sync."""
    source, target = os.open(place / "active", os.O_RDWR), empty(place / "temp")
    os.sync()
    before = written_bytes(device)
    started = perf_counter()
    new = os.urandom(length)
    for offset in random.sample(range(0, IMAGE_SIZE, STEP), count):
        WAYS[name](source, target, offset, length)
        os.pwrite(source, new, offset)
    os.sync()
    spent = perf_counter() - started
    written = written_bytes(device) - before
    os.close(source)
    os.close(target)
    return spent / count * 1e3, written / (count * length)


def beside(place: Path, length: int, name: str | None, state: str, seconds: float) -> list[float]:
    """Seconds that a guest's 4 KiB writes elsewhere take while another thread copies."""
    source, target = os.open(place / "active", os.O_RDWR), empty(place / "temp")
    os.sync()
    stop = threading.Event()

    def copy() -> None:
        offsets = random.sample(range(0, IMAGE_SIZE // 2, STEP), IMAGE_SIZE // 2 // STEP)
        while name is not None and not stop.is_set() and offsets:
            offset = offsets.pop()
            prepare(source, state, offset, length)
            WAYS[name](source, target, offset, length)
            sleep(0.002)

    thread = threading.Thread(target=copy)
    thread.start()
    waits = []
    until = perf_counter() + seconds
    while perf_counter() < until and (name is None or thread.is_alive()):
        offset = IMAGE_SIZE // 2 + 4096 * random.randrange(IMAGE_SIZE // 8192)
        waits.append(timed(os.pwrite, source, bytes(4096), offset))
        sleep(0.0005)
    stop.set()
    thread.join()
    os.close(source)
    os.close(target)
    return sorted(waits)


async def by_the_engine(
    place: Path, block_device: str, length: int, state: str, count: int, clones: bool
) -> tuple[float, float]:
    """(median s of a guest's write with its copy, bytes written to the device per byte of it)."""
    device = FileDevice.open(place / "active")
    disk = Disk("vda", device)
    descriptor = device.lend()
    offsets = random.sample(range(0, IMAGE_SIZE, STEP), count)
    for offset in offsets:
        prepare(descriptor, state, offset, length)

    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
        return TempImage.create(place, "temp", disk.size, cluster_size=cluster_size)

    shortest = copy_reads.CLONE_LENGTH_MIN
    copy_reads.CLONE_LENGTH_MIN = length if clones else 1 << 60
    if state != "dirty":
        os.sync()
    before = written_bytes(block_device)
    session = await arm("s", [disk], SessionOptions(), make_temp, clock=perf_counter)
    times = []
    for offset in offsets:
        data = os.urandom(length)
        started = perf_counter()
        if not disk.write_now(offset, data):
            await disk.write(offset, data)
        times.append(perf_counter() - started)
    os.sync()
    written = written_bytes(block_device) - before
    copy_reads.CLONE_LENGTH_MIN = shortest
    session.finish()
    os.close(descriptor)
    device.close()
    await device.wait_closed()
    return statistics.median(times), written / (count * length)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def size(length: int) -> str:
    return f"{length >> 10} KiB" if length < 1 << 20 else f"{length >> 20} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clones", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="copies of each way, per row")
    parser.add_argument("--folder", default="/var/tmp", help="where the loop devices' files are")
    parser.add_argument("--only", choices=list(FORMATS), help="one file system")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in FORMATS:
            if options.only in (None, kind):
                with mounted(kind, Path(folder)) as (place, device):
                    tell(kind, place, device, options.rounds)


def tell(kind: str, place: Path, device: str, rounds: int) -> None:
    os.close(filled(place / "active"))
    print(f"\n{kind}: us per copy / us of the guest's own write after it\n")
    print(
        "| length | source |", *(f"{name} |" for name in WAYS), "clone : plain | with the write |"
    )
    print("| --- " * (len(WAYS) + 4) + "|")
    for length in LENGTHS:
        for state in STATES:
            times = copies(place, length, state, rounds)
            copy = {name: statistics.median(t.copies) for name, t in times.items()}
            write = {name: statistics.median(t.writes) for name, t in times.items()}
            cells = [f"{us(copy[name])} / {us(write[name])}" for name in WAYS]
            both = (copy["clone"] + write["clone"]) / (copy["plain"] + write["plain"])
            cells += [f"{copy['clone'] / copy['plain']:.2f}", f"{both:.2f}"]
            print(f"| {size(length)} | {state} |", " | ".join(cells), "|", flush=True)
    print(f"\n{kind}: a guest's write by the engine, us / bytes written per byte: plain, clones\n")
    for length in (*LENGTHS[1:3], 512 << 10, LENGTHS[3]):
        for state in STATES:
            pairs: dict[bool, list[tuple[float, float]]] = defaultdict(list)
            for turn in range(6):
                clones = turn % 2 == 1
                one = by_the_engine(place, device, length, state, 100, clones)
                pairs[clones].append(asyncio.run(one))
            cells = []
            for clones in (False, True):
                spent, share = (
                    statistics.median(column) for column in zip(*pairs[clones], strict=True)
                )
                cells.append(f"{us(spent)} / {share:.2f}")
            ratio = statistics.median(
                c[0] / p[0] for p, c in zip(pairs[False], pairs[True], strict=True)
            )
            print(
                f"| {size(length)} | {state} |", " | ".join(cells), f"| {ratio:.2f} |", flush=True
            )
    print(f"\n{kind}: with a sync at the end, ms per copy / bytes written per byte copied\n")
    for length in LENGTHS:
        count = 256
        ends: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(3):
            for name in ("plain", "clone"):
                ends[name].append(to_the_end(place, device, length, name, count))
        cells = []
        for name in ("plain", "clone"):
            spent, share = (statistics.median(column) for column in zip(*ends[name], strict=True))
            cells.append(f"{spent:.2f} / {share:.2f}")
        print(f"| {size(length)} |", " | ".join(cells), "|", flush=True)
    print(f"\n{kind}: a guest's 4 KiB writes elsewhere meanwhile, us: median, p99, max\n")
    for length in LENGTHS[1:]:
        for state in ("cached", "dirty"):
            cells = []
            for way in (None, "plain", "clone"):
                waits = beside(place, length, way, state, 2.0)
                p99 = waits[len(waits) * 99 // 100]
                cells.append(f"{us(statistics.median(waits))}, {us(p99)}, {us(waits[-1])}")
            print(f"| {size(length)} | {state} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
