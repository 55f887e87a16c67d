"""Block status against a naive answer; and long work that must not keep the loop."""

from __future__ import annotations

import asyncio
import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.extents import STATUS_EXTENTS_MAX
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.session import SessionOptions, arm
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from fleecenbd.storage.device import EXTENT_ZERO
from fleecenbd.storage.memory import MemoryDevice
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import Scene, simulated

PAGE = 4096
BIG_CLUSTER = 2 * PAGE
PAGES = 24


async def _armed(device: MemoryDevice, cluster_size: int = BIG_CLUSTER) -> tuple[Disk, Fleece]:
    disk = Disk("vda", device)

    async def make_temp(disk: Disk, cluster: int, session_id: str) -> MemoryDevice:
        return MemoryDevice(-(-disk.size // cluster) * cluster, name="temp")

    session = await arm(
        "s", [disk], SessionOptions(cluster_size=cluster_size), make_temp, clock=lambda: 0.0
    )
    return disk, session.fleeces[0]


@settings(deadline=None)
@given(
    data_pages=st.sets(st.integers(0, PAGES - 1)),
    written=st.lists(st.integers(0, PAGES - 1), max_size=12),
    released=st.lists(st.integers(0, PAGES // 2 - 1), max_size=6),
    tail=st.sampled_from([0, 512, PAGE]),
    offset=st.integers(0, PAGES * PAGE - 1),
    length=st.integers(1, PAGES * PAGE),
)
def test_block_status_says_zero_for_what_was_zero_and_data_for_all_else(
    data_pages: set[int],
    written: list[int],
    released: list[int],
    tail: int,
    offset: int,
    length: int,
) -> None:
    async def run() -> None:
        size = PAGES * PAGE + tail
        device = MemoryDevice(size)
        for page in data_pages:
            device.pwrite_now(page * PAGE, b"d" * PAGE)
        before = device.pread_now(0, size)
        assert before is not None
        disk, fleece = await _armed(device)
        for page in written:
            await disk.write(page * PAGE + 100, b"w" * 200)
        for cluster in released:
            await fleece.trim(cluster * BIG_CLUSTER, BIG_CLUSTER)
        asked = min(length, size - offset)
        extents = await fleece.status(offset, asked)
        assert sum(run for run, _ in extents) == asked
        position = offset
        for run, flags in extents:
            zero = bool(flags & EXTENT_ZERO)
            if zero:
                assert not any(before[position : position + run])
            position += run
        # Every cluster that was all zero and may be read is said to be zero, whole.
        position = offset
        said = bytearray()
        for run, flags in extents:
            said += bytes([flags & EXTENT_ZERO]) * run
        for first in range(0, size, BIG_CLUSTER):
            end = min(first + BIG_CLUSTER, size)
            low, high = max(first, offset) - offset, min(end, offset + asked) - offset
            if low < high and not any(before[first:end]):
                readable = first // BIG_CLUSTER not in released
                assert all(said[low:high]) == readable

    asyncio.run(run())


async def test_an_answer_of_many_extents_ends_early_and_goes_on_from_there() -> None:
    clusters = 4 * STATUS_EXTENTS_MAX
    device = MemoryDevice(clusters * PAGE)
    disk, fleece = await _armed(device, PAGE)
    for cluster in range(0, clusters, 2):
        fleece.done.bits[cluster] = 1
        fleece.copy.bits[cluster] = 0
        fleece.state.charged.bits[cluster] = 1
    position = 0
    answers = 0
    while position < disk.size:
        extents = await fleece.status(position, disk.size - position)
        assert len(extents) <= STATUS_EXTENTS_MAX + 1
        for run, flags in extents:
            assert (run, bool(flags & EXTENT_ZERO)) == (PAGE, position // PAGE % 2 == 1)
            position += run
        answers += 1
    assert answers == 4


async def test_a_map_of_many_runs_of_one_kind_is_one_extent() -> None:
    clusters = 4 * STATUS_EXTENTS_MAX
    device = MemoryDevice(clusters * PAGE)
    for cluster in range(clusters):
        device.pwrite_now(cluster * PAGE, b"d" * 10)
    disk, fleece = await _armed(device, PAGE)
    fleece.done.bits[::2] = 1
    fleece.copy.bits[::2] = 0
    fleece.state.charged.bits[::2] = 1
    assert await fleece.status(0, disk.size) == [(disk.size, 0)]


@simulated
async def test_clusters_longer_than_a_copy_leave_fewer_slots() -> None:
    scene = Scene(size=64 << 20)
    fleece = await scene.arm(cluster_size=8 << 20)
    scene.active.gate("read")
    guests = [
        asyncio.ensure_future(scene.disk.write(cluster * (8 << 20), b"x")) for cluster in range(8)
    ]
    await scene.active.reached("read")
    await settle()
    assert len(scene.active.waiting) == 2, "16 MiB of buffers"
    scene.active.open("read")
    await asyncio.gather(*guests)
    assert fleece.stats.copies_done == 8


async def test_copies_that_wait_are_not_looked_through_at_every_copys_end() -> None:
    clusters = 4096
    disk, fleece = await _armed(MemoryDevice(clusters * PAGE, now=False), PAGE)
    fleece.done.bits[::2] = 1
    fleece.copy.bits[::2] = 0
    looks = 0
    find = fleece.access.bits.find

    class Counted:
        """The access bits, with every look for a bit counted."""

        def find(self, *arguments: int) -> int:
            nonlocal looks
            looks += 1
            return int(find(*arguments))

        def __getattr__(self, name: str) -> object:
            return getattr(bits, name)

        def __getitem__(self, index: slice) -> object:
            return bits[index]

    bits = fleece.access.bits
    fleece.state.access.bits = Counted()  # type: ignore[assignment]
    await disk.write_zeroes(0, clusters * PAGE)
    assert fleece.stats.copies_done == clusters // 2
    assert looks < 10 * clusters


@simulated
async def test_a_guest_write_that_fails_starts_no_second_copy() -> None:
    scene = Scene()
    fleece = await scene.arm(on_cbw_error=BREAK_GUEST_WRITE)
    temp = fleece.temp
    assert isinstance(temp, GatedDevice)
    temp.gate("write")
    writing = scene.write(0)
    (await temp.reached("write")).fail()
    with pytest.raises(OSError, match="could not be copied") as caught:
        await writing
    assert caught.value.errno == errno.EIO
    assert fleece.stats.copies_started == 1
