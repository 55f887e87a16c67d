"""Two ways into the same storage are told from two storages that are alike."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import pytest

from fleecenbd.storage import same_storage
from fleecenbd.storage.device import Data
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.same_storage import is_temp, which_disk

SIZE = 64 << 12


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    yield


async def _device(content: bytes) -> MemoryDevice:
    device = MemoryDevice(SIZE)
    await device.pwrite(0, content)
    return device


def _never_lost(why: str) -> None:
    raise AssertionError(why)


async def _beside_temp(new: MemoryDevice, temp: MemoryDevice) -> bool:
    return await is_temp(new, temp, _alone, _never_lost)


async def _beside_disk(new: MemoryDevice, disk: MemoryDevice) -> bool:
    return await which_disk(new, [disk], lambda _mark: _alone()) is disk


IsSame: TypeAlias = Callable[[MemoryDevice, MemoryDevice], Awaitable[bool]]
beside_both = pytest.mark.parametrize("is_same", [_beside_temp, _beside_disk])


class _Unwritten(MemoryDevice):
    """It is looked at only."""

    async def pwrite(self, offset: int, data: object) -> None:
        raise AssertionError("it is written to")

    async def zero(self, offset: int, length: int, **_how: object) -> None:
        raise AssertionError("it is written to")


@beside_both
@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_the_same_is_found_and_left_as_it_was(is_same: IsSame, content: bytes) -> None:
    device = await _device(content)
    assert await is_same(device, device)
    assert await device.pread(0, SIZE) == content


@beside_both
@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_a_copy_is_not_the_same(is_same: IsSame, content: bytes) -> None:
    new, used = await _device(content), await _device(content)
    assert not await is_same(new, used)
    assert await new.pread(0, SIZE) == await used.pread(0, SIZE) == content


async def test_a_disk_that_is_not_the_same_is_not_written_to() -> None:
    assert not await _beside_disk(await _device(bytes(SIZE)), _Unwritten(SIZE))


async def test_what_is_new_beside_a_temp_image_is_not_written_to() -> None:
    assert not await _beside_temp(_Unwritten(SIZE), await _device(bytes(SIZE)))


@beside_both
async def test_what_differs_is_not_written_to(is_same: IsSame) -> None:
    new, used = _Unwritten(SIZE), _Unwritten(SIZE)
    await MemoryDevice.pwrite(used, 0, os.urandom(SIZE))
    assert not await is_same(new, used)


async def test_what_fails_in_between_leaves_no_mark() -> None:
    class Fails(MemoryDevice):
        reads = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.reads += 1
            if self.reads > 4:
                raise OSError(5, "a test")
            return bytearray(length)

    for is_same, failing in ((_beside_temp, 0), (_beside_disk, 1)):
        pair = [await _device(bytes(SIZE)), await _device(bytes(SIZE))]
        pair[failing] = Fails(SIZE)
        with pytest.raises(OSError, match="a test"):
            await is_same(pair[0], pair[1])
        await _settled()
        assert await pair[1 - failing].pread(0, SIZE) == bytes(SIZE)


async def _settled() -> None:
    while same_storage._late:
        await asyncio.wait(set(same_storage._late))


@beside_both
async def test_what_is_smaller_than_a_look_is_not_looked_at(is_same: IsSame) -> None:
    tiny = MemoryDevice(512)
    assert not await is_same(tiny, tiny)


@beside_both
async def test_where_the_one_in_use_has_data_is_looked_at_first(is_same: IsSame) -> None:
    """An empty temp image beside a disk that is nearly empty: no mark is written."""
    size = 1 << 30
    used = _Unwritten(size)
    for offset in range(8 << 20, size, 48 << 20):
        await MemoryDevice.pwrite(used, offset, b"x" * 4096)
    for _ in range(20):
        assert not await is_same(_Unwritten(size), used)


@beside_both
async def test_a_place_that_is_written_to_between_two_looks_is_looked_at_again(
    is_same: IsSame,
) -> None:
    class Busy(MemoryDevice):
        looked = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.looked += 1
            if self.looked == 2:
                await self.pwrite(offset, b"!" * length)
            return await super().pread(offset, length)  # type: ignore[return-value]

    device = Busy(SIZE)
    assert await is_same(device, device)
    assert device.looked > 2


class _Late(MemoryDevice):
    """Writes end when they are let to."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.fails = False

    async def pwrite(self, offset: int, data: object) -> None:
        async def write() -> None:
            self.begun.set()
            await self.may_end.wait()
            await MemoryDevice.pwrite(self, offset, data)  # type: ignore[arg-type]
            if self.fails:
                raise OSError(errno.ECONNRESET, "the connection is lost")

        await asyncio.shield(asyncio.ensure_future(write()))


@pytest.mark.parametrize("way", ["cancelled", "too late"])
async def test_a_late_mark_in_a_temp_image_is_removed_before_others_use_it(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_storage, "ANSWER_S", 0.05)
    temp, alone = _Late(SIZE), asyncio.Lock()

    @asynccontextmanager
    async def locked() -> AsyncIterator[None]:
        async with alone:
            yield

    looking = asyncio.ensure_future(is_temp(MemoryDevice(SIZE), temp, locked, _never_lost))
    await temp.begun.wait()
    if way == "cancelled":
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
    else:
        with pytest.raises(OSError, match="does not answer"):
            await looking
    await asyncio.sleep(0)
    assert alone.locked()
    temp.may_end.set()
    async with alone:
        assert await temp.pread(0, SIZE) == bytes(SIZE)


async def test_a_temp_image_whose_mark_stays_is_lost() -> None:
    class Stuck(MemoryDevice):
        async def zero(self, offset: int, length: int, **_how: object) -> None:
            raise OSError(errno.EIO, "a test")

    why: list[str] = []
    with pytest.raises(OSError, match="a test"):
        await is_temp(MemoryDevice(SIZE), Stuck(SIZE), _alone, why.append)
    assert len(why) == 1
    assert "may not be what they were: a test" in why[0]


class _OtherWay:
    """To a disk, as another server has it: slow, or lost once it has written."""

    def __init__(self, disk: MemoryDevice) -> None:
        self.name = "other way"
        self.size = disk.size
        self.pread, self.zero, self.extents = disk.pread, disk.zero, disk.extents
        self.disk = disk
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.is_lost = False

    async def pwrite(self, offset: int, data: Data) -> None:
        self.begun.set()
        await self.may_end.wait()
        await self.disk.pwrite(offset, data)
        if self.is_lost:
            self.zero = self.pwrite = self._lost  # type: ignore[method-assign, assignment]
            await self._lost()

    async def _lost(self, *_what: object) -> None:
        raise OSError(errno.ECONNRESET, "the connection is lost")


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("way", ["cancelled", "late", "at once"])
async def test_a_mark_in_a_disk_is_removed_by_its_own_way(
    way: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What guests wrote stays: none writes while the mark is there, or is put right."""
    monkeypatch.setattr(same_storage, "MARK_S", 0.05)
    disk = MemoryDevice(SIZE)
    other = _OtherWay(disk)
    other.is_lost = is_lost
    held: list[int] = []

    @asynccontextmanager
    async def hold(_mark: bytes) -> AsyncIterator[None]:
        held.append(1)
        try:
            yield
        finally:
            held.append(-1)

    looking = asyncio.ensure_future(which_disk(other, [disk], hold))
    await other.begun.wait()
    assert sum(held) == 1
    if way == "cancelled":
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
    elif way == "late":
        with pytest.raises(OSError, match="does not answer"):
            await looking
        assert sum(held) == 0, "guests wait no longer"
    other.may_end.set()
    if way == "at once" and is_lost:
        with pytest.raises(OSError, match="the connection is lost"):
            await looking
    elif way == "at once":
        assert await looking is disk
    await _settled()
    assert sum(held) == 0
    assert await disk.pread(0, SIZE) == bytes(SIZE)
