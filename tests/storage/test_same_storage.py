"""Two ways into the same storage are told from two storages that are alike."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fleecenbd.storage import same_storage
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.same_storage import SIZE_APART, Likeness, is_temp, likeness

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


class _Unwritten(MemoryDevice):
    """It is looked at only."""

    async def pwrite(self, offset: int, data: object) -> None:
        raise AssertionError("it is written to")

    async def zero(self, offset: int, length: int, **_how: object) -> None:
        raise AssertionError("it is written to")


@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_the_same_is_found_and_left_as_it_was(content: bytes) -> None:
    device = await _device(content)
    assert await _beside_temp(device, device)
    assert await device.pread(0, SIZE) == content


@pytest.mark.parametrize("content", [bytes(SIZE), os.urandom(SIZE)], ids=["empty", "full"])
async def test_a_copy_is_not_the_same(content: bytes) -> None:
    new, used = await _device(content), await _device(content)
    assert not await _beside_temp(new, used)
    assert await new.pread(0, SIZE) == await used.pread(0, SIZE) == content


async def test_what_is_new_beside_a_temp_image_is_not_written_to() -> None:
    assert not await _beside_temp(_Unwritten(SIZE), await _device(bytes(SIZE)))


async def test_what_differs_is_not_written_to() -> None:
    new, used = _Unwritten(SIZE), _Unwritten(SIZE)
    await MemoryDevice.pwrite(used, 0, os.urandom(SIZE))
    assert not await _beside_temp(new, used)


async def test_what_fails_in_between_leaves_no_mark() -> None:
    class Fails(MemoryDevice):
        reads = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.reads += 1
            if self.reads > 4:
                raise OSError(5, "a test")
            return bytearray(length)

    temp = await _device(bytes(SIZE))
    with pytest.raises(OSError, match="a test"):
        await _beside_temp(Fails(SIZE), temp)
    assert await temp.pread(0, SIZE) == bytes(SIZE)


async def test_what_is_smaller_than_a_look_is_not_looked_at() -> None:
    tiny = MemoryDevice(512)
    assert not await _beside_temp(tiny, tiny)


async def test_where_the_one_in_use_has_data_is_looked_at_first() -> None:
    """An empty temp image beside a disk that is nearly empty: no mark is written."""
    size = 1 << 30
    used = _Unwritten(size)
    for offset in range(8 << 20, size, 48 << 20):
        await MemoryDevice.pwrite(used, offset, b"x" * 4096)
    for _ in range(20):
        assert not await _beside_temp(_Unwritten(size), used)


async def test_a_place_that_is_written_to_between_two_looks_is_looked_at_again() -> None:
    class Busy(MemoryDevice):
        looked = 0

        async def pread(self, offset: int, length: int) -> bytearray:  # type: ignore[override]
            self.looked += 1
            if self.looked == 2:
                await self.pwrite(offset, b"!" * length)
            return await super().pread(offset, length)  # type: ignore[return-value]

    device = Busy(SIZE)
    assert await _beside_temp(device, device)
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


async def _unwritten(content: bytes) -> _Unwritten:
    device = _Unwritten(len(content))
    await MemoryDevice.pwrite(device, 0, content)
    return device


@pytest.mark.parametrize(
    ("new", "disk", "found"),
    [
        (b"", b"", Likeness.EMPTY),
        (b"", b"d" * SIZE, Likeness.APART),
        (b"n" * SIZE, b"", Likeness.APART),
        (b"n" * SIZE, b"d" * SIZE, Likeness.APART),
        (b"d" * SIZE, b"d" * SIZE, Likeness.SAME),
    ],
)
async def test_a_disk_is_told_without_a_mark(new: bytes, disk: bytes, found: Likeness) -> None:
    one, other = await _unwritten(new.ljust(SIZE, b"\0")), await _unwritten(disk.ljust(SIZE, b"\0"))
    assert await likeness(one, SIZE, other) is found
    for size in (SIZE - SIZE_APART, SIZE + SIZE_APART):
        known = found if found is Likeness.SAME else Likeness.APART
        assert await likeness(one, size, other) is known
    assert await likeness(other, SIZE, other) in (Likeness.EMPTY, Likeness.SAME)


async def test_where_there_is_little_data_it_is_found() -> None:
    size = 8 << 30
    disk, new = _Unwritten(size), _Unwritten(size)
    await MemoryDevice.pwrite(disk, 5 << 30, b"x" * 4096)
    for _ in range(20):
        assert await likeness(new, size, disk) is Likeness.APART


async def test_a_comparison_that_is_not_answered_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hung(MemoryDevice):
        async def pread(self, offset: int, length: int) -> bytearray:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(same_storage, "ANSWER_S", 0.05)
    with pytest.raises(OSError, match="does not answer"):
        await likeness(Hung(SIZE), SIZE, MemoryDevice(SIZE))
