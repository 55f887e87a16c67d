"""One order of events at a time, on devices whose calls wait until the test lets them go."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from fleecenbd.engine.extents import STATUS_WINDOW
from fleecenbd.engine.session import SessionOptions
from fleecenbd.storage.device import EXTENT_ZERO
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, read, simulated, trim

NEW = b"\x77" * CLUSTER


# TRIM while a copy is in flight


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


# TRIM, and guests, against reads


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


@simulated
async def test_a_cancelled_guest_write_is_in_flight_until_its_call_has_ended() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    writing = scene.write(2)
    call = await scene.active.reached("write")
    writing.cancel()
    await settle()
    assert writing.cancelled()
    arming = asyncio.ensure_future(scene.arm())
    await settle()
    assert not arming.done()
    call.go()
    fleece = await arming
    # The write ended before the moment of arming: it is in the snapshot, whole.
    assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.now(2)
    assert scene.now(2) != scene.old(2)


# a temp image that hangs


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


# several sessions, and arming


@simulated
async def test_a_trim_in_one_session_does_not_free_a_guest_that_another_holds() -> None:
    scene = Scene()
    one, two = await scene.arm("one"), await scene.arm("two")
    one.temp.gate("write")
    two.temp.gate("write")
    write = scene.write(2)
    copying = await two.temp.reached("write")
    release = trim(one, 2)
    await settle()
    assert not write.done()
    copying.go()
    await write
    one.temp.open("write")
    await release
    assert await two.read(2 * CLUSTER, CLUSTER) == scene.old(2)


@simulated
async def test_arming_does_not_wait_for_a_guest_that_another_session_holds() -> None:
    scene = Scene()
    slow = await scene.arm("slow", cbw_timeout_s=0)
    slow.temp.gate("write")
    parked = scene.write(2)
    copying = await slow.temp.reached("write")
    loop = asyncio.get_running_loop()
    began = loop.time()
    fresh = await scene.arm("fresh")
    assert loop.time() == began
    copying.go()
    await parked
    # The parked write came after the second session's moment: it went through that one too.
    assert await fresh.read(2 * CLUSTER, CLUSTER) == scene.old(2)
    assert scene.now(2) == NEW


@simulated
async def test_arming_waits_for_an_active_write_and_holds_those_that_come_after() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    before = scene.write(2)
    call = await scene.active.reached("write")
    arming = asyncio.ensure_future(scene.arm())
    await settle()
    after = scene.write(3)
    await settle()
    assert not arming.done()
    assert not after.done()
    assert not scene.disk.write_now(4 * CLUSTER, NEW)
    call.go()
    fleece = await arming
    await asyncio.gather(before, after)
    assert await fleece.read(2 * CLUSTER, 2 * CLUSTER) == NEW + scene.old(3)


@simulated
async def test_arming_gives_up_after_its_deadline_and_leaves_nothing_behind() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    before = scene.write(2)
    call = await scene.active.reached("write")
    arming = asyncio.ensure_future(scene.arm())
    await settle()
    after = scene.write(3)
    with pytest.raises(OSError, match="in flight") as caught:
        await arming
    assert caught.value.errno == errno.ETIMEDOUT
    assert asyncio.get_running_loop().time() == pytest.approx(5)
    await after
    assert scene.disk.fleeces == []
    call.go()
    await before


@simulated
async def test_two_armings_at_once_both_hold_and_both_let_go() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    before = scene.write(2)
    call = await scene.active.reached("write")
    armings = [asyncio.ensure_future(scene.arm(name)) for name in ("one", "two")]
    await settle()
    after = scene.write(3)
    call.go()
    for fleece in await asyncio.gather(*armings):
        assert await fleece.read(2 * CLUSTER, 2 * CLUSTER) == NEW + scene.old(3)
    await asyncio.gather(before, after)
    assert scene.now(3) == NEW


# failures, limits, parts


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_failed_copy_breaks_the_session_or_the_guests_write_never_both(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm(on_cbw_error=policy)
        fleece.temp.gate("write")
        write = scene.write(2)
        (await fleece.temp.reached("write")).fail(errno.ENOSPC)
        await asyncio.wait([write])
        error = write.exception()
        if policy == "break-snapshot":
            assert error is None
            assert fleece.broken is not None
            assert scene.now(2) == NEW
        else:
            assert isinstance(error, OSError)
            assert error.errno == errno.EIO
            assert fleece.broken is None
            assert scene.now(2) == scene.old(2)
            fleece.temp.open("write")
            await scene.write(2)
            assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)

    run()


@simulated
async def test_temp_limit_counts_a_set_of_clusters_and_a_retry_costs_nothing() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", temp_limit=2 * CLUSTER)
    fleece.temp.gate("write")
    write = scene.write(0, 2)
    (await fleece.temp.reached("write")).fail()
    await asyncio.wait([write])
    assert write.exception() is not None
    fleece.temp.open("write")
    refused = scene.write(5)
    await asyncio.wait([refused])
    assert refused.exception() is not None
    await scene.write(0, 2)
    assert fleece.temp.used_bytes() == 2 * CLUSTER
    await fleece.trim(0, CLUSTER)
    await scene.write(5)
    assert fleece.temp.used_bytes() == 2 * CLUSTER


@simulated
async def test_the_limit_is_not_given_back_before_the_punch_has_ended() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error="break-guest-write", temp_limit=CLUSTER)
    await scene.write(0)
    fleece.temp.gate("trim")
    release = trim(fleece, 0)
    punching = await fleece.temp.reached("trim")
    refused = scene.write(1)
    await asyncio.wait([refused])
    assert refused.exception() is not None
    punching.go()
    await release
    await scene.write(1)
    assert await fleece.read(CLUSTER, CLUSTER) == scene.old(1)


@simulated
async def test_parts_of_a_cluster_add_up_as_a_union() -> None:
    scene = Scene()
    fleece = await scene.arm()
    half = CLUSTER // 2
    await fleece.trim(2 * CLUSTER, half)
    await fleece.trim(2 * CLUSTER, half)
    assert await fleece.read(2 * CLUSTER, CLUSTER) == scene.old(2)
    await fleece.trim(2 * CLUSTER + half - 1, half + 1)
    assert await errno_of(fleece.read(2 * CLUSTER, CLUSTER)) == errno.EINVAL


@simulated
async def test_the_last_partial_cluster_is_released_by_what_covers_it_whole() -> None:
    scene = Scene(size=2 * CLUSTER + 512)
    fleece = await scene.arm()
    await scene.disk.write(2 * CLUSTER, b"x" * 512)
    await fleece.trim(2 * CLUSTER + 511, 1)
    assert await fleece.read(2 * CLUSTER, 512) == scene.content[2 * CLUSTER :]
    await fleece.trim(2 * CLUSTER, 512)
    assert not fleece.access.any(2 * CLUSTER, 512)
    assert fleece.temp.used_bytes() == 0


@simulated
async def test_a_guests_discard_leaves_alone_what_a_session_does_not_let_go() -> None:
    scene = Scene(64)
    fleece = await scene.arm(on_cbw_error="break-guest-write", cbw_timeout_s=1)
    scene.active.gate("read", where=lambda offset, length: length == 32 * CLUSTER)
    reading = read(fleece, 32, 32)
    frozen = await scene.active.reached("read")
    scene.active.gate("read", where=lambda offset, length: False)
    # All of it is copied; half of it is frozen for longer than a guest may wait.
    await scene.write(0, 32, fill=1)
    late = scene.write(32, 32, fill=2)
    await asyncio.wait([late])
    assert late.exception() is not None
    await scene.disk.trim(0, 64 * CLUSTER)
    assert scene.now(32, 32) == scene.old(32, 32)
    frozen.go()
    assert await reading == scene.old(32, 32)
    await scene.disk.trim(0, 64 * CLUSTER)
    assert scene.now(0, 64) == bytes(64 * CLUSTER)


@simulated
async def test_a_guests_discard_leaves_alone_what_would_have_to_be_copied() -> None:
    scene = Scene(64)
    fleece = await scene.arm()
    await scene.disk.trim(0, scene.size)
    assert scene.now(0, 64) == scene.content
    assert fleece.temp.log == []


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


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"on_cbw_error": "panic"},
        {"cbw_timeout_s": -1.0},
        {"temp_limit": -1},
        {"cluster_size": 5000},
    ):
        with pytest.raises(ValueError, match="not"):
            SessionOptions(**wrong)


@simulated
async def test_a_gated_device_tells_garbage_from_data() -> None:
    device = GatedDevice("d", 2 * CLUSTER, random.Random(1).randbytes(2 * CLUSTER))
    device.gate("write")
    write = asyncio.ensure_future(device.pwrite(0, NEW))
    (await device.reached("write")).fail(errno.ENOSPC)
    assert await errno_of(write) == errno.ENOSPC
    assert device.content[:CLUSTER] not in (NEW, bytes(CLUSTER))
