"""TRIM while a copy is in flight, or while somebody else ends the session."""

from __future__ import annotations

import asyncio
import errno

import pytest

from tests.simulation.loop import settle

from ..scene import CLUSTER, Scene, errno_of, simulated, trim

NEW = b"\x77" * CLUSTER


@simulated
async def test_trim_lets_a_waiting_guest_write_go_before_the_temp_write_has_ended() -> None:
    scene = Scene()
    fleece = await scene.arm()
    fleece.temp.gate("write")
    write = scene.write(2)
    copying = await fleece.temp.reached("write")
    release = trim(fleece, 2)
    await settle()
    assert write.done()
    assert scene.now(2) == NEW
    assert not release.done()
    assert not copying.ended
    copying.go()
    await release
    assert not fleece.temp.holds(2 * CLUSTER, CLUSTER)
    assert not fleece.done.any(2 * CLUSTER, CLUSTER)
    assert not fleece.copy.any(2 * CLUSTER, CLUSTER)
    assert not fleece.access.any(2 * CLUSTER, CLUSTER)


@simulated
async def test_trim_while_a_copy_reads_replies_at_once_and_nothing_is_written() -> None:
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("read")
    write = scene.write(2)
    reading = await scene.active.reached("read")
    await trim(fleece, 2)
    await settle()
    assert write.done()
    reading.go()
    await settle()
    assert fleece.temp.log == []
    assert not fleece.state.copies


@simulated
async def test_trim_in_the_middle_of_a_copy_of_1_mib_cancels_that_part_alone() -> None:
    scene = Scene(256)
    fleece = await scene.arm()
    fleece.temp.gate("write")
    wide = scene.write(0, 256)
    copying = await fleece.temp.reached("write")
    assert copying.length == 1 << 20
    inside, outside = scene.write(105, fill=0x11), scene.write(7, fill=0x22)
    release = trim(fleece, 100, 10)
    await settle()
    assert inside.done()
    assert not outside.done()
    assert not wide.done()
    copying.go()
    await asyncio.gather(wide, outside, release)
    assert not fleece.temp.holds(100 * CLUSTER, 10 * CLUSTER)
    assert await fleece.read(0, 100 * CLUSTER) == scene.old(0, 100)
    assert await fleece.read(110 * CLUSTER, 146 * CLUSTER) == scene.old(110, 146)
    assert fleece.done.bits.count(1) == 246


@simulated
async def test_a_copy_leaves_out_what_lost_access_before_its_temp_write() -> None:
    scene = Scene(256)
    fleece = await scene.arm()
    scene.active.gate("read")
    write = scene.write(0, 256)
    reading = await scene.active.reached("read")
    await trim(fleece, 100, 10)
    reading.go()
    await write
    assert fleece.temp.log == [
        f"write 0+{100 * CLUSTER}",
        f"write {110 * CLUSTER}+{146 * CLUSTER}",
    ]


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_copy_that_fails_after_trim_harms_neither_the_guest_nor_the_session(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm(on_cbw_error=policy)
        fleece.temp.gate("write")
        write = scene.write(2)
        copying = await fleece.temp.reached("write")
        release = trim(fleece, 2)
        copying.fail()
        await asyncio.gather(write, release)
        assert fleece.broken is None
        assert not fleece.copy.any(2 * CLUSTER, CLUSTER)
        assert not fleece.temp.holds(2 * CLUSTER, CLUSTER)

    run()


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_temp_write_that_fails_on_released_clusters_does_not_fail_its_copy(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        # Data, zeroes, data: a copy of three runs.
        scene.active.content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        fleece = await scene.arm(on_cbw_error=policy)
        fleece.temp.gate("write")
        write = scene.write(0, 3)
        first_run = await fleece.temp.reached("write")
        assert first_run.length == CLUSTER
        release = trim(fleece, 0)
        first_run.fail()
        second_run = await fleece.temp.reached("write")
        second_run.go()
        await asyncio.gather(write, release)
        assert fleece.broken is None
        assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)

    run()


@simulated
async def test_a_second_trim_of_a_range_waits_for_what_the_first_waits_for() -> None:
    scene = Scene()
    fleece = await scene.arm()
    fleece.temp.gate("write")
    write = scene.write(2)
    copying = await fleece.temp.reached("write")
    first, second = trim(fleece, 2), trim(fleece, 2)
    await settle()
    assert write.done()
    assert not first.done()
    assert not second.done()
    copying.go()
    await asyncio.gather(first, second)
    assert not fleece.temp.holds(2 * CLUSTER, CLUSTER)


@simulated
async def test_a_trim_frees_the_space_even_if_its_client_has_gone() -> None:
    scene = Scene()
    fleece = await scene.arm()
    fleece.temp.gate("write")
    write = scene.write(2)
    copying = await fleece.temp.reached("write")
    release = trim(fleece, 2)
    await settle()
    release.cancel()
    copying.go()
    await write
    await settle()
    assert release.cancelled()
    assert fleece.temp.used_bytes() == 0


@simulated
async def test_a_punch_that_fails_is_eio_and_the_next_trim_tries_again() -> None:
    scene = Scene()
    fleece = await scene.arm()
    await scene.write(2)
    fleece.temp.gate("trim")
    release = trim(fleece, 2)
    (await fleece.temp.reached("trim")).fail()
    with pytest.raises(OSError, match="could not be freed") as caught:
        await release
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="released") as caught:
        await fleece.read(2 * CLUSTER, CLUSTER)
    assert caught.value.errno == errno.EINVAL
    fleece.temp.open("trim")
    await fleece.trim(2 * CLUSTER, CLUSTER)
    assert fleece.temp.used_bytes() == 0


@pytest.mark.parametrize(("end", "expected"), [("break", errno.EIO), ("finish", errno.ESHUTDOWN)])
@pytest.mark.parametrize("gate", ["write", "trim"])
def test_a_trim_that_an_end_overtakes_gets_its_error_at_once(
    gate: str, end: str, expected: int
) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm()
        await scene.write(2)
        fleece.temp.gate(gate)
        write = scene.write(3)
        if gate == "write":
            await fleece.temp.reached(gate)
        release = trim(fleece, 2, 2)
        call = await fleece.temp.reached(gate)
        if end == "break":
            fleece.state.break_session("the test says so")
        else:
            fleece.finish()
        await settle()
        assert release.done()
        assert not call.ended
        assert await errno_of(release) == expected
        await write
        assert fleece.temp.closed
        call.go()

    run()
