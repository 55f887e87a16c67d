"""One suite for every kind of device: what storage/device.py promises."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Buffer, Data, Device
from tests.storage.kinds import KINDS, SIZE, Open, opened


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def open_device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    with request.param(tmp_path) as opener:
        yield opener


@pytest.fixture
async def device(open_device: Open) -> AsyncIterator[Device]:
    device = await opened(open_device)
    yield device
    device.close()
    await device.wait_closed()


async def read(device: Device, offset: int, length: int) -> Buffer:
    """As callers do: now if that can be, else later."""
    data = device.pread_now(offset, length)
    return await device.pread(offset, length) if data is None else data


async def write(device: Device, offset: int, data: Data) -> None:
    if not device.pwrite_now(offset, data):
        await device.pwrite(offset, data)


async def test_a_new_device_reads_as_zeroes(device: Device) -> None:
    assert device.size == SIZE
    assert bytes(await read(device, 0, SIZE)) == bytes(SIZE)


@pytest.mark.parametrize("length", [1, 512, 4096, 4097, 65536, 300_000])
async def test_a_read_returns_a_buffer_of_exactly_its_length(device: Device, length: int) -> None:
    for offset in (0, 511, SIZE - length):
        for data in (await read(device, offset, length), await device.pread(offset, length)):
            assert isinstance(data, bytes | bytearray)
            assert len(data) == length


@pytest.mark.parametrize("length", [1, 512, 4097, 65536])
async def test_a_read_into_a_buffer_fills_it_and_nothing_beside_it(
    device: Device, length: int
) -> None:
    content = os.urandom(SIZE)
    await write(device, 0, content)
    for offset in (0, 511, SIZE - length):
        buffer = bytearray(b"#" * (length + 20))
        view = memoryview(buffer)[10 : 10 + length]
        read_now = device.pread_into_now(offset, view)
        assert read_now == (device.pread_now(offset, length) is not None)
        if read_now:
            assert view == content[offset : offset + length]
        assert (buffer[:10], buffer[-10:]) == (b"#" * 10, b"#" * 10)


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, SIZE - 5000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_what_was_written_is_read(device: Device, offset: int, kind: type) -> None:
    for content in (os.urandom(5000), bytes(5000)):
        await write(device, offset, kind(content))
        assert bytes(await read(device, offset, 5000)) == content
        assert bytes(await device.pread(offset, 5000)) == content


async def test_a_write_in_the_pool_is_read_inline_and_the_reverse(device: Device) -> None:
    await device.pwrite(8192, b"later" * 1000)
    assert bytes(await read(device, 8192, 5000)) == b"later" * 1000
    await write(device, 8192, b"now__" * 1000)
    assert bytes(await device.pread(8192, 5000)) == b"now__" * 1000


async def test_a_buffer_that_was_read_is_the_callers_own(device: Device) -> None:
    await write(device, 4096, b"old!" * 1024)
    first = await read(device, 4096, 4096)
    second = await device.pread(4096, 4096)
    await write(device, 4096, b"new!" * 1024)
    assert bytes(first) == bytes(second) == b"old!" * 1024


async def test_calls_at_the_same_time_all_end_right(device: Device) -> None:
    await asyncio.gather(*(device.pwrite(n * 4096, bytes([n + 1]) * 4096) for n in range(64)))
    pages = await asyncio.gather(*(device.pread(n * 4096, 4096) for n in range(64)))
    assert [bytes(page) for page in pages] == [bytes([n + 1]) * 4096 for n in range(64)]


@pytest.mark.parametrize("may_trim", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (0, 65536), (1, 10), (4000, 9000), (SIZE - 700, 700)]
)
async def test_zero_leaves_zeroes_there_and_nothing_else(
    device: Device, offset: int, length: int, may_trim: bool
) -> None:
    await write(device, 0, b"\xff" * SIZE)
    await device.zero(offset, length, may_trim=may_trim)
    expected = b"\xff" * offset + bytes(length) + b"\xff" * (SIZE - offset - length)
    assert bytes(await read(device, 0, SIZE)) == expected


async def test_a_fast_zero_zeroes_or_refuses_and_changes_nothing(device: Device) -> None:
    await write(device, 0, b"\xff" * SIZE)
    for offset, length in ((512, 100), (65536, 65536)):
        refusal = await asyncio.gather(
            device.zero(offset, length, may_trim=False, fast=True), return_exceptions=True
        )
        if refusal == [None]:
            expected = bytes(length)
        else:
            assert [error.errno for error in refusal] == [errno.ENOTSUP]
            expected = b"\xff" * length
        assert bytes(await read(device, offset, length)) == expected
        assert bytes(await read(device, 0, 512)) == b"\xff" * 512


async def test_a_trimmed_range_reads_as_zeroes_and_its_neighbours_as_before(
    device: Device,
) -> None:
    await write(device, 0, b"\xff" * SIZE)
    hole = device.hole_size
    await device.trim(2 * hole, 3 * hole)
    expected = b"\xff" * 2 * hole + bytes(3 * hole) + b"\xff" * (SIZE - 5 * hole)
    assert bytes(await read(device, 0, SIZE)) == expected


async def test_the_hole_size_is_a_power_of_two(device: Device) -> None:
    assert device.hole_size.bit_count() == 1


async def test_extents_cover_the_range_and_tell_no_lies(device: Device) -> None:
    await write(device, 200_000, os.urandom(100_000))
    await write(device, 500_000, os.urandom(10))
    content = bytes(await read(device, 0, SIZE))
    for offset, length in ((0, SIZE), (200_100, 50), (0, 100), (499_999, 12), (SIZE - 1, 1)):
        extents = await device.extents(offset, length)
        assert sum(count for count, _ in extents) == length
        position = offset
        for count, flags in extents:
            assert count > 0
            if flags & EXTENT_ZERO:
                assert content[position : position + count] == bytes(count)
            assert flags in (0, EXTENT_HOLE | EXTENT_ZERO, EXTENT_ZERO)
            position += count


async def test_flush_returns_after_writes(device: Device) -> None:
    await write(device, 0, b"durable")
    assert await asyncio.gather(device.flush(), device.flush()) == [None, None]


async def test_a_closed_device_refuses_every_call(device: Device) -> None:
    later = device.pread_now(0, 512) is None
    device.close()
    device.close()
    await device.wait_closed()
    if not later:
        with pytest.raises(OSError, match=r"closed|Bad file descriptor"):
            device.pread_now(0, 512)
        with pytest.raises(OSError, match=r"closed|Bad file descriptor"):
            device.pread_into_now(0, memoryview(bytearray(512)))
        with pytest.raises(OSError, match=r"closed|Bad file descriptor"):
            device.pwrite_now(0, bytes(4096))
    for call in (
        device.pread(0, 512),
        device.pwrite(0, b"late"),
        device.zero(0, 512),
        device.trim(0, 512),
        device.flush(),
        device.extents(0, 512),
    ):
        with pytest.raises(OSError, match="the device was closed"):
            await call


async def test_a_call_in_flight_when_the_device_is_closed_still_ends_right(
    open_device: Open,
) -> None:
    device = await opened(open_device)
    await write(device, 0, b"\xaa" * 65536)
    reading = asyncio.create_task(device.pread(0, 65536))
    await asyncio.sleep(0)  # the call is on its way
    device.close()
    assert bytes(await reading) == b"\xaa" * 65536
    await device.wait_closed()


RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 70_000)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "pwrite", "zero", "zero keep", "trim", "read"]), RANGES),
    min_size=1,
    max_size=12,
)


async def _follow(open_device: Open, steps: list[tuple[str, tuple[int, int]]]) -> None:
    device = await opened(open_device)
    model = bytearray(await read(device, 0, SIZE))
    for number, (call, (offset, length)) in enumerate(steps):
        content = bytes(length)
        if call == "read":
            assert await read(device, offset, length) == model[offset : offset + length]
            continue
        if call.endswith("write"):
            content = bytes([number + 1]) * length
            if call == "write":
                await write(device, offset, content)
            else:
                await device.pwrite(offset, content)
        elif call == "trim":
            await device.trim(offset, length)
            # What a device cannot free, all of it or parts of its blocks, it leaves as it was.
            now = await read(device, offset, length)
            before = model[offset : offset + length]
            assert all(byte in (0, was) for byte, was in zip(now, before, strict=True))
            content = bytes(now)
        else:
            await device.zero(offset, length, may_trim=call == "zero")
        model[offset : offset + length] = content
    assert await read(device, 0, SIZE) == model
    assert await device.pread(0, SIZE) == model
    device.close()
    await device.wait_closed()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_calls_leave_what_a_bytearray_would_hold(
    open_device: Open, steps: list[tuple[str, tuple[int, int]]]
) -> None:
    asyncio.run(_follow(open_device, steps))
