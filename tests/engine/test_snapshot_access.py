"""Reads, maps and TRIMs in one step and in several, call by call."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fleecenbd.engine import bit_status, snapshot_access
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.snapshot_access import READ_NOW_LENGTH_MAX
from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, read, simulated, trim

ZERO = EXTENT_HOLE | EXTENT_ZERO


def _quiet(scene: Scene, fleece: Fleece) -> tuple[GatedDevice, GatedDevice]:
    """Both devices, with their logs empty."""
    assert isinstance(fleece.temp, GatedDevice)
    scene.active.log.clear()
    fleece.temp.log.clear()
    return scene.active, fleece.temp


# reads


@simulated
async def test_a_read_in_one_step_lays_what_the_temp_image_holds_over_the_active_image() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await asyncio.gather(scene.write(2, 2), scene.write(5))
    active, temp = _quiet(scene, fleece)
    assert fleece.read_now(100, 6 * CLUSTER) == scene.content[100 : 100 + 6 * CLUSTER]
    assert active.log == ["read 100+24576"]
    assert temp.log == ["read 8192+8192", "read 20480+4096"]


@simulated
async def test_a_read_in_one_step_may_begin_and_end_inside_runs_of_the_temp_image() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await asyncio.gather(scene.write(1, 2), scene.write(5, 2))
    _, temp = _quiet(scene, fleece)
    offset, length = CLUSTER + 100, 5 * CLUSTER - 50
    assert fleece.read_now(offset, length) == scene.content[offset : offset + length]
    assert temp.log == ["read 4196+8092", "read 20480+4146"]


@simulated
async def test_an_active_image_that_fails_where_it_is_not_needed_fails_nobody() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await scene.write(1)

    def failing(offset: int, length: int) -> bytes | None:
        if offset < 2 * CLUSTER and offset + length > CLUSTER:
            raise OSError(errno.EIO, "a bad block")
        return bytes(scene.active.content[offset : offset + length])

    scene.active.pread_now = failing  # type: ignore[method-assign]
    assert fleece.read_now(0, 3 * CLUSTER) is None
    assert await fleece.read(0, 3 * CLUSTER) == scene.old(0, 3)


@simulated
async def test_what_an_active_image_hands_out_for_good_is_not_written_over() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    given = bytes(scene.content[: 2 * CLUSTER])
    await scene.write(1)
    scene.active.pread_now = lambda offset, length: given  # type: ignore[method-assign]
    assert fleece.read_now(0, 2 * CLUSTER) == scene.old(0, 2)
    assert given == scene.content[: 2 * CLUSTER]


@simulated
async def test_a_read_in_one_step_of_one_device_is_one_call() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await scene.write(2, 3)
    active, temp = _quiet(scene, fleece)
    assert fleece.read_now(2 * CLUSTER, 3 * CLUSTER) == scene.old(2, 3)
    assert (active.log, temp.log) == ([], ["read 8192+12288"])
    assert fleece.read_now(5 * CLUSTER, 3 * CLUSTER) == scene.old(5, 3)
    assert fleece.read_now(0, 2 * CLUSTER) == scene.old(0, 2)
    assert active.log == ["read 20480+12288", "read 0+8192"]
    assert len(temp.log) == 1


@pytest.mark.parametrize("gated", ["active", "temp"])
def test_a_read_that_could_block_is_not_made_in_one_step(gated: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(4)
        fleece = await scene.arm()
        await scene.write(0, 2)
        active, temp = _quiet(scene, fleece)
        (active if gated == "active" else temp).gate("read")
        assert fleece.read_now(0, 4 * CLUSTER) is None
        assert (fleece.read_now(0, CLUSTER) is None) == (gated == "temp")
        assert (fleece.read_now(2 * CLUSTER, CLUSTER) is None) == (gated == "active")

    run()


@simulated
async def test_a_read_in_one_step_is_no_longer_than_it_may_be() -> None:
    scene = Scene(size=READ_NOW_LENGTH_MAX + CLUSTER)
    fleece = await scene.arm()
    assert fleece.read_now(0, READ_NOW_LENGTH_MAX) == scene.content[:READ_NOW_LENGTH_MAX]
    assert fleece.read_now(0, READ_NOW_LENGTH_MAX + 1) is None
    assert await fleece.read(0, scene.size) == scene.content


@simulated
async def test_a_read_calls_the_devices_in_one_step_where_they_can_answer() -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await scene.write(1)
    scene.active.gate("write")
    for cluster in range(4):
        task = read(fleece, cluster)
        # Devices that answer at once leave no moment in which a guest would have to wait.
        await asyncio.sleep(0)
        assert task.done()
        assert task.result() == scene.old(cluster)
    assert scene.active.waiting == []


@simulated
async def test_what_may_not_be_read_is_named_by_its_first_released_byte() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await asyncio.gather(trim(fleece, 1), trim(fleece, 4))
    text = "vda@s: offset 16384 was released, by a TRIM or by being read once, and can no longer"
    with pytest.raises(OSError, match=text) as caught:
        fleece.read_now(2 * CLUSTER, 6 * CLUSTER)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match=text):
        await fleece.read(3 * CLUSTER, 2 * CLUSTER)
    assert fleece.read_now(2 * CLUSTER, 2 * CLUSTER) == scene.old(2, 2)
    assert await fleece.read(5 * CLUSTER, 3 * CLUSTER) == scene.old(5, 3)


ENDED: dict[str, Callable[[Fleece], Any]] = {
    "read": lambda fleece: fleece.read(0, CLUSTER),
    "read_now": lambda fleece: fleece.read_now(0, CLUSTER),
    "status": lambda fleece: fleece.status(0, CLUSTER),
    "access_status": lambda fleece: fleece.access_status(0, CLUSTER),
    "trim": lambda fleece: fleece.trim(0, CLUSTER),
    "trim_now": lambda fleece: fleece.trim_now(0, CLUSTER),
}


@pytest.mark.parametrize("name", ENDED)
@pytest.mark.parametrize("cause", ["a test", None])
def test_everything_fails_once_the_session_has_ended(name: str, cause: str | None) -> None:
    @simulated
    async def run() -> None:
        fleece = await Scene().arm()
        if cause is not None:
            fleece.state.break_session(cause)
        fleece.finish()

        async def call() -> None:
            answer = ENDED[name](fleece)
            if isinstance(answer, Awaitable):
                await answer

        assert await errno_of(call()) == (errno.ESHUTDOWN if cause is None else errno.EIO)

    run()


@simulated
async def test_a_map_that_an_end_overtakes_fails() -> None:
    scene = Scene()
    fleece = await scene.arm()
    scene.active.gate("extents")
    asking = asyncio.ensure_future(fleece.status(0, scene.size))
    call = await scene.active.reached("extents")
    fleece.finish()
    call.go()
    assert await errno_of(asking) == errno.ESHUTDOWN
    assert not fleece.state.frozen_reads


@pytest.mark.parametrize("turns", range(4))
def test_a_map_that_an_end_overtakes_in_any_turn_of_the_loop_fails(turns: int) -> None:
    @simulated
    async def run() -> None:
        scene = Scene()
        fleece = await scene.arm()
        asking = asyncio.ensure_future(fleece.status(0, scene.size))
        for _ in range(turns):
            await asyncio.sleep(0)
        answered = asking.done()
        assert answered == (turns > 1)
        fleece.finish()
        assert await errno_of(asking) == (None if answered else errno.ESHUTDOWN)

    run()


@simulated
async def test_a_read_in_one_step_hands_on_what_the_device_gave() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await scene.write(5)  # held in the temp image, past the end of the read
    given = bytearray(scene.old(2, 2))
    scene.active.pread_now = lambda offset, length: given  # type: ignore[method-assign]
    assert fleece.read_now(2 * CLUSTER, 2 * CLUSTER) is given


@simulated
async def test_a_read_of_one_run_hands_on_what_the_device_gave() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    scene.active.gate("read")
    given = bytearray(scene.old(2, 2))

    async def pread(offset: int, length: int) -> bytearray:
        return given

    scene.active.pread = pread  # type: ignore[method-assign]
    assert await fleece.read(2 * CLUSTER, 2 * CLUSTER) is given


# maps


@simulated
async def test_a_map_asks_the_active_image_about_what_was_not_copied_and_no_more() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await asyncio.gather(scene.write(0), scene.write(3), scene.write(6, 2))
    active, _ = _quiet(scene, fleece)
    assert await fleece.status(0, scene.size) == [(scene.size, 0)]
    assert active.log == ["extents 4096+20480"]
    active.log.clear()
    await fleece.status(CLUSTER + 5, 100)
    assert active.log == ["extents 4101+100"]
    active.log.clear()
    assert await fleece.status(6 * CLUSTER, 2 * CLUSTER) == [(2 * CLUSTER, 0)]
    assert active.log == []


@simulated
async def test_a_map_is_finer_than_clusters_where_nothing_of_what_was_asked_about_was_copied() -> (
    None
):
    scene = Scene(6)
    scene.active.content[:CLUSTER] = bytes(CLUSTER)
    scene.active.space.discard(0)
    fleece = await scene.arm(cluster_size=2 * CLUSTER)
    await scene.write(2, 2)
    # Clusters of two blocks: half a hole and not copied; copied; not copied.
    assert await fleece.status(0, 4 * CLUSTER) == [(CLUSTER, ZERO), (3 * CLUSTER, 0)]
    assert await fleece.status(0, 6 * CLUSTER) == [(6 * CLUSTER, 0)]


@simulated
async def test_a_guest_waits_for_a_map_only_where_it_is_asked_about() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await scene.write(3)
    scene.active.gate("extents")
    asking = asyncio.ensure_future(fleece.status(CLUSTER, 5 * CLUSTER))
    call = await scene.active.reached("extents")
    writes = [scene.write(cluster, fill=9) for cluster in range(8)]
    await settle()
    waiting = [cluster for cluster, write in enumerate(writes) if not write.done()]
    assert waiting == [1, 2, 4, 5]
    call.go()
    await asyncio.gather(asking, *writes)
    assert fleece.stats.frozen_waits == 4
    assert fleece.stats.guest_waits == 8, "each waited for its copy"


def _sparse(size: int, data: set[int]) -> bytes:
    return b"".join(
        (b"d" if n in data else b"\0") * min(CLUSTER, size - n * CLUSTER)
        for n in range(-(-size // CLUSTER))
    )


async def _sparse_scene(size: int, data: set[int]) -> tuple[Scene, Fleece]:
    scene = Scene(size=size)
    scene.content = _sparse(size, data)
    scene.active = GatedDevice("active", size, scene.content)
    scene.disk = type(scene.disk)("vda", scene.active)
    return scene, await scene.arm()


@simulated
async def test_a_map_of_copied_and_uncopied_clusters_tells_zeroes_by_cluster() -> None:
    size = 8 * CLUSTER + 100
    scene, fleece = await _sparse_scene(size, {0, 4, 5})
    await asyncio.gather(scene.write(2), scene.write(5))
    assert await fleece.status(0, size) == [
        (CLUSTER, 0),
        (3 * CLUSTER, ZERO),
        (2 * CLUSTER, 0),
        (2 * CLUSTER + 100, ZERO),
    ]
    assert await fleece.status(CLUSTER + 7, 3 * CLUSTER) == [(3 * CLUSTER - 7, ZERO), (7, 0)]
    assert await fleece.status(0, size, one=True) == [(CLUSTER, 0)]
    await trim(fleece, 2)
    assert await fleece.status(CLUSTER, 3 * CLUSTER) == [
        (CLUSTER, ZERO),
        (CLUSTER, 0),
        (CLUSTER, ZERO),
    ]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_map_of_what_was_not_copied_is_as_fine_as_the_disks_own(first: int) -> None:
    big = 4 * CLUSTER

    @simulated
    async def run() -> None:
        scene, _ = await _sparse_scene(4 * big, {4 * first + 1, 4 * first + 2})
        scene.session.finish()  # type: ignore[union-attr]
        fleece = await scene.arm("big", cluster_size=big)
        for cluster in range(first):
            await scene.disk.write(cluster * big, b"x")
        start = first * big + 100
        assert await fleece.status(start, 3 * CLUSTER) == [
            (CLUSTER - 100, ZERO),
            (2 * CLUSTER, 0),
            (100, ZERO),
        ]
        if first:
            # With the cluster before it, which was copied: zero by clusters, then as fine again.
            assert await fleece.status(first * big - 10, CLUSTER + 20) == [
                (10 + CLUSTER, ZERO),
                (10, 0),
            ]

    run()


@simulated
async def test_the_access_map_says_what_may_be_read_and_what_is_held_in_temp() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await asyncio.gather(scene.write(1, 2), scene.write(5))
    await asyncio.gather(trim(fleece, 2), trim(fleece, 7))
    assert fleece.access_status(0, scene.size) == [
        (CLUSTER, 1),
        (CLUSTER, 3),
        (CLUSTER, 0),
        (2 * CLUSTER, 1),
        (CLUSTER, 3),
        (CLUSTER, 1),
        (CLUSTER, 0),
    ]
    assert fleece.access_status(CLUSTER + 1, 2 * CLUSTER) == [
        (CLUSTER - 1, 3),
        (CLUSTER, 0),
        (1, 1),
    ]


@simulated
async def test_maps_of_many_extents_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_status, "STATUS_EXTENTS_MAX", 4)
    scene, fleece = await _sparse_scene(16 * CLUSTER, set(range(16)))
    await asyncio.gather(*(scene.write(cluster) for cluster in range(0, 16, 2)))
    assert fleece.access_status(0, scene.size) == [
        (CLUSTER, 3 if n % 2 == 0 else 1) for n in range(5)
    ]
    assert fleece.access_status(0, 4 * CLUSTER)[3:] == [(CLUSTER, 1)]


@simulated
async def test_a_map_by_clusters_ends_with_the_extent_that_passes_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot_access, "STATUS_EXTENTS_MAX", 4)
    scene, fleece = await _sparse_scene(16 * CLUSTER, set(range(0, 16, 2)))
    await scene.write(8)
    assert await fleece.status(0, scene.size) == [
        (CLUSTER, 0 if n % 2 == 0 else ZERO) for n in range(5)
    ]


@simulated
async def test_a_map_in_which_much_was_released_meanwhile_ends_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot_access, "STATUS_EXTENTS_MAX", 4)
    scene, fleece = await _sparse_scene(16 * CLUSTER, {0})
    scene.active.gate("extents")
    asking = asyncio.ensure_future(fleece.status(0, scene.size))
    call = await scene.active.reached("extents")
    await asyncio.gather(*(trim(fleece, cluster) for cluster in range(2, 16, 2)))
    call.go()
    expected = [(CLUSTER, 0), (CLUSTER, ZERO), (CLUSTER, 0), (CLUSTER, ZERO), (CLUSTER, 0)]
    assert await asking == expected


# TRIM


@pytest.mark.parametrize(
    ("offset", "length", "taken"),
    [
        (CLUSTER, CLUSTER, True),
        (CLUSTER, 3 * CLUSTER, True),
        (3 * CLUSTER, CLUSTER + 100, True),
        (4 * CLUSTER, 100, True),
        (CLUSTER + 1, CLUSTER - 1, False),
        (CLUSTER, CLUSTER - 1, False),
        (4 * CLUSTER, 99, False),
        (4 * CLUSTER + 1, 99, False),
    ],
)
def test_a_trim_of_whole_clusters_is_done_in_one_step(
    offset: int, length: int, taken: bool
) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(size=4 * CLUSTER + 100)
        fleece = await scene.arm()
        assert fleece.trim_now(offset, length) == taken
        first, end = fleece.access.span(offset, length)
        expected = ["0" if taken and first <= n < end else "1" for n in range(5)]
        assert str(fleece.access) == "".join(expected)
        assert fleece.stats.trims == taken

    run()


@simulated
async def test_a_trim_in_one_step_does_nothing_where_space_must_be_freed() -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await scene.write(1)
    assert not fleece.trim_now(0, 2 * CLUSTER)
    assert "0" not in str(fleece.access)
    assert fleece.stats.trims == 0
    await fleece.trim(0, 2 * CLUSTER)
    assert fleece.trim_now(0, 2 * CLUSTER)
    assert fleece.stats.trims == 2


@simulated
async def test_parts_of_a_cluster_are_counted_until_it_is_released() -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await fleece.trim(CLUSTER // 2, CLUSTER)
    assert fleece.stats.part_trims == 2
    assert fleece.stats.trims == 0
    assert "0" not in str(fleece.access)
    await fleece.trim(0, CLUSTER // 2)
    assert str(fleece.access) == "0111"
    assert (fleece.stats.part_trims, fleece.stats.trims) == (3, 1)
    await fleece.trim(CLUSTER // 2, CLUSTER)
    assert (fleece.stats.part_trims, fleece.stats.trims) == (4, 1), "0 has been released already"
    await fleece.trim(3 * CLUSTER // 2, 2 * CLUSTER)
    assert str(fleece.access) == "0001"
    assert (fleece.stats.part_trims, fleece.stats.trims) == (6, 2)
    await fleece.trim(7 * CLUSTER // 2, CLUSTER // 2)
    assert str(fleece.access) == "0000"


@simulated
async def test_parts_are_forgotten_with_their_cluster_in_one_step_too() -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await fleece.trim(CLUSTER, 100)
    await fleece.trim(2 * CLUSTER, 100)
    assert fleece.trim_now(CLUSTER, CLUSTER)
    assert list(fleece.snapshot_access._parts._parts) == [2]


@simulated
async def test_a_trim_that_begins_and_ends_inside_of_clusters_releases_those_between() -> None:
    scene = Scene(size=5 * CLUSTER + 100)
    fleece = await scene.arm()
    await fleece.trim(1, 3 * CLUSTER)
    assert str(fleece.access) == "100111"
    await fleece.trim(4 * CLUSTER - 1, CLUSTER + 101)
    assert str(fleece.access) == "100100"
    await fleece.trim(0, 1)
    assert str(fleece.access) == "000100"
    await fleece.trim(3 * CLUSTER + 1, CLUSTER - 2)
    assert str(fleece.access) == "000000"


@simulated
async def test_trims_that_meet_a_read_of_their_range_are_counted() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    await scene.write(1)
    active, temp = _quiet(scene, fleece)
    active.gate("read")
    temp.gate("read")
    reads = [read(fleece, 1), read(fleece, 3)]
    await settle()
    assert fleece.trim_now(4 * CLUSTER, CLUSTER)
    assert fleece.stats.trims_during_reads == 0
    assert fleece.trim_now(3 * CLUSTER, CLUSTER)
    assert fleece.stats.trims_during_reads == 1
    release = trim(fleece, 1)
    await settle()
    assert fleece.stats.trims_during_reads == 2
    active.open()
    temp.open()
    await release
    assert [await errno_of(task) for task in reads] == [errno.EINVAL, errno.EINVAL]
