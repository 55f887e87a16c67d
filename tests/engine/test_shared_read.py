"""A guest write that several sessions need is read once from the active image."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from fleecenbd.engine import block_copy
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, read, simulated, trim


def _reads(scene: Scene) -> list[str]:
    return [entry for entry in scene.active.log if entry.startswith("read")]


async def _armed(scene: Scene, count: int = 2, **options: Any) -> list[Fleece]:
    return [await scene.arm(f"s{number}", **options) for number in range(count)]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("now", [True, False])
def test_a_write_that_several_fleeces_need_is_read_once(count: int, now: bool) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleeces = await _armed(scene, count)
        scene.active.gate("write")
        if not now:
            scene.active.gate("read", "write")
        write = scene.write(1, 2)
        await settle()
        scene.active.open()
        await write
        assert _reads(scene) == [f"read {CLUSTER}+{2 * CLUSTER}"]
        for fleece in fleeces:
            assert await read(fleece, 1, 2) == scene.old(1, 2)
            assert str(fleece.done) == "01100000"

    run()


@simulated
async def test_a_write_in_one_step_is_read_once() -> None:
    scene = Scene()
    fleeces = await _armed(scene)
    assert scene.disk.write_now(CLUSTER, b"n" * CLUSTER)
    assert _reads(scene) == [f"read {CLUSTER}+{CLUSTER}"]
    assert scene.disk.write_now(0, b"n" * 3 * CLUSTER)
    assert _reads(scene)[1:] == [f"read 0+{CLUSTER}", f"read {2 * CLUSTER}+{CLUSTER}"]
    for fleece in fleeces:
        assert fleece.read_now(0, 3 * CLUSTER) == scene.old(0, 3)


@simulated
async def test_a_zeroing_in_pieces_is_read_once_piece_by_piece() -> None:
    scene = Scene()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleecenbd.engine.disk.PIECE_LENGTH_MAX", 2 * CLUSTER)
        await _armed(scene)
        await scene.disk.write_zeroes(0, 5 * CLUSTER)
    expected = [(0, 2), (2, 2), (4, 1)]
    assert _reads(scene) == [f"read {n * CLUSTER}+{c * CLUSTER}" for n, c in expected]


@simulated
async def test_a_fleece_that_was_armed_after_the_read_began_reads_by_itself() -> None:
    scene = Scene()
    first = await scene.arm("first")
    scene.active.gate("read")
    write = scene.write(1)
    call = await scene.active.reached("read")
    second = await scene.arm("second")
    call.go()
    later = await scene.active.reached("read", lambda offset, length: offset == CLUSTER)
    assert later is not call
    scene.active.open()
    await write
    assert _reads(scene) == [f"read {CLUSTER}+{CLUSTER}"] * 2
    for fleece in (first, second):
        assert await read(fleece, 1) == scene.old(1)


@simulated
async def test_a_fleece_that_needs_another_range_reads_it_by_itself() -> None:
    scene = Scene()
    first = await scene.arm("first")
    await scene.write(2)
    second = await scene.arm("second")
    scene.active.log.clear()
    held = scene.now(1, 2)
    await scene.write(1, 2, fill=0x33)
    assert sorted(_reads(scene)) == [f"read {CLUSTER}+{CLUSTER}", f"read {CLUSTER}+{2 * CLUSTER}"]
    assert await read(first, 1, 2) == scene.old(1, 2)
    assert await read(second, 1, 2) == held


@simulated
async def test_a_release_in_one_session_leaves_the_read_to_the_other() -> None:
    scene = Scene()
    first, second = await _armed(scene)
    scene.active.gate("read")
    write = scene.write(1)
    call = await scene.active.reached("read")
    await trim(first, 1)
    first.finish()
    await settle()
    assert not write.done()
    call.go()
    await write
    assert await read(second, 1) == scene.old(1)
    assert first.temp.log == []  # type: ignore[attr-defined]


@simulated
async def test_a_read_that_fails_has_failed_for_every_fleece() -> None:
    scene = Scene()
    bad = await scene.arm("bad")
    strict = await scene.arm("strict", on_cbw_error=BREAK_GUEST_WRITE)
    scene.active.gate("read")
    write = scene.write(1)
    (await scene.active.reached("read")).fail()
    scene.active.open()
    assert await errno_of(write) == errno.EIO
    assert scene.now(1) == scene.old(1)
    assert bad.broken is not None
    assert (strict.broken, str(strict.copy)) == (None, "1" * 8)


@simulated
async def test_a_guest_that_gives_up_leaves_the_shared_read_to_its_copies() -> None:
    scene = Scene()
    fleeces = await _armed(scene)
    scene.active.gate("read")
    write = scene.write(1)
    call = await scene.active.reached("read")
    write.cancel()
    await settle()
    call.go()
    await settle()
    assert [str(fleece.done) for fleece in fleeces] == ["01000000"] * 2
    assert len(_reads(scene)) == 1
    assert scene.now(1) == scene.old(1)


@simulated
async def test_a_copy_that_waits_for_a_slot_keeps_no_data_and_reads_by_itself() -> None:
    scene = Scene()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_copy, "COPIES_MAX", 1)
        slow, quick = await _armed(scene)
    slow.temp.gate("write")  # type: ignore[attr-defined]
    first = scene.write(0)
    await slow.temp.reached("write")  # type: ignore[attr-defined]
    second = scene.write(1)
    await settle()
    assert str(quick.done) == "11000000"
    assert _reads(scene) == [f"read 0+{CLUSTER}", f"read {CLUSTER}+{CLUSTER}"]
    (queued,) = [copy for copy in slow.state.copies if copy.first == 1]
    assert queued.shared is None
    slow.temp.open()  # type: ignore[attr-defined]
    await asyncio.gather(first, second)
    assert _reads(scene)[2:] == [f"read {CLUSTER}+{CLUSTER}"]
    assert await read(slow, 0, 2) == scene.old(0, 2)
