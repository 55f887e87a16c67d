"""Maps of data and holes: bounded, honest where the kernel does not tell, and not made twice."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.holes import Holes

HOLE = EXTENT_HOLE | EXTENT_ZERO
BLOCK = 65536
SIZE = 16 * BLOCK


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file with data in every other block, beginning with a hole."""
    number = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(number, SIZE)
    for offset in range(BLOCK, SIZE, 2 * BLOCK):
        os.pwrite(number, b"\xff" * BLOCK, offset)
    yield number
    os.close(number)


def test_data_and_holes_are_told_apart(descriptor: int) -> None:
    assert Holes(descriptor, "disk").find(0, SIZE) == [(BLOCK, HOLE), (BLOCK, 0)] * 8


def test_extents_are_clipped_to_the_range(descriptor: int) -> None:
    assert Holes(descriptor, "disk").find(100, BLOCK) == [(BLOCK - 100, HOLE), (100, 0)]
    assert Holes(descriptor, "disk").find(BLOCK + 1, 5) == [(5, 0)]


def test_what_is_behind_the_limit_is_data(descriptor: int) -> None:
    extents = Holes(descriptor, "disk").find(0, SIZE, count_max=3)
    assert extents == [(BLOCK, HOLE), (BLOCK, 0), (BLOCK, HOLE), (SIZE - 3 * BLOCK, 0)]


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_where_the_kernel_refuses_all_is_data(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, whence: int
) -> None:
    lseek = os.lseek

    def refusing(number: int, offset: int, how: int) -> int:
        if how == whence:
            raise OSError(errno.EINVAL, "Invalid argument")
        return lseek(number, offset, how)

    monkeypatch.setattr(os, "lseek", refusing)
    assert Holes(descriptor, "disk").find(BLOCK, 5 * BLOCK) == [(5 * BLOCK, 0)]


def test_data_that_is_punched_while_it_is_looked_for_is_data(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "lseek", lambda number, offset, how: offset)
    assert Holes(descriptor, "disk").find(0, SIZE) == [(SIZE, 0)]


def test_a_run_of_data_is_looked_for_once(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.pwrite(descriptor, b"\xff" * SIZE, 0)
    holes = Holes(descriptor, "disk")
    assert holes.known(0, BLOCK) is None
    assert holes.find(BLOCK, BLOCK) == [(BLOCK, 0)]
    monkeypatch.setattr(os, "lseek", None)
    for offset in range(BLOCK, SIZE, BLOCK):
        assert holes.known(offset, BLOCK) == [(BLOCK, 0)]
    # What lies before was not looked at, and what lies behind is none of it.
    assert holes.known(BLOCK - 1, 2) is None
    assert holes.known(SIZE - BLOCK, BLOCK + 1) is None


def test_of_holes_nothing_is_remembered(descriptor: int) -> None:
    holes = Holes(descriptor, "disk")
    assert holes.find(0, 100) == [(100, HOLE)]
    assert holes.known(0, 100) is None
    holes.find(BLOCK, 100)
    assert holes.known(2 * BLOCK - 100, 101) is None


@pytest.mark.parametrize("call", ["trim", "zero", "punch"])
async def test_what_was_freed_is_looked_for_anew(tmp_path: Path, call: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xff" * SIZE)
    device = FileDevice.open(path)
    assert await device.extents(0, BLOCK) == [(BLOCK, 0)]
    await getattr(device, call)(BLOCK, BLOCK)
    assert await device.extents(0, 4 * BLOCK) == [(BLOCK, 0), (BLOCK, HOLE), (2 * BLOCK, 0)]
    device.close()


async def test_what_is_remembered_is_not_told_of_a_closed_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xff" * SIZE)
    device = FileDevice.open(path)
    await device.extents(0, BLOCK)
    device.close()
    with pytest.raises(OSError, match="closed"):
        await device.extents(0, BLOCK)
