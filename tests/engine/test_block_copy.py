"""Copying in one step, in slots, and giving space back, with devices that show each call."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from fleecenbd.engine.block_copy import COPIES_MAX, COPY_LENGTH_MAX, COPY_NOW_LENGTH_MAX, QUEUED_MAX
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, simulated, trim

DATA = b"d" * CLUSTER
HOLE = bytes(CLUSTER)


async def _scene(content: bytes, **options: object) -> tuple[Scene, GatedDevice]:
    """A disk with this content, armed as ``scene.session``; and its temp image."""
    scene = Scene(size=len(content))
    scene.content = content
    scene.active = GatedDevice("active", len(content), content)
    scene.disk = type(scene.disk)("vda", scene.active)
    fleece = await scene.arm(**options)
    assert isinstance(fleece.temp, GatedDevice)
    return scene, fleece.temp


def _copy_now(scene: Scene, first: int, end: int) -> bool:
    assert scene.session is not None
    return scene.session.fleeces[0].block_copy.copy_now(first, end)


@simulated
async def test_one_cluster_of_data_is_copied_in_one_step() -> None:
    scene, temp = await _scene(HOLE + DATA + HOLE)
    (fleece,) = scene.disk.fleeces
    assert _copy_now(scene, 1, 2)
    assert scene.active.log == ["read 4096+4096"]
    assert temp.log == ["write 4096+4096"]
    assert temp.content[CLUSTER : 2 * CLUSTER] == DATA
    assert str(fleece.done) == "010"
    assert str(fleece.copy) == "101"
    stats = fleece.stats
    assert (stats.copies_started, stats.copies_done, stats.copied_bytes) == (1, 1, CLUSTER)
    assert (stats.temp_clusters, stats.temp_clusters_peak) == (1, 1)
    assert _copy_now(scene, 0, 2)
    assert (stats.copies_started, stats.copies_done, stats.copied_bytes) == (2, 2, 2 * CLUSTER)


@pytest.mark.parametrize("content", [b"\0" * (CLUSTER - 1) + b"x", b"x" + b"\0" * (CLUSTER - 1)])
def test_a_single_byte_makes_a_cluster_data(content: bytes) -> None:
    @simulated
    async def run() -> None:
        scene, temp = await _scene(content)
        assert _copy_now(scene, 0, 1)
        assert bytes(temp.content) == content

    run()


@simulated
async def test_zeroes_are_copied_without_a_call_where_the_temp_image_holds_nothing() -> None:
    scene, temp = await _scene(HOLE * 4)
    (fleece,) = scene.disk.fleeces
    assert _copy_now(scene, 0, 1)
    assert _copy_now(scene, 1, 4)
    assert temp.log == []
    assert str(fleece.done) == "1111"
    assert fleece.stats.temp_clusters == 0


@pytest.mark.parametrize("end", [1, 3])
@pytest.mark.parametrize("charged", [0, 2])
def test_zeroes_over_what_a_failed_write_left_are_not_written_in_one_step(
    end: int, charged: int
) -> None:
    @simulated
    async def run() -> None:
        scene, temp = await _scene(HOLE * 3)
        (fleece,) = scene.disk.fleeces
        fleece.state.charge(charged, charged + 1)
        assert _copy_now(scene, 0, end) == (charged >= end)
        assert fleece.copy.any(charged * CLUSTER, CLUSTER)
        await scene.write(0, end)
        if charged < end:
            assert temp.log == [f"zero 0+{end * CLUSTER}"]
            assert fleece.done.all(0, end * CLUSTER)

    run()


@simulated
async def test_a_zero_write_over_charged_clusters_is_one_that_trim_waits_for() -> None:
    scene, temp = await _scene(HOLE * 2)
    (fleece,) = scene.disk.fleeces
    fleece.state.charge(0, 2)
    temp.gate("zero")
    write = scene.write(0, 2)
    call = await temp.reached("zero")
    assert (call.offset, call.length) == (0, 2 * CLUSTER)
    release = trim(fleece, 1)
    await settle()
    assert not release.done()
    assert not write.done()
    call.go()
    await asyncio.gather(write, release)
    assert str(fleece.done) == "10"
    assert str(fleece.state.charged) == "10"


@simulated
async def test_runs_of_data_and_zeroes_are_told_apart_in_one_step() -> None:
    content = DATA + DATA + HOLE + HOLE + b"e" * CLUSTER + HOLE + b"tail"
    scene, temp = await _scene(content)
    (fleece,) = scene.disk.fleeces
    assert _copy_now(scene, 0, 7)
    assert temp.log == ["write 0+8192", "write 16384+4096", "write 24576+4"]
    assert bytes(temp.content[: len(content)]) == content
    assert str(fleece.state.charged) == "1100101"
    assert fleece.stats.copied_bytes == len(content)
    assert "0" not in str(fleece.done)


@simulated
async def test_of_two_clusters_only_the_one_with_data_is_written() -> None:
    scene, temp = await _scene(HOLE + DATA + DATA + HOLE)
    assert _copy_now(scene, 0, 2)
    assert _copy_now(scene, 2, 4)
    assert temp.log == ["write 4096+4096", "write 8192+4096"]


@simulated
async def test_the_last_cluster_is_copied_as_far_as_the_disk_goes() -> None:
    scene, temp = await _scene(DATA + b"x" * 100)
    assert _copy_now(scene, 1, 2)
    assert temp.log == ["write 4096+100"]
    assert scene.disk.fleeces[0].stats.copied_bytes == 100


@simulated
async def test_what_is_done_or_released_is_stepped_over() -> None:
    scene, temp = await _scene(DATA * 5)
    (fleece,) = scene.disk.fleeces
    await trim(fleece, 1)
    assert _copy_now(scene, 3, 4)
    temp.log.clear()
    assert _copy_now(scene, 0, 5)
    assert temp.log == ["write 0+4096", "write 8192+4096", "write 16384+4096"]
    temp.log.clear()
    assert _copy_now(scene, 0, 5)
    assert temp.log == []


@pytest.mark.parametrize(("clusters", "taken"), [(64, True), (65, False)])
def test_a_run_that_is_too_long_is_not_copied_in_one_step(clusters: int, taken: bool) -> None:
    assert COPY_NOW_LENGTH_MAX == 64 * CLUSTER

    @simulated
    async def run() -> None:
        scene, temp = await _scene(DATA * clusters)
        assert _copy_now(scene, 0, clusters) == taken
        (fleece,) = scene.disk.fleeces
        assert fleece.done.bits.count() == (clusters if taken else 0)
        assert len(temp.log) == taken

    run()


@pytest.mark.parametrize("device", ["active", "temp"])
@pytest.mark.parametrize("clusters", [1, 2])
def test_a_device_that_could_block_leaves_all_for_a_copy_in_a_task(
    device: str, clusters: int
) -> None:
    @simulated
    async def run() -> None:
        scene, temp = await _scene(DATA * clusters)
        (fleece,) = scene.disk.fleeces
        (scene.active if device == "active" else temp).gate("read", "write")
        assert not _copy_now(scene, 0, clusters)
        assert "0" not in str(fleece.copy)
        assert not fleece.done.bits.any()
        assert fleece.stats.copies_started == 0

    run()


@pytest.mark.parametrize("clusters", [2, 3])
def test_a_limit_that_is_met_leaves_all_for_a_copy_in_a_task(clusters: int) -> None:
    @simulated
    async def run() -> None:
        scene, temp = await _scene(DATA * clusters, temp_limit=clusters * CLUSTER - 1)
        (fleece,) = scene.disk.fleeces
        assert not _copy_now(scene, 0, clusters)
        assert temp.log == []
        assert "0" not in str(fleece.copy)
        assert fleece.stats.limit_hits == 1

    run()


@simulated
async def test_a_claim_is_cut_to_copies_of_1_mib_and_leaves_out_what_is_done() -> None:
    clusters = 2 * (COPY_LENGTH_MAX // CLUSTER) + 10
    scene, _ = await _scene(b"x" * (clusters * CLUSTER))
    (fleece,) = scene.disk.fleeces
    fleece.copy.bits[3] = 0
    fleece.done.bits[3] = 1
    claimed = fleece.block_copy.claim(1, clusters - 1)
    assert [(copy.first, copy.end) for copy in claimed] == [
        (1, 3),
        (4, 260),
        (260, 516),
        (516, clusters - 1),
    ]
    assert fleece.stats.copies_started == 4
    assert list(fleece.state.copies) == claimed
    assert fleece.copy.bits.count() == 2
    assert fleece.block_copy.claim(0, 0) == []
    await fleece.block_copy.drained()
    assert fleece.stats.copies_done == 4
    assert fleece.stats.copied_bytes == (clusters - 3) * CLUSTER
    assert not fleece.state.copies
    assert fleece.done.bits.count() == clusters - 2


@simulated
async def test_copies_of_a_hung_temp_image_that_were_released_do_not_pile_up() -> None:
    clusters = COPIES_MAX + 4 * QUEUED_MAX
    scene, temp = await _scene(DATA * clusters)
    (fleece,) = scene.disk.fleeces
    temp.gate("write")
    state = fleece.state
    most = 0
    for cluster in range(clusters):
        fleece.block_copy.claim(cluster, cluster + 1)
        await settle()
        if cluster >= COPIES_MAX:
            state.release(cluster, cluster + 1)
        most = max(most, len(state.copies))
    assert len(temp.waiting) == COPIES_MAX
    assert COPIES_MAX + QUEUED_MAX <= most <= COPIES_MAX + QUEUED_MAX + 2
    temp.open()
    await fleece.block_copy.drained()
    assert fleece.stats.copies_done == COPIES_MAX
    assert not state.copies


@simulated
async def test_copies_that_wait_behind_a_hung_one_run_in_order_once_it_has_ended() -> None:
    clusters = COPIES_MAX + 2 * QUEUED_MAX
    scene, temp = await _scene(DATA * clusters)
    (fleece,) = scene.disk.fleeces
    temp.gate("write")
    for cluster in range(clusters):
        fleece.block_copy.claim(cluster, cluster + 1)
    await settle()
    fleece.state.release(COPIES_MAX, COPIES_MAX + 1)
    assert len(fleece.state.copies) == clusters
    temp.open()
    await fleece.block_copy.drained()
    assert fleece.done.bits.count() == clusters - 1
    written = [line for line in temp.log if line.startswith("write")]
    kept = [c for c in range(clusters) if c != COPIES_MAX]
    assert written == [f"write {c * CLUSTER}+{CLUSTER}" for c in kept]


@simulated
async def test_a_fault_of_our_own_breaks_the_session_and_no_guest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene, temp = await _scene(DATA * 2)
    (fleece,) = scene.disk.fleeces
    temp.gate("write")

    async def wrong(*arguments: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(fleece.block_copy, "_write", wrong)
    with caplog.at_level(logging.ERROR):
        await scene.write(0)
    assert fleece.broken == "internal error: RuntimeError('planted')"
    assert scene.now(0) == b"\x77" * CLUSTER
    assert "vda@s: copying clusters Copy(0, 1) failed" in caplog.text
    assert not fleece.state.copies


@simulated
async def test_a_copy_that_is_cut_off_has_failed() -> None:
    scene, temp = await _scene(DATA)
    (fleece,) = scene.disk.fleeces
    temp.gate("write")
    (copy,) = fleece.block_copy.claim(0, 1)
    await temp.reached("write")
    (task,) = fleece.block_copy._tasks
    assert task.get_name() == "copy vda@s 0-1"
    task.cancel()
    await fleece.block_copy.drained()
    assert copy.ended
    assert copy.error is not None
    assert (copy.error.errno, copy.error.strerror) == (errno.EIO, "the copy was cut off")
    assert "0" not in str(fleece.copy)
    temp.open()


@simulated
async def test_drained_waits_for_copies_and_for_releases() -> None:
    scene, temp = await _scene(DATA * 2)
    (fleece,) = scene.disk.fleeces
    await scene.write(1)
    temp.gate("write", "trim")
    fleece.block_copy.claim(0, 1)
    release = trim(fleece, 1)
    draining = asyncio.ensure_future(fleece.block_copy.drained())
    punch = await temp.reached("trim")
    (await temp.reached("write")).go()
    await settle()
    assert not draining.done()
    punch.go()
    await draining
    await release
    await fleece.block_copy.drained()


@simulated
async def test_a_punch_reaches_from_the_first_to_the_last_charged_cluster() -> None:
    scene, temp = await _scene(DATA * 6)
    (fleece,) = scene.disk.fleeces
    await asyncio.gather(scene.write(1), scene.write(3))
    temp.log.clear()
    await trim(fleece, 0, 6)
    assert temp.log == ["trim 4096+12288"]
    assert fleece.stats.temp_clusters == 0
    assert fleece.stats.temp_clusters_peak == 2
    assert fleece.stats.released_bytes == 6 * CLUSTER


@simulated
async def test_a_punch_that_fails_names_the_fleece_and_the_cause() -> None:
    scene, temp = await _scene(DATA * 2)
    (fleece,) = scene.disk.fleeces
    await scene.write(0)
    temp.gate("trim")
    release = trim(fleece, 0)
    (await temp.reached("trim")).fail(errno.EOPNOTSUPP)
    with pytest.raises(OSError, match="vda@s: temp space could not be freed: trim fail") as caught:
        await release
    assert caught.value.errno == errno.EIO
    assert fleece.stats.temp_clusters == 1
    temp.open("trim")
    assert await errno_of(trim(fleece, 0)) is None
    assert fleece.stats.temp_clusters == 0


@simulated
async def test_a_release_that_is_cut_off_has_failed() -> None:
    scene, temp = await _scene(DATA)
    (fleece,) = scene.disk.fleeces
    await scene.write(0)
    temp.gate("trim")
    release = trim(fleece, 0)
    await temp.reached("trim")
    (task,) = fleece.block_copy._releases
    task.cancel()
    with pytest.raises(OSError, match="vda@s: freeing temp space was cut off") as caught:
        await release
    assert caught.value.errno == errno.EIO
    assert fleece.stats.temp_clusters == 1
    temp.open()


@simulated
async def test_guests_that_releases_in_one_step_let_go_add_up() -> None:
    scene, _ = await _scene(DATA * 4)
    (fleece,) = scene.disk.fleeces
    scene.active.gate("read")
    writes = [scene.write(0), scene.write(2)]
    await settle()
    assert fleece.block_copy.release_now(0, 1)
    assert fleece.block_copy.release_now(2, 3)
    await asyncio.gather(*writes)
    assert fleece.stats.guest_released_by_trim == 2
    scene.active.open()


@simulated
async def test_a_release_in_one_step_waits_for_nobody_and_frees_nothing() -> None:
    scene, temp = await _scene(DATA * 6)
    (fleece,) = scene.disk.fleeces
    release_now = fleece.block_copy.release_now
    await scene.write(0)
    assert not release_now(0, 1), "something to punch"
    assert not release_now(0, 2)
    assert "0" not in str(fleece.access)
    temp.gate("read", "write", "trim")
    reading = asyncio.ensure_future(fleece.read(0, CLUSTER))
    await temp.reached("read")
    fleece.state.uncharge(0, 1)
    assert not release_now(0, 1), "a temp read in flight"
    temp.open("read")
    await reading
    writing = scene.write(2)
    await temp.reached("write")
    fleece.state.uncharge(2, 3)
    assert not release_now(1, 3), "a temp write in flight"
    assert release_now(3, 6)
    assert release_now(1, 2)
    assert str(fleece.access) == "101000"
    temp.open("write")
    await writing
