"""Reads and block status against TRIM, guests and the session's end."""

from __future__ import annotations

import asyncio
import errno

import pytest

from fleecenbd.engine.extents import STATUS_WINDOW
from fleecenbd.storage.device import EXTENT_ZERO
from tests.simulation.loop import settle

from ..scene import CLUSTER, Scene, errno_of, read, simulated, trim

NEW = b"\x77" * CLUSTER


@simulated
async def test_trim_during_a_frozen_read_lets_the_guest_go_and_the_read_gets_einval() -> None:
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("read", where=lambda offset, length: length == 2 * CLUSTER)
    reading = read(fleece, 2, 2)
    call = await scene.active.reached("read")
    write = scene.write(3)
    await settle()
    assert not write.done()
    await trim(fleece, 3)
    await settle()
    assert write.done()
    call.go()
    assert await errno_of(reading) == errno.EINVAL


@simulated
async def test_a_read_that_lost_a_part_holds_up_nobody_on_its_other_parts() -> None:
    scene = Scene()
    fleece = await scene.arm(cbw_timeout_s=0)
    scene.active.gate("read", where=lambda offset, length: length == 4 * CLUSTER)
    reading = read(fleece, 0, 4)
    call = await scene.active.reached("read")
    write = scene.write(3)
    await settle()
    assert not write.done()
    await trim(fleece, 0)
    await settle()
    assert write.done()
    call.go()
    assert await errno_of(reading) == errno.EINVAL


@simulated
async def test_a_guest_write_waits_for_a_frozen_read_and_the_read_is_of_arming() -> None:
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("read", where=lambda offset, length: length == 2 * CLUSTER)
    reading = read(fleece, 2, 2)
    call = await scene.active.reached("read")
    write = scene.write(3)
    await settle()
    assert fleece.done.all(3 * CLUSTER, CLUSTER)
    assert scene.now(3) == scene.old(3)
    call.go()
    assert await reading == scene.old(2, 2)
    await write
    assert scene.now(3) == NEW


@simulated
async def test_a_read_that_comes_while_a_guest_waits_for_a_frozen_one_reads_the_temp_image() -> (
    None
):
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("read", where=lambda offset, length: length == 2 * CLUSTER)
    reading = read(fleece, 2, 2)
    call = await scene.active.reached("read")
    write = scene.write(3)
    await settle()
    assert await fleece.read(3 * CLUSTER, CLUSTER) == scene.old(3)
    assert not write.done()
    call.go()
    await asyncio.gather(reading, write)


@simulated
async def test_trim_waits_for_a_temp_read_and_the_read_gets_einval() -> None:
    scene = Scene()
    fleece = await scene.arm()
    await scene.write(2)
    fleece.temp.gate("read")
    reading = read(fleece, 2)
    call = await fleece.temp.reached("read")
    release = trim(fleece, 2)
    await settle()
    assert not release.done()
    call.go()
    await release
    assert await errno_of(reading) == errno.EINVAL


@simulated
async def test_a_read_of_two_runs_fails_when_the_first_is_released_during_the_second() -> None:
    scene = Scene()
    fleece = await scene.arm()
    await scene.write(2)
    scene.active.gate("read")
    reading = read(fleece, 2, 2)
    call = await scene.active.reached("read")
    await trim(fleece, 2)
    call.go()
    assert await errno_of(reading) == errno.EINVAL


@simulated
async def test_block_status_is_frozen_until_its_answer_is_there() -> None:
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("extents")
    asking = asyncio.ensure_future(fleece.status(0, scene.size))
    call = await scene.active.reached("extents")
    zeroing = asyncio.ensure_future(scene.disk.write_zeroes(2 * CLUSTER, CLUSTER))
    await settle()
    assert not zeroing.done()
    call.go()
    assert not any(flags & EXTENT_ZERO for _, flags in await asking)
    await zeroing
    assert scene.now(2) == bytes(CLUSTER)


@simulated
async def test_block_status_calls_data_what_was_released_while_it_asked() -> None:
    scene = Scene()
    scene.active.content[:] = bytes(scene.size)
    scene.active.space.clear()
    fleece = await scene.arm()
    scene.active.gate("extents")
    asking = asyncio.ensure_future(fleece.status(0, scene.size))
    call = await scene.active.reached("extents")
    await trim(fleece, 2)
    call.go()
    extents = await asking
    assert [length for length, _ in extents] == [2 * CLUSTER, CLUSTER, 5 * CLUSTER]
    assert [bool(flags & EXTENT_ZERO) for _, flags in extents] == [True, False, True]


@simulated
async def test_block_status_calls_data_what_was_released_while_a_later_window_was_asked() -> None:
    scene = Scene(size=STATUS_WINDOW + 8 * CLUSTER)
    scene.active.content[:] = bytes(scene.size)
    scene.active.space.clear()
    fleece = await scene.arm()
    scene.active.gate("extents", where=lambda offset, length: offset == STATUS_WINDOW)
    asking = asyncio.ensure_future(fleece.status(0, scene.size))
    call = await scene.active.reached("extents")
    await trim(fleece, 2)
    call.go()
    extents = await asking
    assert [length for length, _ in extents] == [2 * CLUSTER, CLUSTER, scene.size - 3 * CLUSTER]
    assert [bool(flags & EXTENT_ZERO) for _, flags in extents] == [True, False, True]


@pytest.mark.parametrize(("end", "expected"), [("break", errno.EIO), ("finish", errno.ESHUTDOWN)])
def test_a_block_status_whose_session_ends_between_its_last_window_and_the_reply_fails(
    end: str, expected: int
) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm()
        scene.active.gate("extents")
        asking = asyncio.ensure_future(fleece.status(0, scene.size))
        (await scene.active.reached("extents")).go()
        await asyncio.sleep(0)
        # The device has answered and nothing is frozen any more: all of the range is known, and
        # the request waits for its next turn.
        assert not fleece.state.frozen_reads
        assert not asking.done()
        if end == "break":
            fleece.state.break_session("the test says so")
        else:
            fleece.finish()
        assert await errno_of(asking) == expected

    run()
