"""The engine's small data structures against models that are too simple to be wrong."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fleecenbd.engine.bitmap import Bitmap, cluster_runs
from fleecenbd.engine.parts import RANGES_MAX, PartTable
from fleecenbd.engine.reqlist import RangeRequest, RequestList, Waiters
from tests.simulation.loop import settle, simulate

CLUSTER = 4096


class BitmapModel(RuleBasedStateMachine):
    """A Bitmap, in memory of its own and in a caller's buffer, against a list of bools."""

    @initialize(clusters=st.integers(1, 40), tail=st.integers(1, CLUSTER), fill=st.booleans())
    def make(self, clusters: int, tail: int, fill: bool) -> None:
        self.size = (clusters - 1) * CLUSTER + tail
        self.model = [fill] * clusters
        self.bitmap = Bitmap(self.size, CLUSTER, fill=fill)
        length = Bitmap.bitmap_length(self.size, CLUSTER)
        self.buffer = bytearray((b"\xff" if fill else b"\0") * length)
        self.mapped = Bitmap(self.size, CLUSTER, buffer=self.buffer)

    def touched(self, offset: int, length: int) -> range:
        offset %= self.size
        length = min(length, self.size - offset)
        self.offset, self.length = offset, length
        if not length:
            return range(0)
        return range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1)

    @rule(
        offset=st.integers(0, 40 * CLUSTER), length=st.integers(0, 9 * CLUSTER), bit=st.booleans()
    )
    def store(self, offset: int, length: int, bit: bool) -> None:
        clusters = self.touched(offset, length)
        for cluster in clusters:
            self.model[cluster] = bit
        for bitmap in (self.bitmap, self.mapped):
            change = bitmap.set if bit else bitmap.clear
            change(self.offset, self.length)

    @rule(offset=st.integers(0, 40 * CLUSTER), length=st.integers(0, 9 * CLUSTER))
    def look(self, offset: int, length: int) -> None:
        clusters = self.touched(offset, length)
        bits = [self.model[cluster] for cluster in clusters]
        for bitmap in (self.bitmap, self.mapped):
            assert bitmap.any(self.offset, self.length) == any(bits)
            assert bitmap.all(self.offset, self.length) == all(bits)
            first, end = bitmap.span(self.offset, self.length)
            assert list(range(first, end)) == list(clusters)

    @rule(offset=st.integers(0, 40 * CLUSTER), length=st.integers(1, 9 * CLUSTER))
    def runs(self, offset: int, length: int) -> None:
        self.touched(offset, length)
        position = self.offset
        previous = None
        for start, run, bit in self.bitmap.runs(self.offset, self.length):
            assert start == position
            assert run > 0
            assert bit != previous
            assert {self.model[c] for c in self.touched(start, run)} == {bit}
            self.touched(offset, length)
            position, previous = start + run, bit
        assert position == self.offset + self.length

    @invariant()
    def counts_the_bytes_of_the_disk(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = sum(
            min(CLUSTER, self.size - cluster * CLUSTER)
            for cluster, bit in enumerate(self.model)
            if bit
        )
        assert self.bitmap.count_bytes() == expected
        assert self.mapped.count_bytes() == expected

    @invariant()
    def the_buffer_holds_the_bits_and_no_padding(self) -> None:
        if not hasattr(self, "model"):
            return
        bits = int.from_bytes(self.buffer, "little")
        assert bits == sum(1 << cluster for cluster, bit in enumerate(self.model) if bit)

    @invariant()
    def cluster_runs_are_the_runs_of_set_bits(self) -> None:
        if not hasattr(self, "model"):
            return
        seen = set()
        last = -1
        for first, end in cluster_runs(self.bitmap.bits, 0, len(self.model)):
            assert last < first < end
            last = end
            seen.update(range(first, end))
        assert seen == {cluster for cluster, bit in enumerate(self.model) if bit}


BitmapModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestABitmapIsAListOfBools = BitmapModel.TestCase


class RequestListModel(RuleBasedStateMachine):
    """A RequestList against a list of ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: RequestList[RangeRequest] = RequestList()
        self.model: list[RangeRequest] = []

    @rule(first=st.integers(0, 20), length=st.integers(1, 8))
    def begin(self, first: int, length: int) -> None:
        self.model.append(self.requests.add(RangeRequest(first, first + length)))

    @rule(index=st.integers(0, 30))
    def end(self, index: int) -> None:
        if self.model:
            request = self.model.pop(index % len(self.model))
            assert not request.ended
            self.requests.remove(request)
            assert request.ended

    @rule(first=st.integers(0, 28), length=st.integers(1, 8))
    def overlapping(self, first: int, length: int) -> None:
        wanted = set(range(first, first + length))
        assert self.requests.overlapping(first, first + length) == [
            r for r in self.model if wanted & set(range(r.first, r.end))
        ]

    @invariant()
    def says_what_is_in_flight(self) -> None:
        assert list(self.requests) == self.model
        assert len(self.requests) == len(self.model)
        assert bool(self.requests) == bool(self.model)


RequestListModel.TestCase.settings = settings(max_examples=50, deadline=None)
TestARequestListIsAListOfRanges = RequestListModel.TestCase

RANGE = st.tuples(st.integers(0, 20), st.integers(1, 8))


@settings(max_examples=100, deadline=None)
@given(
    waits=st.lists(st.tuples(RANGE, st.none() | st.integers(1, 9)), max_size=8),
    wakes=st.lists(RANGE, max_size=4),
)
def test_a_wake_wakes_exactly_those_who_wait_for_its_range(
    waits: list[tuple[tuple[int, int], int | None]], wakes: list[tuple[int, int]]
) -> None:
    async def run() -> None:
        waiters = Waiters()
        loop = asyncio.get_running_loop()
        tasks = [
            loop.create_task(waiters.wait(first, first + length, deadline))
            for (first, length), deadline in waits
        ]
        await settle()
        assert len(waiters) == len(waits)
        awake: set[int] = set()
        for first, length in wakes:
            wanted = set(range(first, first + length))
            hit = {
                index
                for index, ((start, count), _) in enumerate(waits)
                if index not in awake and wanted & set(range(start, start + count))
            }
            assert waiters.wake(first, first + length) == len(hit)
            awake |= hit
        await settle()
        assert {index for index, task in enumerate(tasks) if task.done()} == awake
        await asyncio.sleep(10)
        for index, (task, (_, deadline)) in enumerate(zip(tasks, waits, strict=True)):
            if index in awake:
                assert task.result() is True
            elif deadline is not None:
                assert task.result() is False
            else:
                assert not task.done()
        waiters.wake_all()
        await asyncio.gather(*tasks)
        assert len(waiters) == 0

    simulate(run())


def test_a_wait_that_is_cancelled_leaves_nothing_behind() -> None:
    async def run() -> None:
        waiters = Waiters()
        task = asyncio.ensure_future(waiters.wait(0, 4, 100.0))
        await settle()
        task.cancel()
        await settle()
        assert task.cancelled()
        assert len(waiters) == 0
        assert waiters.wake(0, 4) == 0

    simulate(run())


def test_a_wake_in_the_step_of_the_deadline_counts_as_a_wake() -> None:
    async def run() -> None:
        waiters = Waiters()
        loop = asyncio.get_running_loop()
        wrong: list[object] = []
        loop.set_exception_handler(lambda loop, context: wrong.append(context))
        # Both are due already: the loop calls them one after the other, the waiter afterwards.
        now = loop.time()
        loop.call_at(now - 2, waiters.wake, 0, 1)
        assert await waiters.wait(0, 1, now - 1) is True
        assert wrong == []

    asyncio.run(run())


PART = st.tuples(st.integers(0, 3), st.integers(0, 15), st.integers(1, 16))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PART, max_size=40), parts_max=st.integers(1, 4))
def test_parts_of_a_cluster_are_a_union_of_bytes(
    parts: list[tuple[int, int, int]], parts_max: int
) -> None:
    whole = 16
    table = PartTable(parts_max)
    model: dict[int, set[int]] = {}
    for cluster, start, length in parts:
        end = min(start + length, whole)
        covered = model.pop(cluster, set()) | set(range(start, end))
        is_whole = table.add(cluster, start, end, whole)
        assert is_whole == (len(covered) == whole)
        if not is_whole:
            model[cluster] = covered
            if len(model) > parts_max:
                # The oldest entry is forgotten, and its cluster stays.
                del model[next(iter(model))]
        assert len(table) == len(model)


@pytest.mark.parametrize("gap", range(1, 15))
@pytest.mark.parametrize("head_first", [True, False])
def test_parts_with_a_byte_missing_between_them_are_no_whole(gap: int, head_first: bool) -> None:
    table = PartTable()
    parts = [(0, gap), (gap + 1, 16)]
    for start, end in parts if head_first else reversed(parts):
        assert not table.add(7, start, end, 16)
    assert table.add(7, gap, gap + 1, 16)


@given(first=st.integers(0, 5), end=st.integers(0, 5))
def test_parts_of_released_clusters_are_forgotten(first: int, end: int) -> None:
    table = PartTable()
    for cluster in range(5):
        table.add(cluster, 0, 8, 16)
    table.forget(first, end)
    for cluster in range(5):
        assert table.add(cluster, 8, 16, 16) == (not first <= cluster < end)


def test_a_cluster_in_too_many_parts_is_forgotten_and_never_called_whole() -> None:
    table = PartTable()
    whole = 4 * RANGES_MAX
    for part in range(RANGES_MAX + 1):
        assert not table.add(7, part * 3, part * 3 + 1, whole)
    assert len(table) == 0
    assert not table.add(7, 1, whole, whole)
