"""Several sessions of a disk, and arming among guest writes."""

from __future__ import annotations

import asyncio
import errno

import pytest

from tests.simulation.loop import settle

from ..scene import CLUSTER, Scene, errno_of, simulated, trim

NEW = b"\x77" * CLUSTER


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
async def test_arming_waits_for_an_active_write_whose_call_has_not_begun() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    write = scene.write(2)
    # The write starts in its first step and its call begins in a later one; the hold is between.
    arming = asyncio.ensure_future(scene.arm())
    call = await scene.active.reached("write")
    await settle()
    assert not arming.done()
    call.go()
    fleece = await arming
    await write
    assert await fleece.read(2 * CLUSTER, CLUSTER) == NEW


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


@simulated
async def test_armings_upon_each_other_hold_guests_no_longer_than_one_deadline() -> None:
    scene = Scene()
    scene.active.gate("write", where=lambda offset, length: offset == 2 * CLUSTER)
    before = scene.write(2)
    call = await scene.active.reached("write")
    loop = asyncio.get_running_loop()
    armings = [asyncio.ensure_future(scene.arm("one"))]
    await settle()
    after = scene.write(3)
    await asyncio.sleep(3)
    armings.append(asyncio.ensure_future(scene.arm("two")))
    await after
    assert loop.time() == pytest.approx(5), "from the first hold on"
    assert [await errno_of(arming) for arming in armings] == [errno.ETIMEDOUT] * 2
    # Now that guests have gone on, the next one has a deadline of its own.
    arming = asyncio.ensure_future(scene.arm("three"))
    await asyncio.sleep(3)
    call.go()
    assert (await arming).broken is None
    await before


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
