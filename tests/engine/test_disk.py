"""A disk's own part: what is written in one step, zeroed, discarded and held."""

from __future__ import annotations

import asyncio
import errno

import pytest

from fleecenbd.engine import disk as module
from fleecenbd.engine.disk import TRIM_PART_MIN, WRITE_NOW_LENGTH_MAX, _pieces
from fleecenbd.engine.recording import RecordingBitmap, Since
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, simulated, trim

PART = TRIM_PART_MIN // CLUSTER


@simulated
async def test_a_write_in_one_step_is_no_longer_than_it_may_be() -> None:
    scene = Scene(size=WRITE_NOW_LENGTH_MAX + CLUSTER)
    assert scene.disk.write_now(0, b"n" * WRITE_NOW_LENGTH_MAX)
    assert not scene.disk.write_now(0, b"o" * (WRITE_NOW_LENGTH_MAX + 1))
    assert scene.active.content.count(b"n") >= WRITE_NOW_LENGTH_MAX
    assert scene.disk.writes == 1


@simulated
async def test_a_write_in_one_step_copies_the_clusters_that_it_touches_and_no_more() -> None:
    scene = Scene(8)
    fleece = await scene.arm()
    assert scene.disk.write_now(2 * CLUSTER - 1, b"ab")
    assert str(fleece.done) == "01100000"
    assert scene.disk.write_now(4 * CLUSTER, b"c" * CLUSTER)
    assert str(fleece.done) == "01101000"
    assert scene.disk.write_now(7 * CLUSTER - 1, b"d")
    assert str(fleece.done) == "01101010"
    assert scene.disk.writes == 3
    assert await fleece.read(0, scene.size) == scene.content


@simulated
async def test_a_write_in_one_step_needs_every_fleece_and_the_disk() -> None:
    scene = Scene(4)
    first, second = await scene.arm("a"), await scene.arm("b")
    assert isinstance(second.temp, GatedDevice)
    second.temp.gate("write")
    assert not scene.disk.write_now(0, b"x" * CLUSTER)
    assert str(first.done) == "1000"
    second.temp.open()
    scene.active.gate("write")
    assert not scene.disk.write_now(0, b"x" * CLUSTER)
    assert scene.disk.writes == 0
    assert scene.now(0, 4) == scene.content
    scene.active.open()
    scene.disk.hold()
    scene.disk.hold()
    scene.disk.release_hold()
    assert not scene.disk.write_now(0, b"x" * CLUSTER)
    scene.disk.release_hold()
    assert scene.disk.write_now(0, b"x" * CLUSTER)
    assert scene.disk.writes == 1


@simulated
async def test_writes_are_counted_while_they_run_and_after() -> None:
    scene = Scene(4)
    scene.active.gate("write")
    writes = [scene.write(0), scene.write(1)]
    await settle()
    assert (scene.disk.active_writes, scene.disk.writes) == (2, 0)
    (await scene.active.reached("write")).go()
    await settle()
    assert (scene.disk.active_writes, scene.disk.writes) == (1, 1)
    idle = asyncio.ensure_future(scene.disk.wait_idle(100.0))
    await settle()
    assert not idle.done()
    scene.active.open()
    assert await idle is True
    await asyncio.gather(*writes)
    assert (scene.disk.active_writes, scene.disk.writes) == (0, 2)
    assert scene.disk._active_calls == {}


@simulated
async def test_waiting_for_an_idle_disk_ends_at_its_deadline() -> None:
    scene = Scene(4)
    scene.active.gate("write")
    write = scene.write(0)
    await settle()
    assert await scene.disk.wait_idle(3.0) is False
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    assert await scene.disk.wait_idle(3.0) is False, "the deadline itself is too late"
    scene.active.open()
    await write
    assert await scene.disk.wait_idle(0.0) is True


@simulated
async def test_fast_zeroes_are_refused_only_where_something_would_have_to_be_copied() -> None:
    scene = Scene(8)
    await scene.disk.write_zeroes(0, CLUSTER, fast=True)
    fleece = await scene.arm()
    await scene.write(2, 2)
    with pytest.raises(OSError, match="vda: old data must be copied first") as caught:
        await scene.disk.write_zeroes(2 * CLUSTER, 2 * CLUSTER + 1, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert str(fleece.done) == "00110000"
    await scene.disk.write_zeroes(2 * CLUSTER, 2 * CLUSTER, fast=True)
    assert scene.now(2, 2) == bytes(2 * CLUSTER)
    assert isinstance(fleece.temp, GatedDevice)
    fleece.temp.gate("write")
    write = scene.write(5)
    await fleece.temp.reached("write")
    assert await errno_of(scene.disk.write_zeroes(5 * CLUSTER, 1, fast=True)) == errno.ENOTSUP
    fleece.temp.open()
    await write
    await scene.disk.write_zeroes(5 * CLUSTER, 1, fast=True)


class Remembering(GatedDevice):
    """A gated device that keeps how it was told to write zeroes."""

    told: tuple[bool, bool] | None = None

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        self.told = (may_trim, fast)
        await super().zero(offset, length, may_trim=may_trim, fast=fast)


@pytest.mark.parametrize("options", [{}, {"may_trim": False}, {"fast": True}])
def test_zeroes_reach_the_device_as_they_were_asked_for(options: dict[str, bool]) -> None:
    @simulated
    async def run() -> None:
        device = Remembering("vda", 4 * CLUSTER, b"x" * (4 * CLUSTER))
        disk = module.Disk("vda", device)
        await disk.write_zeroes(5, 100, **options)
        assert device.told == (options.get("may_trim", True), options.get("fast", False))
        assert device.log == ["zero 5+100"]

    run()


def test_where_discards_are_ignored_zeroes_hold_their_space() -> None:
    @simulated
    async def run() -> None:
        device = Remembering("vda", 4 * CLUSTER, b"x" * (4 * CLUSTER))
        disk = module.Disk("vda", device, discards=False)
        await disk.write_zeroes(0, CLUSTER)
        assert device.told == (False, False)
        assert disk.read_now(0, CLUSTER) == bytes(CLUSTER)

    run()


@simulated
async def test_a_discard_that_is_ignored_touches_no_device_and_no_bit() -> None:
    scene = Scene(4)
    await scene.arm()
    await scene.write(0, 4)  # so that nothing has to be copied first
    bitmap = RecordingBitmap("b", scene.size, CLUSTER, since=Since("s", "an id", 0.0))
    scene.disk.add_bitmap(bitmap)
    scene.active.log.clear()
    scene.disk.discards = False
    await scene.disk.trim(0, scene.size)
    assert scene.active.log == []
    assert not bitmap.bitmap.bits.any()
    scene.disk.discards = True
    await scene.disk.trim(0, scene.size)
    assert scene.active.log == [f"trim 0+{scene.size}"]
    assert bitmap.bitmap.bits.all()


@simulated
async def test_status_flush_and_reads_are_the_devices() -> None:
    scene = Scene(4)
    await scene.disk.write_zeroes(CLUSTER, 2 * CLUSTER)
    zero = EXTENT_HOLE | EXTENT_ZERO
    assert await scene.disk.status(0, 4 * CLUSTER) == [
        (CLUSTER, 0),
        (2 * CLUSTER, zero),
        (CLUSTER, 0),
    ]
    assert await scene.disk.status(CLUSTER + 1, CLUSTER) == [(CLUSTER, zero)]
    assert await scene.disk.status(0, 4 * CLUSTER, one=True) == [(CLUSTER, 0)]
    scene.active.log.clear()
    await scene.disk.flush()
    assert scene.active.log == ["flush 0+0"]
    assert scene.disk.read_now(5, 10) == scene.content[5:15]
    assert await scene.disk.read(5, 10) == scene.content[5:15]


def test_pieces_cover_the_range_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_LENGTH_MAX", 10)
    assert _pieces(3, 10) == [(3, 10)]
    assert _pieces(3, 11) == [(3, 10), (13, 1)]
    assert _pieces(3, 25) == [(3, 10), (13, 10), (23, 5)]
    assert _pieces(3, 0) == []


@simulated
async def test_a_discard_takes_the_parts_that_are_worth_a_call() -> None:
    scene = Scene(4 * PART)
    fleece = await scene.arm()
    await scene.write(PART, PART)
    await trim(fleece, 2 * PART + 1, PART - 1)
    scene.active.log.clear()
    await scene.disk.trim(0, scene.size)
    assert scene.active.log == [f"trim {PART * CLUSTER}+{TRIM_PART_MIN}"]
    await scene.disk.trim((2 * PART + 1) * CLUSTER + 9, 100)
    assert scene.active.log[1:] == [f"trim {(2 * PART + 1) * CLUSTER + 9}+100"]


@simulated
async def test_a_discard_is_cut_to_what_every_fleece_lets_go() -> None:
    scene = Scene(6 * PART)
    first, second = await scene.arm("a"), await scene.arm("b")
    await trim(first, PART, 4 * PART)
    await trim(second, 0, 3 * PART)
    await trim(second, 4 * PART, 2 * PART)
    scene.active.log.clear()
    await scene.disk.trim(100, scene.size - 200)
    assert scene.active.log == [
        f"trim {PART * CLUSTER}+{2 * TRIM_PART_MIN}",
        f"trim {4 * PART * CLUSTER}+{TRIM_PART_MIN}",
    ]
    scene.active.log.clear()
    await scene.disk.trim(PART * CLUSTER + 7, CLUSTER)
    assert scene.active.log == [f"trim {PART * CLUSTER + 7}+{CLUSTER}"]
    second.finish()
    scene.active.log.clear()
    await scene.disk.trim(2 * PART * CLUSTER + 5, 3 * TRIM_PART_MIN)
    assert scene.active.log == [f"trim {2 * PART * CLUSTER + 5}+{3 * TRIM_PART_MIN - 5}"]


@simulated
async def test_a_write_that_one_fleece_refuses_leaves_no_task_of_the_others_behind() -> None:
    scene = Scene(4)
    bad = await scene.arm("bad", on_cbw_error=BREAK_GUEST_WRITE)
    slow = await scene.arm("slow")
    assert isinstance(bad.temp, GatedDevice)
    assert isinstance(slow.temp, GatedDevice)
    bad.temp.gate("write")
    slow.temp.gate("write")
    write = scene.write(0)
    await slow.temp.reached("write")
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert {"cbw vda@bad", "cbw vda@slow"} <= names
    (await bad.temp.reached("write")).fail()
    with pytest.raises(OSError, match="vda@bad: old data could not be copied: write failed"):
        await write
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not any(name.startswith("cbw") for name in names)
    assert "copy vda@slow 0-1" in names
    assert len(slow.state.guests) == 0
    assert scene.now(0) == scene.old(0)
    slow.temp.open()
