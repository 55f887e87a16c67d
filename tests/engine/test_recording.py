"""Recording bitmaps: what a guest's request sets, and when; granularities, merge, clear, names."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import (
    GRANULARITY_MAX,
    GRANULARITY_MIN,
    BitmapRequest,
    RecordingBitmap,
    Since,
    clear,
    merge,
    scaled,
)
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, simulated

SINCE = Since("monday", "id of monday", 1.0)


def _recorded(scene: Scene, name: str = "chain", granularity: int = CLUSTER) -> RecordingBitmap:
    bitmap = RecordingBitmap(name, scene.size, granularity)
    scene.disk.add_bitmap(bitmap)
    return bitmap


GuestCall = Callable[[Disk], Coroutine[Any, Any, None]]


@pytest.mark.parametrize(
    "call",
    [
        lambda disk: disk.write(CLUSTER + 1, b"x"),
        lambda disk: disk.write_zeroes(CLUSTER, 7),
        lambda disk: disk.trim(CLUSTER, CLUSTER),
    ],
    ids=["write", "zeroes", "trim"],
)
def test_a_request_is_recorded_before_its_device_call_begins(call: GuestCall) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(4)
        bitmap = _recorded(scene)
        scene.active.gate("write", "zero", "trim")
        request = asyncio.ensure_future(call(scene.disk))
        await settle()
        assert str(bitmap.bitmap) == "0100"
        scene.active.open()
        await request
        assert str(bitmap.bitmap) == "0100"

    run()


@simulated
async def test_a_write_in_one_step_is_recorded_before_its_device_call() -> None:
    scene = Scene(4)
    bitmap = _recorded(scene)
    seen = []
    write_now = scene.active.pwrite_now

    def watched(offset: int, data: bytes) -> bool:
        seen.append(str(bitmap.bitmap))
        return write_now(offset, data)

    scene.active.pwrite_now = watched  # type: ignore[method-assign,assignment]
    assert scene.disk.write_now(2 * CLUSTER - 1, b"xy")
    assert seen == ["0110"]
    assert scene.disk.writes == 1


@simulated
async def test_a_write_that_waits_in_copy_before_write_is_not_recorded_yet() -> None:
    scene = Scene(4)
    bitmap = _recorded(scene)
    await scene.arm()
    scene.active.gate("read")
    write = scene.write(1)
    await scene.active.reached("read")
    assert str(bitmap.bitmap) == "0000"
    scene.active.open()
    await write
    assert str(bitmap.bitmap) == "0100"


@simulated
async def test_a_write_that_fails_for_a_sessions_sake_is_not_recorded() -> None:
    scene = Scene(4)
    bitmap = _recorded(scene)
    fleece = await scene.arm(on_cbw_error=BREAK_GUEST_WRITE)
    fleece.temp.gate("write")  # type: ignore[attr-defined]
    write = scene.write(1)
    (await fleece.temp.reached("write")).fail()  # type: ignore[attr-defined]
    assert await errno_of(write) == errno.EIO
    assert str(bitmap.bitmap) == "0000"


@simulated
async def test_a_write_that_fails_on_the_disk_is_recorded_since_it_may_have_left_anything() -> None:
    scene = Scene(4)
    bitmap = _recorded(scene)
    scene.active.gate("write")
    write = scene.write(3)
    (await scene.active.reached("write")).fail()
    assert await errno_of(write) == errno.EIO
    assert str(bitmap.bitmap) == "0001"


@simulated
async def test_parts_of_a_discard_that_are_left_alone_are_not_recorded() -> None:
    scene = Scene(48)
    await scene.arm()
    await scene.write(0, 16)
    bitmap = _recorded(scene)
    await scene.disk.trim(0, scene.size)
    assert str(bitmap.bitmap) == "1" * 16 + "0" * 32


@simulated
async def test_a_bitmap_that_is_added_records_the_active_writes_in_flight_too() -> None:
    scene = Scene(4)
    scene.active.gate("write")
    write = scene.write(2)
    await scene.active.reached("write")
    bitmap = _recorded(scene)
    assert str(bitmap.bitmap) == "0010"
    scene.active.open()
    await write


@simulated
async def test_a_bitmap_that_is_cleared_keeps_the_active_writes_in_flight() -> None:
    scene = Scene(4)
    bitmap = _recorded(scene)
    await scene.write(0)
    scene.active.gate("write")
    write = scene.write(2)
    await scene.active.reached("write")
    scene.disk.clear_bitmap("chain")
    assert (str(bitmap.bitmap), bitmap.since) == ("0010", None)
    with pytest.raises(OSError, match="vda has no bitmap called other"):
        scene.disk.clear_bitmap("other")
    scene.active.open()
    await write


@simulated
async def test_a_bitmap_that_is_removed_records_nothing_more() -> None:
    scene = Scene(4)
    first, second = _recorded(scene, "a"), _recorded(scene, "b", 2 * CLUSTER)
    await scene.write(0)
    assert scene.disk.remove_bitmap("a") is first
    await scene.write(3)
    assert (str(first.bitmap), str(second.bitmap)) == ("1000", "11")
    first.close()
    assert list(scene.disk.bitmaps) == ["b"]


@simulated
async def test_bitmaps_that_cannot_be_added_or_removed_are_refused_with_the_reason() -> None:
    scene = Scene(4)
    _recorded(scene)
    with pytest.raises(OSError, match="vda has a bitmap called chain already") as caught:
        _recorded(scene)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(OSError, match="vda has no bitmap called other") as caught:
        scene.disk.remove_bitmap("other")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="bitmap b is of 4096 bytes, and vda of 16384") as caught:
        scene.disk.add_bitmap(RecordingBitmap("b", CLUSTER))
    assert caught.value.errno == errno.EINVAL


class Counted:
    """Stamps that count, and look at the disk when a write begins."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.began = 0
        self.ended = 0
        self.seen: list[bytes] = []

    def begin(self) -> None:
        self.began += 1
        self.seen.append(self.scene.now(1))

    def end(self) -> None:
        self.ended += 1


@simulated
async def test_stamps_are_told_before_the_disk_changes_and_after_it_has() -> None:
    scene = Scene(4)
    stamps = Counted(scene)
    scene.disk.stamps = stamps
    assert scene.disk.stamps is stamps
    assert scene.disk.write_now(CLUSTER, b"x" * CLUSTER)
    assert (stamps.began, stamps.ended, stamps.seen) == (1, 1, [scene.old(1)])
    scene.active.gate("write")
    assert not scene.disk.write_now(CLUSTER, b"y" * CLUSTER)
    assert (stamps.began, stamps.ended) == (2, 2)
    write = scene.write(1)
    await scene.active.reached("write")
    assert (stamps.began, stamps.ended) == (3, 2)
    write.cancel()
    await settle()
    assert stamps.ended == 2, "the device call goes on"
    scene.active.open()
    await settle()
    assert stamps.ended == 3
    scene.disk.stamps = None
    await scene.write(1)
    assert stamps.began == 3


@simulated
async def test_stamps_are_told_of_the_end_of_a_write_that_fails() -> None:
    scene = Scene(4)
    stamps = Counted(scene)
    scene.disk.stamps = stamps

    def fail(offset: int, data: bytes) -> bool:
        raise OSError(errno.EIO, "a test")

    scene.active.pwrite_now = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="a test"):
        scene.disk.write_now(0, b"x")
    assert (stamps.began, stamps.ended) == (1, 1)


@pytest.mark.parametrize(
    "granularity", [0, 2048, 5000, GRANULARITY_MIN // 2, GRANULARITY_MAX * 2, -4096]
)
def test_a_granularity_that_makes_no_sense_is_refused(granularity: int) -> None:
    text = f"a power of two from 4096 to 33554432, not {granularity}"
    with pytest.raises(ValueError, match=text):
        BitmapRequest("chain", granularity=granularity)
    with pytest.raises(ValueError, match=text):
        RecordingBitmap("chain", 1, granularity)


def test_a_mode_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="use, new, use-or-new, keep, not reset"):
        BitmapRequest("chain", "reset")


@pytest.mark.parametrize("seed", range(40))
def test_bits_at_another_granularity_are_those_of_every_part_that_is_touched(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 70 * 4096)
    fine, coarse = (4096 << rng.randrange(3) for _ in range(2))
    source = Bitmap(size, fine, buffer=bytearray(Bitmap.bitmap_length(size, fine)))
    for cluster in range(source.clusters):
        source.bits[cluster] = rng.random() < 0.2
    expected = Bitmap(size, coarse)
    for offset, length, dirty in source.runs(0, size):
        if dirty:
            expected.set(offset, length)
    assert scaled(source, coarse) == expected.bits
    assert source.bits[source.clusters :].count() == 0


def test_a_merge_adds_what_changed_and_leaves_the_source_alone() -> None:
    size = 8 * CLUSTER + 5
    source, target = RecordingBitmap("a", size, CLUSTER), RecordingBitmap("b", size, 2 * CLUSTER)
    source.bitmap.set(3 * CLUSTER, 1)
    source.bitmap.set(8 * CLUSTER, 5)
    target.bitmap.set(0, 1)
    merge(source, target)
    assert (str(source.bitmap), str(target.bitmap)) == ("000100001", "11001")
    merge(target, source)
    assert str(source.bitmap) == "111100001"


def test_a_target_without_a_since_takes_that_of_the_source() -> None:
    source = RecordingBitmap("a", CLUSTER, since=SINCE)
    target = RecordingBitmap("b", CLUSTER)
    merge(source, target)
    assert target.since == SINCE
    other = Since("tuesday", "id of tuesday", 2.0)
    source.since = other
    merge(source, target)
    assert target.since == SINCE


def test_a_bitmap_that_is_cleared_belongs_to_no_chain() -> None:
    bitmap = RecordingBitmap("a", 3 * CLUSTER, CLUSTER, since=SINCE)
    bitmap.bitmap.set(0, 3 * CLUSTER)
    clear(bitmap)
    assert (str(bitmap.bitmap), bitmap.since) == ("000", None)


def test_bitmaps_that_are_lost_or_used_or_of_other_disks_are_not_merged_or_cleared() -> None:
    good = RecordingBitmap("good", CLUSTER)
    lost = RecordingBitmap("lost", CLUSTER, lost="the machine crashed")
    used = RecordingBitmap("used", CLUSTER)
    used.used_by = "nightly"
    for source, target in ((good, lost), (lost, good)):
        with pytest.raises(OSError, match=r"lost is lost \(the machine crashed\)") as caught:
            merge(source, target)
        assert caught.value.errno == errno.EINVAL
    for source, target in ((good, used), (used, good)):
        with pytest.raises(OSError, match="used is used by session nightly") as caught:
            merge(source, target)
        assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError, match=r"lost is lost .*: remove it and add it again") as caught:
        clear(lost)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="cannot be cleared before") as caught:
        clear(used)
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError, match="good is of 4096 bytes and big of 8192") as caught:
        merge(good, RecordingBitmap("big", 2 * CLUSTER))
    assert caught.value.errno == errno.EINVAL
