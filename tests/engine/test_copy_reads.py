"""Long copies ask whether there is anything to read, as long as holes are what they find."""

import asyncio
import errno

import pytest

from fleecenbd.engine.copy_reads import HOLE_LENGTH_MIN
from fleecenbd.engine.disk import Disk
from tests.engine.scene import CLUSTER, Scene, simulated
from tests.simulation.gated import GatedDevice

LONG = HOLE_LENGTH_MIN + CLUSTER
"""Bytes of the shortest copy that asks."""
SIZE = 8 * LONG


async def _scene(data: tuple[tuple[int, int], ...] = ()) -> Scene:
    """A disk that is one hole but for data at these (offset, length), and a session on it."""
    scene = Scene(size=SIZE)
    content = bytearray(SIZE)
    for offset, length in data:
        content[offset : offset + length] = b"\xd1" * length
    scene.active = GatedDevice("active", SIZE, bytes(content))
    scene.disk = Disk("vda", scene.active)
    scene.content = bytes(content)
    await scene.arm()
    return scene


async def _write(scene: Scene, offset: int, length: int = LONG) -> list[str]:
    """A guest's write; the calls on the active image that it took before its own."""
    scene.active.log.clear()
    scene.active.gate("write")
    writing = asyncio.ensure_future(scene.disk.write(offset, b"\x77" * length))
    (await scene.active.reached("write")).go()
    await writing
    return [call for call in scene.active.log if not call.startswith("write")]


async def _old(scene: Scene) -> bytes:
    (fleece,) = scene.disk.fleeces
    return bytes(await fleece.read(0, SIZE))


@simulated
async def test_a_long_copy_of_a_hole_reads_nothing_and_keeps_zeroes() -> None:
    scene = await _scene()
    (fleece,) = scene.disk.fleeces
    assert await _write(scene, 0) == [f"extents 0+{LONG}"]
    assert await _write(scene, LONG) == [f"extents {LONG}+{LONG}"]
    assert fleece.stats.copied_bytes == 2 * LONG
    assert fleece.stats.temp_clusters == 0
    assert await _old(scene) == bytes(SIZE)


@simulated
async def test_a_short_copy_just_reads() -> None:
    scene = await _scene()
    assert await _write(scene, 0, HOLE_LENGTH_MIN) == [f"read 0+{HOLE_LENGTH_MIN}"]


@simulated
async def test_over_data_the_question_is_put_once() -> None:
    scene = await _scene(((0, 3 * LONG),))
    assert await _write(scene, 0) == [f"extents 0+{LONG}", f"read 0+{LONG}"]
    assert await _write(scene, LONG) == [f"read {LONG}+{LONG}"]
    # After zeroes that had to be read it is put again.
    assert await _write(scene, 3 * LONG) == [f"read {3 * LONG}+{LONG}"]
    assert await _write(scene, 4 * LONG) == [f"extents {4 * LONG}+{LONG}"]
    assert await _old(scene) == scene.content


@pytest.mark.parametrize("place", [0, LONG // 2 // CLUSTER * CLUSTER, LONG - 1])
def test_where_there_is_a_byte_of_data_all_is_read(place: int) -> None:
    @simulated
    async def run() -> None:
        scene = await _scene(((place, 1),))
        assert await _write(scene, 0) == [f"extents 0+{LONG}", f"read 0+{LONG}"]
        assert await _old(scene) == scene.content

    run()


@simulated
async def test_where_holes_cannot_be_told_all_is_read() -> None:
    scene = await _scene()
    scene.active.gate("extents")
    writing = asyncio.ensure_future(scene.disk.write(0, b"\x77" * LONG))
    (await scene.active.reached("extents")).fail(errno.EIO)
    await writing
    assert scene.active.log == [f"extents 0+{LONG}", f"read 0+{LONG}", f"write 0+{LONG}"]
    assert await _old(scene) == bytes(SIZE)


@simulated
async def test_a_trim_lets_the_guest_go_while_holes_are_asked_for() -> None:
    scene = await _scene()
    (fleece,) = scene.disk.fleeces
    scene.active.gate("extents")
    writing = asyncio.ensure_future(scene.disk.write(0, b"\x77" * LONG))
    asking = await scene.active.reached("extents")
    await fleece.trim(0, LONG)
    await writing
    asking.go()
    await fleece.block_copy.drained()
    assert fleece.stats.copied_bytes == 0
    assert "1" not in str(fleece.done)


@simulated
async def test_what_a_failed_copy_left_in_the_temp_image_is_written_over_by_the_hole() -> None:
    scene = await _scene()
    (fleece,) = scene.disk.fleeces
    temp = fleece.temp
    assert isinstance(temp, GatedDevice)
    temp.content[:CLUSTER] = b"\xee" * CLUSTER
    fleece.state.charge(0, 1)
    await _write(scene, 0)
    assert temp.log == [f"zero 0+{CLUSTER}"] or temp.log == [f"zero 0+{LONG}"]
    assert await _old(scene) == bytes(SIZE)


@simulated
async def test_of_two_sessions_each_asks_and_neither_reads() -> None:
    scene = await _scene()
    await scene.arm("other")
    assert await _write(scene, 0) == [f"extents 0+{LONG}"] * 2
    scene.active.log.clear()
    for fleece in scene.disk.fleeces:
        assert bytes(await fleece.read(0, LONG)) == bytes(LONG)


@simulated
async def test_of_two_sessions_the_one_that_reads_is_not_kept_by_the_one_that_does_not() -> None:
    scene = await _scene(((LONG, LONG),))
    first = scene.disk.fleeces[0]
    assert await _write(scene, LONG) == [f"extents {LONG}+{LONG}", f"read {LONG}+{LONG}"]
    other = await scene.arm("other")
    assert sorted(await _write(scene, 0)) == [f"extents 0+{LONG}", f"read 0+{LONG}"]
    for fleece in (first, other):
        assert bytes(await fleece.read(0, LONG)) == bytes(LONG)
