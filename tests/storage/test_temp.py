"""TempImage: the space it holds, the name it has not, and the file systems it refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleecenbd.storage import system_calls
from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO
from fleecenbd.storage.temp import TempImage
from tests.descriptors import no_new_descriptor

HOLE = EXTENT_HOLE | EXTENT_ZERO
SIZE = (1 << 20) + 512


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk's file system, and one in memory."""
    if request.param == "disk":
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
            yield Path(path)


async def test_only_what_was_written_holds_space(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", 1 << 40)
    assert temp.used_bytes() == 0
    await temp.pwrite(1 << 39, b"\xff" * 3 * temp.hole_size)
    assert temp.used_bytes() == 3 * temp.hole_size
    assert await temp.extents((1 << 39) - 512, 1024) == [(512, HOLE), (512, 0)]
    temp.close()


async def test_trim_frees_the_space_at_once(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", 1 << 24)
    hole = temp.hole_size
    await temp.pwrite(0, b"\xff" * 64 * hole)
    await temp.trim(hole, hole)
    assert temp.used_bytes() == 63 * hole
    await temp.trim(0, 1 << 24)
    assert temp.used_bytes() == 0
    assert await temp.pread(0, 64 * hole) == bytes(64 * hole)
    temp.close()


async def test_the_last_part_of_an_odd_sized_image_is_freed_too(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", SIZE)
    await temp.pwrite(0, b"\xff" * SIZE)
    start = SIZE - SIZE % temp.hole_size
    await temp.trim(start, SIZE - start)
    assert temp.used_bytes() == start
    await temp.trim(0, start)
    assert temp.used_bytes() == 0
    temp.close()


async def test_many_ranges_are_freed_as_one_by_one(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", SIZE)
    hole = temp.hole_size
    await temp.pwrite(0, b"\xff" * SIZE)
    tail = SIZE - SIZE % hole
    assert tail > 8 * hole
    await temp.trim_many([(hole, hole), (3 * hole, 2 * hole), (tail, SIZE - tail)])
    assert temp.used_bytes() == tail - 3 * hole
    shown = await temp.pread(0, SIZE)
    for number in range(6):
        byte = b"\0" if number in (1, 3, 4) else b"\xff"
        assert shown[number * hole : (number + 1) * hole] == byte * hole
    await temp.trim_many([])
    assert temp.used_bytes() == tail - 3 * hole
    temp.close()


async def test_no_name_leads_to_it_and_its_space_goes_with_it(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", SIZE)
    assert os.listdir(directory) == []
    temp.close()
    with pytest.raises(OSError, match="closed"):
        temp.used_bytes()
    await temp.wait_closed()


KILLED = """
import asyncio, sys
from fleecenbd.storage.temp import TempImage

async def main():
    temp = TempImage.create(sys.argv[1], "vda@nightly", 1 << 30)
    await temp.pwrite(0, b"data" * 1024)
    print(temp.used_bytes(), flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def test_a_killed_server_leaves_nothing_behind(directory: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 4096
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    assert os.listdir(directory) == []


NAMED = """
import asyncio, os, signal, sys
from fleecenbd.storage.temp import TempImage

async def main():
    temp = TempImage.create_named(sys.argv[1] + "/image", (1 << 20) + 512, cluster_size=8192)
    await temp.pwrite(8192, b"data" * 1024)
    print(temp.size, temp.hole_size, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture
def killed_with_an_image(directory: Path) -> list[int]:
    """The size and the hole size of ``image``, made and written by a process that was killed."""
    killed = subprocess.run(
        [sys.executable, "-c", NAMED, directory], stdout=subprocess.PIPE, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    return [int(word) for word in killed.stdout.split()]


async def test_a_named_image_is_found_again_after_a_kill(
    directory: Path, killed_with_an_image: list[int]
) -> None:
    size, hole_size = killed_with_an_image
    path = directory / "image"
    temp = TempImage.reopen(path, size, hole_size)
    assert (temp.size, temp.hole_size, temp.name) == (size, hole_size, str(path))
    assert await temp.pread(8192, 4100) == b"data" * 1024 + bytes(4)
    assert temp.used_bytes() == 4096
    await temp.trim(0, size)
    assert temp.used_bytes() == 0
    temp.close()
    await temp.wait_closed()
    assert path.exists()


async def test_a_named_image_is_locked_as_long_as_a_call_can_reach_it(directory: Path) -> None:
    path = directory / "image"
    temp = TempImage.create_named(path, SIZE)
    with pytest.raises(FileExistsError):
        TempImage.create_named(path, SIZE)
    with pytest.raises(OSError, match="in use") as caught:
        TempImage.reopen(path, temp.size, temp.hole_size)
    assert caught.value.errno == errno.EBUSY
    temp.close()
    await temp.wait_closed()
    TempImage.reopen(path, temp.size, temp.hole_size).close()


async def test_a_named_image_of_another_size_is_refused(directory: Path) -> None:
    path = directory / "image"
    temp = TempImage.create_named(path, SIZE)
    temp.close()
    await temp.wait_closed()
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="has 4096 bytes of"):
        TempImage.reopen(path, temp.size, temp.hole_size)


async def test_a_named_image_that_cannot_be_made_leaves_no_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system_calls, "write_all", refuse)
    with pytest.raises(OSError, match="No space"):
        TempImage.create_named(directory / "image", SIZE)
    assert os.listdir(directory) == []


async def test_a_file_system_without_unnamed_files_gets_an_unlinked_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def without_tmpfile(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.ENOTSUP, "Operation not supported", path)
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", without_tmpfile)
    temp = TempImage.create(directory, "vda@nightly", SIZE)
    await temp.pwrite(0, b"data")
    assert await temp.pread(0, 5) == b"data\0"
    assert os.listdir(directory) == []
    temp.close()


class Allocating:
    """os.fstat on a file system that gives out space in larger units than its blocks."""

    def __init__(self, unit: int, *, other: int = 0) -> None:
        self._unit = unit
        self._other = other  # bytes that the file holds besides, for extended attributes
        self._fstat = os.fstat

    def __call__(self, descriptor: int) -> object:
        status = self._fstat(descriptor)
        held = -(-status.st_blocks * 512 // self._unit) * self._unit + self._other
        return SimpleNamespace(st_blocks=held // 512, st_mode=status.st_mode)


@pytest.mark.parametrize("other", [0, 4096])
@pytest.mark.parametrize(("unit", "hole_size"), [(65536, 65536), (3 << 13, 1 << 15)])
async def test_the_hole_size_is_the_unit_in_which_space_is_given_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch, unit: int, hole_size: int, other: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", Allocating(unit, other=other))
        temp = TempImage.create(directory, "vda@nightly", SIZE)
    assert temp.hole_size == hole_size
    assert temp.used_bytes() == 0
    assert await temp.extents(0, SIZE) == [(SIZE, HOLE)]
    await temp.pwrite(0, b"\xff" * SIZE)
    await temp.trim(1 << 20, SIZE - (1 << 20))
    assert temp.used_bytes() == 1 << 20
    temp.close()


def test_where_space_is_told_of_later_the_hole_size_is_the_block_size(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda descriptor: SimpleNamespace(st_blocks=0, st_mode=0))
        temp = TempImage.create(directory, "vda@nightly", SIZE)
    assert temp.hole_size == os.statvfs(directory).f_bsize
    temp.close()


@pytest.mark.parametrize(
    ("size", "cluster_size", "whole"),
    [
        (SIZE, None, SIZE),
        (SIZE, 512, (1 << 20) + 65536),
        (SIZE, 1 << 17, (1 << 20) + (1 << 17)),
        (1 << 20, 1 << 17, 1 << 20),
    ],
)
def test_an_image_for_clusters_is_a_whole_number_of_them_and_of_holes(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    cluster_size: int | None,
    whole: int,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", Allocating(65536))
        temp = TempImage.create(directory, "vda@nightly", size, cluster_size=cluster_size)
    assert temp.size == whole
    temp.close()


def refused(*arguments: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported", "vda@nightly")


def test_a_file_system_that_cannot_punch_holes_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_calls, "fallocate", refused)
    with (
        no_new_descriptor(),
        pytest.raises(OSError, match=r"cannot free parts of a file.*put temp images on") as caught,
    ):
        TempImage.create(directory, "vda@nightly", SIZE)
    assert caught.value.errno == errno.ENOTSUP


async def test_a_trim_that_frees_nothing_is_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = TempImage.create(directory, "vda@nightly", SIZE)
    await temp.pwrite(0, bytes(4096))
    monkeypatch.setattr(system_calls, "fallocate", refused)
    with pytest.raises(OSError, match="cannot be freed"):
        await temp.trim(0, 4096)
    temp.close()


async def test_a_failing_trim_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "vda@nightly")

    temp = TempImage.create(directory, "vda@nightly", SIZE)
    monkeypatch.setattr(system_calls, "fallocate", failing)
    with pytest.raises(OSError, match="Input/output error"):
        await temp.trim(0, 4096)
    with pytest.raises(OSError, match="Input/output error"):
        await temp.trim_many([(0, 4096)])
    temp.close()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        TempImage.create(tmp_path / "missing", "vda@nightly", SIZE)


# -- space taken in advance ------------------------------------------------------------------------


async def test_a_preallocated_image_holds_all_of_its_space_until_it_is_trimmed(
    directory: Path,
) -> None:
    path = directory / "temp"
    temp = TempImage.create_named(path, 1 << 24, preallocate=True)
    hole = temp.hole_size
    assert temp.holds_space
    assert temp.used_bytes() >= 1 << 24
    before = temp.used_bytes()
    await temp.pwrite(0, b"\xff" * 64 * hole)
    assert temp.used_bytes() == before
    await temp.trim(hole, 1 << 23)
    assert temp.used_bytes() == before - (1 << 23)
    assert await temp.pread(0, 2 * hole) == b"\xff" * hole + bytes(hole)
    temp.close()
    await temp.wait_closed()
    again = TempImage.reopen(path, 1 << 24, hole, holds_space=True)
    assert again.holds_space
    assert again.used_bytes() == before - (1 << 23), "nothing is allocated again"
    again.close()


def test_a_preallocated_image_that_finds_no_room_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallocate = system_calls.fallocate

    def full(descriptor: int, mode: int, offset: int, length: int, name: str) -> None:
        if mode == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        fallocate(descriptor, mode, offset, length, name)

    monkeypatch.setattr(system_calls, "fallocate", full)
    with pytest.raises(OSError, match="no room to preallocate 16777216 bytes") as refused:
        TempImage.create_named(directory / "temp", 1 << 24, preallocate=True)
    assert refused.value.errno == errno.ENOSPC
    assert list(directory.iterdir()) == []


async def test_the_first_question_for_room_starts_no_thread(directory: Path) -> None:
    temp = TempImage.create(directory, "vda@nightly", 1 << 24)
    before = threading.active_count()
    free, total = await temp.room()
    assert 0 < free <= total
    assert threading.active_count() == before
    await temp.room()
    assert threading.active_count() == before + 1
    temp.close()
    await temp.wait_closed()


def test_a_preallocated_image_s_room_is_what_it_left(tmp_path: Path) -> None:
    async def room(**options: bool) -> int:
        temp = TempImage.create(tmp_path, "temp", 1 << 26, **options)
        free, _ = await temp.room()
        temp.close()
        await temp.wait_closed()
        return free

    assert asyncio.run(room(preallocate=True)) < asyncio.run(room()) - (1 << 25)
