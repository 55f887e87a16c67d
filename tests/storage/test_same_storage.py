"""Two ways into the same storage are told from two storages that are alike."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.same_storage import is_same_storage

SIZE = 64 << 12


@asynccontextmanager
async def _alone(offset: int, length: int) -> AsyncIterator[None]:
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
