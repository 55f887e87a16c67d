"""Disk images for tests: made with data and holes, copied, compared without reading the holes."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

COMPARE_LENGTH = 4 * MIB


def make_disk(path: Path, size: int, *, seed: int = 1, islands: int = 24) -> Path:
    """A sparse image: random data in places, its very first and last bytes among them, else holes.

    Offsets and lengths are odd on purpose: nothing about a disk's content is aligned to clusters.
    """
    dice = random.Random(seed)
    with path.open("wb") as image:
        image.truncate(size)
        for index in range(islands):
            length = min(size, dice.randint(1, 96 * KIB))
            offset = dice.randint(0, size - length)
            if index == 0:
                offset = 0
            elif index == 1:
                offset = size - length
            image.seek(offset)
            image.write(dice.randbytes(length))
    return path


def copy_disk(source: Path, target: Path) -> Path:
    """A copy of an image, holes included."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    return target


def first_difference(left: Path, right: Path) -> str | None:
    """None if two images have the same size and bytes, else a sentence about the first difference.

    Only where at least one of them holds data are bytes compared: a hole equals a hole.
    """
    with left.open("rb") as one, right.open("rb") as other:
        size = os.fstat(one.fileno()).st_size
        other_size = os.fstat(other.fileno()).st_size
        if size != other_size:
            return f"{left} has {size} bytes, {right} has {other_size}"
        position = 0
        for offset, end in sorted([*_data(one.fileno(), size), *_data(other.fileno(), size)]):
            position = max(position, offset)
            while position < end:
                length = min(COMPARE_LENGTH, end - position)
                if os.pread(one.fileno(), length, position) != os.pread(
                    other.fileno(), length, position
                ):
                    return f"{left} and {right} differ in [{position}, {position + length})"
                position += length
    return None


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, end) of each run that is not a hole."""
    position = 0
    while position < size:
        try:
            offset = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        position = os.lseek(descriptor, offset, os.SEEK_HOLE)
        yield offset, position
