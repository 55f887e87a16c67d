"""Devices that hang: who waits, for how long, and what a late answer does."""

from __future__ import annotations

import asyncio
import errno

import pytest

from tests.simulation.loop import settle

from ..scene import CLUSTER, Scene, errno_of, read, simulated

NEW = b"\x77" * CLUSTER


@simulated
async def test_a_hung_temp_image_breaks_the_session_once_the_guests_time_is_up() -> None:
    scene = Scene()
    fleece = await scene.arm(cbw_timeout_s=20)
    loop = asyncio.get_running_loop()
    fleece.temp.gate("write")
    first = scene.write(2)
    await asyncio.sleep(5)
    second, third = scene.write(2, fill=1), scene.write(5)
    await first
    assert loop.time() == pytest.approx(20)
    await asyncio.gather(second, third)
    assert loop.time() == pytest.approx(20)
    assert fleece.broken is not None
    assert "20 s" in fleece.broken
    with pytest.raises(OSError, match="broken") as caught:
        await fleece.read(0, CLUSTER)
    assert caught.value.errno == errno.EIO
    fleece.temp.open("write")


@simulated
async def test_under_break_guest_write_each_guest_has_a_timer_of_its_own() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", cbw_timeout_s=20)
    loop = asyncio.get_running_loop()
    fleece.temp.gate("write")
    first = scene.write(2)
    await asyncio.sleep(5)
    second = scene.write(2)
    for write, moment in ((first, 20), (second, 25)):
        assert await errno_of(write) == errno.EIO
        assert loop.time() == pytest.approx(moment)
    assert scene.now(2) == scene.old(2)
    assert fleece.broken is None
    assert len(fleece.temp.log) == 1


@simulated
async def test_a_late_success_of_a_copy_that_timed_out_sets_done() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", cbw_timeout_s=20)
    fleece.temp.gate("write")
    write = scene.write(2)
    await asyncio.wait([write])
    assert not fleece.copy.any(2 * CLUSTER, CLUSTER)
    assert not fleece.done.any(2 * CLUSTER, CLUSTER)
    (await fleece.temp.reached("write")).go()
    await settle()
    assert fleece.done.all(2 * CLUSTER, CLUSTER)
    await scene.write(2)
    assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)
    assert write.exception() is not None


@simulated
async def test_a_late_failure_of_a_copy_that_timed_out_makes_it_dirty_again() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", cbw_timeout_s=20)
    fleece.temp.gate("write")
    write = scene.write(2)
    await asyncio.wait([write])
    (await fleece.temp.reached("write")).fail()
    await settle()
    assert fleece.copy.all(2 * CLUSTER, CLUSTER)
    fleece.temp.open("write")
    await scene.write(2)
    assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)
    assert write.exception() is not None


@simulated
async def test_finish_lets_everybody_go_and_a_late_temp_write_reaches_no_later_session() -> None:
    scene = Scene()
    first = await scene.arm("first", cbw_timeout_s=0)
    first.temp.gate("write")
    write = scene.write(2)
    late = await first.temp.reached("write")
    assert scene.session is not None
    scene.session.finish()
    await write
    assert first.temp.closed
    assert not late.ended
    second = await scene.arm("second")
    await scene.write(2, fill=0x55)
    late.go()
    await settle()
    assert await second.read(2 * CLUSTER, CLUSTER) == NEW
    await first.wait_closed()


@simulated
async def test_a_break_wakes_those_who_wait_for_other_clusters_and_for_frozen_reads() -> None:
    scene = Scene()
    fleece = await scene.arm(cbw_timeout_s=0)
    scene.active.gate("read", where=lambda offset, length: length == 2 * CLUSTER)
    reading = read(fleece, 6, 2)
    frozen = await scene.active.reached("read")
    behind_read = scene.write(7)
    fleece.temp.gate("write")
    writes = [scene.write(cluster) for cluster in range(4)]
    await fleece.temp.reached("write")
    await settle()
    assert not any(write.done() for write in (*writes, behind_read))
    fleece.state.break_session("the test says so")
    await settle()
    assert all(write.done() for write in (*writes, behind_read))
    frozen.go()
    assert await errno_of(reading) == errno.EIO


@simulated
async def test_a_read_whose_device_hangs_holds_a_guest_no_longer_than_its_timer() -> None:
    scene = Scene()
    fleece = await scene.arm(cbw_timeout_s=20)
    scene.active.gate("read", where=lambda offset, length: length == 2 * CLUSTER)
    reading = read(fleece, 2, 2)
    frozen = await scene.active.reached("read")
    await scene.write(3)
    assert asyncio.get_running_loop().time() == pytest.approx(20)
    assert fleece.broken is not None
    frozen.go()
    assert await errno_of(reading) == errno.EIO


@simulated
async def test_a_hung_temp_image_stalls_no_guest_of_another_session_for_long() -> None:
    scene = Scene(size=64 * CLUSTER)
    hung = await scene.arm("hung", cbw_timeout_s=2)
    good = await scene.arm("good")
    hung.temp.gate("write")
    writes = [scene.write(cluster, fill=cluster) for cluster in range(40)]
    await asyncio.gather(*writes)
    assert asyncio.get_running_loop().time() == pytest.approx(2)
    assert hung.broken is not None
    assert await good.read(0, 40 * CLUSTER) == scene.old(0, 40)
