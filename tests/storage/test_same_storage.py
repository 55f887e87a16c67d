"""Two ways into the same storage are told from two storages that are alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fleecenbd.storage import same_storage
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.same_storage import is_same_storage

SIZE = 64 << 12


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    yield


async def _device(content: bytes) -> MemoryDevice:
    device = MemoryDevice(SIZE)
    await device.pwrite(0, content)
    return device


@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_the_same_is_found_and_left_as_it_was(content: bytes) -> None:
    device = await _device(content)
    assert await is_same_storage(device, device, _alone)
    assert await device.pread(0, SIZE) == content


@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_a_copy_is_not_the_same(content: bytes) -> None:
    one, other = await _device(content), await _device(content)
    assert not await is_same_storage(one, other, _alone)
    assert await one.pread(0, SIZE) == await other.pread(0, SIZE) == content


async def test_what_differs_is_not_written_to() -> None:
    class ReadOnly(MemoryDevice):
        async def pwrite(self, offset: int, data: object) -> None:
            raise AssertionError("it is looked at only")

    one, other = ReadOnly(SIZE), await _device(os.urandom(SIZE))
    assert not await is_same_storage(one, other, _alone)


async def test_what_fails_in_between_leaves_no_mark() -> None:
    class Fails(MemoryDevice):
        reads = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.reads += 1
            if self.reads > 4:
                raise OSError(5, "a test")
            return bytearray(length)

    one = await _device(bytes(SIZE))
    with pytest.raises(OSError, match="a test"):
        await is_same_storage(one, Fails(SIZE), _alone)
    assert await one.pread(0, SIZE) == bytes(SIZE)


async def test_what_is_smaller_than_a_look_is_not_looked_at() -> None:
    tiny = MemoryDevice(512)
    assert not await is_same_storage(tiny, tiny, _alone)


async def test_where_the_other_has_data_is_looked_at_first() -> None:
    """An empty temp image beside a disk that is nearly empty: no mark is written to it."""

    class ReadOnly(MemoryDevice):
        async def pwrite(self, offset: int, data: object) -> None:
            raise AssertionError("it is looked at only")

    size = 1 << 30
    disk = MemoryDevice(size)
    for offset in range(8 << 20, size, 48 << 20):
        await disk.pwrite(offset, b"x" * 4096)
    for _ in range(20):
        assert not await is_same_storage(ReadOnly(size), disk, _alone)


async def test_a_place_that_is_written_to_between_two_looks_is_looked_at_again() -> None:
    class Busy(MemoryDevice):
        looked = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.looked += 1
            if self.looked == 2:
                await self.pwrite(offset, b"!" * length)
            return await super().pread(offset, length)  # type: ignore[return-value]

    device = Busy(SIZE)
    assert await is_same_storage(device, device, _alone)
    assert device.looked > 2


class _Late(MemoryDevice):
    """Writes end when they are let to."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def pwrite(self, offset: int, data: object) -> None:
        async def write() -> None:
            self.begun.set()
            await self.may_end.wait()
            await MemoryDevice.pwrite(self, offset, data)  # type: ignore[arg-type]

        await asyncio.shield(asyncio.ensure_future(write()))


async def test_a_mark_that_is_late_is_removed_all_the_same() -> None:
    one = _Late(SIZE)
    looking = asyncio.ensure_future(is_same_storage(one, MemoryDevice(SIZE), _alone))
    await one.begun.wait()
    looking.cancel()
    await asyncio.sleep(0)
    one.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert await one.pread(0, SIZE) == bytes(SIZE)


async def test_a_mark_that_is_never_answered_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_storage, "RESTORE_S", 0.05)
    one = _Late(SIZE)
    looking = asyncio.ensure_future(is_same_storage(one, MemoryDevice(SIZE), _alone))
    await one.begun.wait()
    looking.cancel()
    with pytest.raises(OSError, match="may hold a mark"):
        await looking
    one.may_end.set()
