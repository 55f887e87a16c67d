"""MemoryDevice beyond what every device promises: the space it holds."""

from __future__ import annotations

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO
from fleecenbd.storage.memory import PAGE_SIZE, MemoryDevice

HOLE = EXTENT_HOLE | EXTENT_ZERO


async def test_only_written_pages_hold_space() -> None:
    device = MemoryDevice(1 << 40)
    assert device.used_bytes == 0
    assert device.pread_now(1 << 39, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)
    assert device.used_bytes == 0
    assert device.pwrite_now(PAGE_SIZE - 1, b"ab")
    assert device.used_bytes == 2 * PAGE_SIZE


async def test_trim_frees_whole_pages_and_zeroes_parts() -> None:
    device = MemoryDevice(16 * PAGE_SIZE)
    device.pwrite_now(0, b"\xff" * 16 * PAGE_SIZE)
    await device.trim(100, 3 * PAGE_SIZE)
    assert device.used_bytes == 14 * PAGE_SIZE
    assert device.pread_now(0, PAGE_SIZE) == b"\xff" * 100 + bytes(PAGE_SIZE - 100)


async def test_the_last_part_of_a_page_is_freed_too() -> None:
    device = MemoryDevice(PAGE_SIZE + 512)
    device.pwrite_now(0, b"\xff" * (PAGE_SIZE + 512))
    await device.trim(PAGE_SIZE, 512)
    assert device.used_bytes == PAGE_SIZE


async def test_zeroing_without_trimming_keeps_the_space() -> None:
    device = MemoryDevice(4 * PAGE_SIZE)
    device.pwrite_now(0, b"\xff" * PAGE_SIZE)
    await device.zero(0, 2 * PAGE_SIZE, may_trim=False)
    assert device.used_bytes == 2 * PAGE_SIZE
    await device.zero(0, 2 * PAGE_SIZE)
    assert device.used_bytes == 0


async def test_extents_are_merged_and_clipped() -> None:
    device = MemoryDevice(1 << 40)
    device.pwrite_now(PAGE_SIZE, bytes(3 * PAGE_SIZE))
    assert await device.extents(0, 1 << 40) == [
        (PAGE_SIZE, HOLE),
        (3 * PAGE_SIZE, 0),
        ((1 << 40) - 4 * PAGE_SIZE, HOLE),
    ]
    assert await device.extents(PAGE_SIZE + 10, 20) == [(20, 0)]
    assert await device.extents(5 * PAGE_SIZE, 20) == [(20, HOLE)]


async def test_a_device_that_answers_later_is_read_later() -> None:
    device = MemoryDevice(PAGE_SIZE, now=False)
    assert device.pread_now(0, 1) is None
    assert not device.pwrite_now(0, b"x")
    await device.pwrite(0, b"x")
    assert await device.pread(0, 2) == b"x\0"


async def test_closing_gives_the_memory_back() -> None:
    device = MemoryDevice(PAGE_SIZE)
    device.pwrite_now(0, b"x")
    device.close()
    assert device.used_bytes == 0
