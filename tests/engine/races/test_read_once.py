"""What a READ has released: in the step in which its reply left, whole clusters, space and all."""

from __future__ import annotations

import errno

import pytest

from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from ..scene import CLUSTER, Scene, errno_of, read, simulated


@simulated
async def test_whole_clusters_are_released_at_once_and_their_space_after_that() -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await scene.write(1)
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("trim")
    fleece.release_read(CLUSTER - 1, 2 * CLUSTER)
    assert str(fleece.access) == "1011"
    punch = await fleece.temp.reached("trim")
    assert fleece.stats.temp_clusters == 1
    punch.go()
    await settle()
    assert fleece.stats.temp_clusters == 0
    assert not fleece.temp.holds(CLUSTER, CLUSTER)


@simulated
async def test_parts_do_not_add_up_neither_by_reads_nor_by_trims() -> None:
    scene = Scene(2)
    fleece = await scene.arm()
    fleece.release_read(0, CLUSTER // 2)
    fleece.release_read(CLUSTER // 2, CLUSTER // 2)
    await fleece.trim(0, CLUSTER // 2)
    fleece.release_read(CLUSTER // 2, CLUSTER // 2)
    assert str(fleece.access) == "11"
    await fleece.trim(CLUSTER // 2, CLUSTER // 2)
    assert str(fleece.access) == "01", "TRIMs do"


@simulated
async def test_the_last_cluster_ends_with_the_disk() -> None:
    scene = Scene(size=CLUSTER + 100)
    fleece = await scene.arm()
    fleece.release_read(CLUSTER, 99)
    assert str(fleece.access) == "11"
    fleece.release_read(CLUSTER, 100)
    assert str(fleece.access) == "10"


@simulated
async def test_a_copy_in_flight_is_dropped_and_its_guest_goes_on() -> None:
    scene = Scene(2)
    fleece = await scene.arm()
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    guest = scene.write(0)
    write = await fleece.temp.reached("write")
    fleece.release_read(0, CLUSTER)
    await guest
    assert fleece.stats.copies_cancelled == 1
    write.go()
    await settle()
    assert not fleece.temp.holds(0, CLUSTER)
    assert str(fleece.done) == "00"


@simulated
async def test_another_read_in_flight_there_fails_and_never_returns_newer_data() -> None:
    scene = Scene(2)
    fleece = await scene.arm()
    scene.active.gate("read")
    other = read(fleece, 0)
    call = await scene.active.reached("read")
    fleece.release_read(0, CLUSTER)
    await scene.write(0)
    call.go()
    assert await errno_of(other) == errno.EINVAL


@simulated
async def test_after_the_end_of_the_session_it_does_nothing() -> None:
    scene = Scene(2)
    fleece = await scene.arm()
    fleece.finish()
    fleece.release_read(0, 2 * CLUSTER)
    assert fleece.stats.reads_once == 0


@simulated
async def test_space_that_cannot_be_freed_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(4)
    fleece = await scene.arm()
    await scene.write(0, 2)
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("trim")
    for cluster in (0, 1):
        fleece.release_read(cluster * CLUSTER, CLUSTER)
        (await fleece.temp.reached("trim")).fail(errno.EIO)
        await settle()
    assert [record.getMessage() for record in caplog.records] == [
        "vda@s: temp space could not be freed: trim failed by the test (clusters 0 to 0)"
    ]
    assert fleece.stats.temp_clusters == 2
