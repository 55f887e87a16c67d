"""Long copies share the active image's blocks where the temp image can, and read nothing then."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from fleecenbd.engine import copy_reads
from fleecenbd.engine.copy_reads import CLONE_LENGTH_MIN
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from tests.simulation.gated import GARBAGE, GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, read, simulated, trim

LONG = CLONE_LENGTH_MIN // CLUSTER
"""Clusters of the shortest run that is cloned."""
COUNT = 4 * LONG


def _temp(fleece: Fleece) -> GatedDevice:
    temp = fleece.temp
    assert isinstance(temp, GatedDevice)
    return temp


async def _scene(size: int = COUNT * CLUSTER, **options: Any) -> tuple[Scene, Fleece]:
    """A disk full of data, a session whose temp image clones, and no writes in one step."""
    scene = Scene(size=size)
    scene.active.gate("read", where=lambda offset, length: False)
    fleece = await scene.arm(**options)
    _temp(fleece).may_clone = True
    return scene, fleece


def _ours(log: list[str]) -> list[str]:
    return [entry for entry in log if not entry.startswith("write")]


async def _written(scene: Scene, first: int, count: int) -> None:
    """A guest's write, by a copy in a task."""
    scene.active.gate("write")
    writing = scene.write(first, count)
    (await scene.active.reached("write")).go()
    await writing


def _span(first: int, count: int) -> str:
    return f"{first * CLUSTER}+{count * CLUSTER}"


@simulated
async def test_a_long_copy_is_cloned_and_nothing_is_read() -> None:
    scene, fleece = await _scene()
    await _written(scene, 3, LONG + 1)
    assert _ours(scene.active.log) == [f"extents {_span(3, LONG + 1)}"]
    assert _temp(fleece).log == [f"clone {_span(3, LONG + 1)}"]
    assert await read(fleece, 0, COUNT) == scene.content
    assert scene.now(3, LONG + 1) == b"\x77" * ((LONG + 1) * CLUSTER)
    assert fleece.stats.cloned_bytes == fleece.stats.copied_bytes == (LONG + 1) * CLUSTER
    assert fleece.stats.temp_clusters == LONG + 1


@simulated
async def test_a_shorter_copy_is_read_and_written() -> None:
    scene, fleece = await _scene()
    await _written(scene, 3, LONG - 1)
    assert _ours(scene.active.log) == [f"read {_span(3, LONG - 1)}"]
    assert _temp(fleece).log == [f"write {_span(3, LONG - 1)}"]
    assert fleece.stats.cloned_bytes == 0


@simulated
async def test_a_copy_that_is_not_likely_to_be_cloned_asks_for_no_extents() -> None:
    scene, fleece = await _scene()
    _temp(fleece).may_clone = False
    fleece.block_copy._reads._expects_holes = False
    await _written(scene, 0, LONG + 1)
    assert _ours(scene.active.log) == [f"read {_span(0, LONG + 1)}"]


@simulated
async def test_holes_are_not_cloned_and_take_no_space() -> None:
    scene = Scene(size=COUNT * CLUSTER)
    data = scene.content[: LONG * CLUSTER] + bytes((COUNT - LONG) * CLUSTER)
    scene.active = GatedDevice("active", scene.size, data)
    scene.disk = Disk("vda", scene.active)
    fleece = await scene.arm()
    _temp(fleece).may_clone = True
    await _written(scene, 0, LONG + 4)
    assert _temp(fleece).log == [f"clone {_span(0, LONG)}"]
    assert fleece.stats.temp_clusters == LONG
    await _written(scene, 2 * LONG, 1)
    assert fleece.stats.temp_clusters == LONG
    assert await read(fleece, 0, COUNT) == data


@simulated
async def test_a_hole_is_asked_for_once() -> None:
    scene = Scene(size=COUNT * CLUSTER)
    scene.active = GatedDevice("active", scene.size)
    scene.disk = Disk("vda", scene.active)
    fleece = await scene.arm()
    _temp(fleece).may_clone = True
    await _written(scene, 0, LONG + 1)
    assert _ours(scene.active.log) == [f"extents {_span(0, LONG + 1)}"]
    assert _temp(fleece).log == []
    assert await read(fleece, 0, COUNT) == bytes(COUNT * CLUSTER)


@simulated
async def test_short_runs_of_data_between_holes_are_read() -> None:
    scene = Scene(size=COUNT * CLUSTER)
    data = bytearray(scene.content)
    data[(LONG + 1) * CLUSTER : (LONG + 3) * CLUSTER] = bytes(2 * CLUSTER)
    scene.active = GatedDevice("active", scene.size, bytes(data))
    scene.disk = Disk("vda", scene.active)
    fleece = await scene.arm()
    _temp(fleece).may_clone = True
    await _written(scene, 0, LONG + 5)
    assert _ours(scene.active.log) == [
        f"extents {_span(0, LONG + 5)}",
        f"read {_span(LONG + 3, 2)}",
    ]
    assert _temp(fleece).log == [f"clone {_span(0, LONG + 1)}", f"write {_span(LONG + 3, 2)}"]
    assert await read(fleece, 0, COUNT) == data


@simulated
async def test_where_all_runs_of_data_are_short_the_whole_is_read() -> None:
    scene = Scene(size=COUNT * CLUSTER)
    data = bytearray(scene.content)
    data[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    scene.active = GatedDevice("active", scene.size, bytes(data))
    scene.disk = Disk("vda", scene.active)
    fleece = await scene.arm()
    _temp(fleece).may_clone = True
    await _written(scene, 0, LONG + 1)
    assert _ours(scene.active.log) == [
        f"extents {_span(0, LONG + 1)}",
        f"read {_span(0, LONG + 1)}",
    ]
    assert await read(fleece, 0, COUNT) == data


@pytest.mark.parametrize("part", [1, 513, CLUSTER - 1])
def test_the_last_partial_cluster_of_the_disk_is_read_and_written(part: int) -> None:
    @simulated
    async def run() -> None:
        scene, fleece = await _scene((LONG + 1) * CLUSTER + part)
        scene.active.gate("write")
        writing = asyncio.ensure_future(scene.disk.write(CLUSTER, b"\x77" * (scene.size - CLUSTER)))
        (await scene.active.reached("write")).go()
        await writing
        end = (LONG + 1) * CLUSTER
        assert _temp(fleece).log == [f"clone {_span(1, LONG)}", f"write {end}+{part}"]
        assert await fleece.read(0, scene.size) == scene.content

    run()


@simulated
async def test_a_refused_clone_is_read_and_written() -> None:
    scene, fleece = await _scene()
    _temp(fleece).refuses_clone = True
    await _written(scene, 0, LONG)
    assert _ours(scene.active.log) == [f"extents {_span(0, LONG)}", f"read {_span(0, LONG)}"]
    assert _temp(fleece).log == [f"write {_span(0, LONG)}"]
    assert await read(fleece, 0, COUNT) == scene.content
    assert fleece.stats.cloned_bytes == 0


@simulated
async def test_where_holes_cannot_be_told_all_is_read() -> None:
    scene, fleece = await _scene()
    fleece.block_copy._reads._expects_holes = False
    scene.active.gate("extents")
    writing = scene.write(0, LONG)
    (await scene.active.reached("extents")).fail(errno.EIO)
    await writing
    assert _temp(fleece).log == [f"write {_span(0, LONG)}"]
    assert await read(fleece, 0, COUNT) == scene.content


@simulated
async def test_what_was_released_before_the_clone_is_left_out() -> None:
    scene, fleece = await _scene()
    scene.active.gate("extents")
    writing = scene.write(0, 2 * LONG)
    asking = await scene.active.reached("extents")
    await trim(fleece, LONG, 2)
    asking.go()
    await writing
    rest = LONG - 2
    assert _temp(fleece).log == [f"clone {_span(0, LONG)}", f"clone {_span(LONG + 2, rest)}"]
    assert fleece.stats.temp_clusters == 2 * LONG - 2
    assert await read(fleece, 0, LONG) == scene.old(0, LONG)


@simulated
async def test_a_trim_lets_the_guest_go_and_waits_for_the_clone_itself() -> None:
    scene, fleece = await _scene()
    temp = _temp(fleece)
    temp.gate("clone")
    writing = scene.write(0, LONG)
    cloning = await temp.reached("clone")
    assert fleece.state.temp_writes.overlapping(0, 1)
    releasing = trim(fleece, 0, LONG)
    await writing
    await settle()
    assert not releasing.done()
    cloning.go()
    await releasing
    assert not temp.space
    assert fleece.stats.temp_clusters == 0


@pytest.mark.parametrize("policy", [BREAK_GUEST_WRITE, "break-snapshot"])
def test_a_clone_that_fails_is_a_copy_that_failed(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene, fleece = await _scene(on_cbw_error=policy)
        temp = _temp(fleece)
        temp.gate("clone")
        writing = scene.write(0, LONG)
        (await temp.reached("clone")).fail(errno.ENOSPC)
        if policy == BREAK_GUEST_WRITE:
            assert await errno_of(writing) == errno.EIO
            assert scene.now(0, LONG) == scene.old(0, LONG)
            assert fleece.state.charged.bits.count(1, 0, LONG) == LONG
            # What the failed one left is written over.
            assert temp.content[0] == GARBAGE
            temp.open()
            await _written(scene, 0, LONG)
            assert await read(fleece, 0, COUNT) == scene.content
        else:
            await writing
            assert "old data could not be copied" in (fleece.broken or "")

    run()


@simulated
async def test_a_clone_that_fails_on_released_clusters_fails_nobody() -> None:
    scene, fleece = await _scene()
    temp = _temp(fleece)
    temp.gate("clone")
    writing = scene.write(0, LONG)
    cloning = await temp.reached("clone")
    releasing = trim(fleece, 0, LONG)
    await writing
    cloning.fail(errno.EIO)
    await releasing
    assert fleece.broken is None


@simulated
async def test_a_clone_is_charged_before_it_is_made() -> None:
    scene, fleece = await _scene(temp_limit=(LONG - 1) * CLUSTER, on_cbw_error=BREAK_GUEST_WRITE)
    assert await errno_of(scene.write(0, LONG)) == errno.EIO
    assert _temp(fleece).log == []
    assert fleece.stats.limit_hits == 1


@pytest.mark.parametrize("refused", [False, True])
def test_of_two_sessions_one_may_clone_and_the_other_read(refused: bool) -> None:
    @simulated
    async def run() -> None:
        scene, first = await _scene()
        second = await scene.arm("other")
        _temp(first).refuses_clone = refused
        for fleece in (first, second):
            fleece.block_copy._reads._expects_holes = False
        await _written(scene, 0, LONG)
        asked = [entry.split()[0] for entry in _ours(scene.active.log)]
        assert sorted(asked) == ["extents", "read"] + ["read"] * refused
        for fleece in (first, second):
            assert await read(fleece, 0, COUNT) == scene.content
        assert first.stats.cloned_bytes == (0 if refused else LONG * CLUSTER)

    run()


@simulated
async def test_of_two_sessions_both_may_clone() -> None:
    scene, first = await _scene()
    second = await scene.arm("other")
    _temp(second).may_clone = True
    await _written(scene, 0, LONG)
    assert not any(entry.startswith("read") for entry in scene.active.log)
    for fleece in (first, second):
        assert await read(fleece, 0, COUNT) == scene.content
        assert fleece.stats.cloned_bytes == LONG * CLUSTER


def test_no_copy_in_one_step_is_as_long_as_a_clone_that_pays() -> None:
    """A copy in one step moves cached data faster than a thread is asked for a clone."""
    from fleecenbd.engine.block_copy import COPY_NOW_LENGTH_MAX

    assert copy_reads.CLONE_LENGTH_MIN >= COPY_NOW_LENGTH_MAX
