"""Clones on file systems that share blocks, and on those that don't."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from fleecenbd.storage import clones, system_calls
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.temp import TempImage
from tests.descriptors import open_descriptors
from tests.mounts import CAN_MOUNT, blocks, mounted

MIB = 1 << 20
SIZE = 4 * MIB

needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="needs root and loop devices")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@asynccontextmanager
async def opened(
    active: Path, temp: Path, content: bytes | None = None
) -> AsyncIterator[tuple[FileDevice, TempImage]]:
    """An active image in one folder, clean, and a temp image in another; no descriptor is left."""
    before = open_descriptors()
    content = os.urandom(SIZE) if content is None else content
    (active / "disk.raw").write_bytes(content)
    source = FileDevice.open(active / "disk.raw")
    await source.flush()
    target = TempImage.create_named(temp / "temp", SIZE)
    try:
        yield source, target
    finally:
        for device in (source, target):
            device.close()
            await device.wait_closed()
    assert open_descriptors().keys() <= before.keys()


@pytest.fixture
def without_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Clones that say that they were made, and make nothing: (offset, length)."""
    made: list[tuple[int, int]] = []

    def make(descriptor: int, source: int, offset: int, length: int, name: str) -> None:
        os.fstat(source)
        made.append((offset, length))

    monkeypatch.setattr(system_calls, "clone_range", make)
    monkeypatch.setattr(system_calls, "dirty_pages", lambda *arguments: 0)
    return made


@needs_mounts
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
async def test_a_clone_shares_blocks_until_the_disk_is_written(
    kind: str, tmp_path: Path, mount: ExitStack
) -> None:
    folder = mount.enter_context(mounted(kind, tmp_path))
    async with opened(folder, folder) as (source, target):
        old = await source.pread(0, SIZE)
        places = blocks(folder / "disk.raw")
        assert target.clones(source, MIB, MIB)
        assert await target.clone(source, MIB, MIB)
        assert await target.pread(0, SIZE) == bytes(MIB) + old[MIB : 2 * MIB] + bytes(2 * MIB)
        assert target.used_bytes() == MIB
        await source.pwrite(MIB, b"\x77" * MIB)
        await source.flush()
        assert await target.pread(MIB, MIB) == old[MIB : 2 * MIB]
        await target.flush()
        middle = range(MIB // 4096, 2 * MIB // 4096)
        kept = blocks(folder / "temp")
        assert kept == {block: places[block] for block in middle}
        now = blocks(folder / "disk.raw")
        assert not {now[block] for block in middle} & set(kept.values())
        await target.trim(0, SIZE)
        assert target.used_bytes() == 0


@needs_mounts
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
async def test_a_range_that_the_disk_has_yet_to_get_is_not_worth_a_clone(
    kind: str, tmp_path: Path, mount: ExitStack
) -> None:
    folder = mount.enter_context(mounted(kind, tmp_path))
    async with opened(folder, folder) as (source, target):
        assert source.pwrite_now(MIB + 8192, b"\x77" * 4096)
        assert not target.clones(source, MIB, MIB)
        assert target.clones(source, 2 * MIB, MIB)
        await source.flush()
        assert target.clones(source, MIB, MIB)


@needs_mounts
@pytest.mark.parametrize("kind", ["ext4", "xfs without reflink", "xfs", "btrfs"])
async def test_where_no_blocks_are_shared_that_is_found_out_once(
    kind: str, tmp_path: Path, mount: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two file systems of a kind that shares, too."""
    active = mount.enter_context(mounted(kind, tmp_path))
    shares = kind in ("xfs", "btrfs")
    temp = mount.enter_context(mounted(kind, tmp_path, "other")) if shares else active
    async with opened(active, temp) as (source, target):
        assert target.clones(source, 0, MIB)
        assert not await target.clone(source, 0, MIB)
        assert target.used_bytes() == 0
        monkeypatch.setattr(system_calls, "clone_range", None)
        assert not target.clones(source, 0, MIB)
        assert not await target.clone(source, 0, MIB)


@pytest.mark.parametrize(
    "error", ["ENOTSUP", "EXDEV", "EINVAL", "ENOTTY", "ENOSYS", "EPERM"], ids=str
)
async def test_a_refusal_is_for_good(
    error: str,
    tmp_path: Path,
    without_calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(getattr(errno, error), "refused")

    async with opened(tmp_path, tmp_path) as (source, target):
        with monkeypatch.context() as patch:
            patch.setattr(system_calls, "clone_range", refuse)
            assert target.clones(source, 0, MIB)
            assert not await target.clone(source, 0, MIB)
        assert not target.clones(source, 0, MIB)
        assert not await target.clone(source, 0, MIB)
    assert without_calls == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_a_clone_that_fails_is_an_error_and_the_next_one_may_be_made(
    error: int,
    tmp_path: Path,
    without_calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(error, "failed")

    async with opened(tmp_path, tmp_path) as (source, target):
        with monkeypatch.context() as patch:
            patch.setattr(system_calls, "clone_range", fail)
            with pytest.raises(OSError, match="failed") as caught:
                await target.clone(source, 0, MIB)
        assert caught.value.errno == error
        assert target.clones(source, 0, MIB)
        assert await target.clone(source, 0, MIB)
    assert without_calls == [(0, MIB)]


async def test_while_space_is_short_nothing_is_cloned(
    tmp_path: Path, without_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's write to shared blocks takes new ones, which must be there."""
    async with opened(tmp_path, tmp_path) as (source, target):
        with monkeypatch.context() as patch:
            patch.setattr(clones, "FREE_MIN", 1 << 60)
            assert not await target.clone(source, 0, MIB)
        held = target.used_bytes()
        room = os.statvfs(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(clones, "FREE_MIN", room.f_bavail * room.f_frsize - held - (64 << 20))
            assert await target.clone(source, 0, MIB)
        assert without_calls == [(0, MIB)]


async def test_room_is_needed_for_all_that_the_temp_image_holds(
    tmp_path: Path, without_calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, tmp_path) as (source, target):
        await target.pwrite(0, os.urandom(MIB))
        room = os.statvfs(tmp_path)

        def short(descriptor: int) -> os.statvfs_result:
            words = list(room)
            words[4] = (clones.FREE_MIN + MIB) // room.f_frsize - 1
            return os.statvfs_result(words)

        monkeypatch.setattr(os, "fstatvfs", short)
        assert not await target.clone(source, 0, MIB)
        await target.trim(0, MIB)
        assert await target.clone(source, 0, MIB)


async def test_a_kernel_that_tells_nothing_of_dirty_pages_gets_no_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def unknown(*arguments: object) -> int:
        nonlocal asked
        asked += 1
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(system_calls, "dirty_pages", unknown)
    async with opened(tmp_path, tmp_path) as (source, target):
        assert not target.clones(source, 0, MIB)
        assert not target.clones(source, 0, MIB)
        assert not await target.clone(source, 0, MIB)
    assert asked == 1


async def test_what_is_no_file_is_not_cloned(tmp_path: Path) -> None:
    async with opened(tmp_path, tmp_path) as (_, target):
        memory = MemoryDevice(SIZE)
        assert not target.clones(memory, 0, MIB)
        assert not await target.clone(memory, 0, MIB)


async def test_a_closed_image_is_neither_source_nor_target(
    tmp_path: Path, without_calls: list[tuple[int, int]]
) -> None:
    async with opened(tmp_path, tmp_path) as (source, target):
        source.close()
        with pytest.raises(OSError, match="closed"):
            await target.clone(source, 0, MIB)
    async with opened(tmp_path, tmp_path / "..") as (source, target):
        target.close()
        with pytest.raises(OSError, match="closed"):
            await target.clone(source, 0, MIB)
    (tmp_path / "../temp").unlink()
    assert without_calls == []


async def test_the_source_may_be_closed_while_a_clone_lasts(
    tmp_path: Path, without_calls: list[tuple[int, int]]
) -> None:
    async with opened(tmp_path, tmp_path) as (source, target):
        cloning = target.clone(source, 0, MIB).__await__()
        next(cloning)
        source.close()
        await source.wait_closed()
        target.close()
        await target.wait_closed()
        cloning.close()
    assert without_calls == [(0, MIB)]


@needs_mounts
def test_the_kernel_tells_how_many_pages_are_dirty(tmp_path: Path, mount: ExitStack) -> None:
    folder = mount.enter_context(mounted("xfs", tmp_path))
    with (folder / "file").open("wb") as file:
        file.write(os.urandom(MIB))
        os.fsync(file.fileno())
        assert system_calls.dirty_pages(file.fileno(), 0, MIB, "file") == 0
        os.pwrite(file.fileno(), b"\x77" * 8192, 8192)
        assert system_calls.dirty_pages(file.fileno(), 0, MIB, "file") >= 2
        os.fsync(file.fileno())
        assert system_calls.dirty_pages(file.fileno(), 0, MIB, "file") == 0
    with pytest.raises(OSError, match="file") as caught:
        system_calls.dirty_pages(-1, 0, MIB, "file")
    assert caught.value.errno == errno.EBADF
