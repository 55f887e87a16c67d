"""The state of a fleece: its one release, its ends, what it charges, and what a guest waits for."""

from __future__ import annotations

import asyncio
import errno

import pytest
from bitarray import bitarray

from fleecenbd.engine.reqlist import RangeRequest, Waiters
from fleecenbd.engine.state import Copy, FleeceState, FrozenRead
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, simulated


def _state(clusters: int = 8, **options: object) -> FleeceState:
    size = clusters * CLUSTER
    return FleeceState(
        "vda@s",
        GatedDevice("active", size),
        GatedDevice("temp", size),
        cluster_size=CLUSTER,
        **options,  # type: ignore[arg-type]
    )


def test_a_new_fleece_may_read_and_must_copy_everything() -> None:
    state = _state()
    assert "0" not in str(state.access)
    assert "0" not in str(state.copy)
    assert not state.done.bits.any()
    assert not state.charged.bits.any()
    assert (state.clusters, state.shift, state.size) == (8, 12, 8 * CLUSTER)
    assert (state.on_cbw_error, state.cbw_timeout_s, state.temp_limit) == (
        "break-snapshot",
        0.0,
        None,
    )
    assert (state.dead, state.broken, state.finished) == (False, None, False)


def test_a_temp_image_that_is_not_empty_is_charged_whole() -> None:
    state = _state(target_reads_zero=False)
    assert "0" not in str(state.charged)
    assert state.stats.temp_clusters == 8


def test_a_release_says_how_many_bytes_were_given_up_and_only_once() -> None:
    state = _state()
    assert state.release(1, 3) == 0
    assert str(state.access) == str(state.copy) == "10011111"
    assert state.stats.released_bytes == 2 * CLUSTER
    state.release(1, 3)
    state.release(2, 4)
    assert state.stats.released_bytes == 3 * CLUSTER


def test_a_copy_that_loses_clusters_is_counted_as_cancelled_once() -> None:
    state = _state()
    early, late = state.copies.add(Copy(0, 2)), state.copies.add(Copy(4, 6))
    state.release(2, 4)
    assert (early.lost, late.lost, state.stats.copies_cancelled) == (False, False, 0)
    state.release(1, 3)
    assert (early.lost, late.lost, state.stats.copies_cancelled) == (True, False, 1)
    state.release(0, 1)
    assert state.stats.copies_cancelled == 1
    state.release(5, 8)
    assert (late.lost, state.stats.copies_cancelled) == (True, 2)


def test_a_copy_of_the_first_cluster_is_cancelled_as_any_other() -> None:
    state = _state()
    copy = state.copies.add(Copy(0, 1))
    state.release(0, 1)
    assert copy.lost
    assert state.stats.copies_cancelled == 1


def test_a_copy_whose_clusters_were_released_before_loses_nothing_more() -> None:
    state = _state()
    state.release(0, 2)
    copy = state.copies.add(Copy(0, 2))
    state.release(1, 4)
    assert not copy.lost
    assert state.stats.copies_cancelled == 0


@simulated
async def test_a_release_wakes_those_who_wait_there_and_behind_reads_that_it_spoilt() -> None:
    state = _state()
    state.frozen_reads.add(FrozenRead(2, 6))
    state.frozen_reads.add(FrozenRead(0, 1))
    tasks = [
        asyncio.ensure_future(state.guests.wait(first, first + 1)) for first in (0, 1, 2, 5, 7)
    ]
    await settle()
    assert state.release(5, 7) == 2
    await settle()
    assert [task.done() for task in tasks] == [False, False, True, True, False]
    assert state.release(1, 2) == 1
    await settle()
    assert state.guests.wake_all() == 2
    await asyncio.gather(*tasks)


@simulated
async def test_a_release_beside_a_read_wakes_nobody_behind_it() -> None:
    state = _state()
    state.frozen_reads.add(FrozenRead(2, 6))
    guest = asyncio.ensure_future(state.guests.wait(3, 4))
    await settle()
    assert state.release(0, 2) == 0
    assert state.release(6, 8) == 0
    assert not guest.done()
    assert state.release(2, 3) == 1
    assert await guest is True


def test_wakes_are_counted_by_all_who_wait() -> None:
    @simulated
    async def run() -> None:
        waiters = Waiters()
        tasks = [asyncio.ensure_future(waiters.wait(n, n + 1)) for n in range(3)]
        await settle()
        assert waiters.wake(0, 1) == 1
        assert waiters.wake_all() == 2, "one has been woken before"
        assert await asyncio.gather(*tasks) == [True, True, True]
        assert waiters.wake_all() == 0

    run()


def test_a_fleece_breaks_once_and_keeps_the_first_cause() -> None:
    state = _state()
    calls: list[str] = []
    state.on_dead.append(lambda: calls.append(str(state.broken)))
    state.break_session("the first")
    state.break_session("the second")
    state.finish()
    state.finish()
    assert calls == ["the first"]
    assert (state.dead, state.broken, state.finished) == (True, "the first", True)
    assert not state.access.bits.any()
    assert state.target.closed  # type: ignore[attr-defined]
    death = state.death()
    assert (death.errno, death.strerror) == (errno.EIO, "vda@s is broken: the first")


def test_a_finished_fleece_does_not_break() -> None:
    state = _state()
    calls: list[bool] = []
    state.on_dead.append(lambda: calls.append(state.finished))
    state.finish()
    state.break_session("too late")
    assert calls == [True]
    assert state.broken is None
    death = state.death()
    assert (death.errno, death.strerror) == (errno.ESHUTDOWN, "vda@s: the session is finished")


@simulated
async def test_an_end_wakes_guests_and_trims() -> None:
    state = _state()
    guest = asyncio.ensure_future(state.guests.wait(3, 4))
    trim = asyncio.ensure_future(state.trims.wait(5, 6))
    await settle()
    state.finish()
    assert await asyncio.gather(guest, trim) == [True, True]


def test_a_limit_may_be_reached_but_not_passed() -> None:
    state = _state(temp_limit=3 * CLUSTER)
    state.charge(0, 2)
    state.charge(0, 2)
    state.charge(1, 3)
    assert state.stats.temp_clusters == 3
    with pytest.raises(OSError, match="image of vda@s reached its limit of 12288 b") as caught:
        state.charge(2, 4)
    assert caught.value.errno == errno.ENOSPC
    assert str(state.charged) == "11100000"
    assert (state.stats.temp_clusters, state.stats.limit_hits) == (3, 1)
    with pytest.raises(OSError, match="reached its limit"):
        state.charge(4, 8)
    assert (state.stats.temp_clusters, state.stats.limit_hits) == (3, 2)
    state.uncharge(0, 4)
    assert state.stats.temp_clusters == 0
    state.charge(7, 8)
    assert (state.stats.temp_clusters, state.stats.temp_clusters_peak) == (1, 3)
    state.uncharge(0, 7)
    assert str(state.charged) == "00000001"


def test_a_copy_in_flight_counts_where_it_overlaps_and_access_is_set() -> None:
    state = _state()
    assert not state.copy_in_flight(0, 8)
    state.copies.add(Copy(2, 5))
    found = [state.copy_in_flight(cluster, cluster + 1) for cluster in range(8)]
    assert found == [cluster in (2, 3, 4) for cluster in range(8)]
    assert state.copy_in_flight(0, 3)
    assert state.copy_in_flight(4, 8)
    assert not state.copy_in_flight(5, 8)
    state.release(3, 5)
    assert state.copy_in_flight(0, 8)
    assert not state.copy_in_flight(3, 8)
    state.copies.add(Copy(6, 7))
    assert state.copy_in_flight(3, 8)


def test_a_read_holds_up_guests_of_its_range_until_it_has_lost_a_part() -> None:
    access = bitarray("11111111", endian="little")
    read = FrozenRead(2, 5)
    assert [read.holds_up(access, n, n + 1) for n in range(8)] == [n in (2, 3, 4) for n in range(8)]
    assert read.holds_up(access, 0, 8)
    access[5] = access[1] = 0
    assert read.holds_up(access, 4, 6)
    access[4] = 0
    assert not read.holds_up(access, 2, 3)


def test_a_block_status_holds_up_guests_of_what_it_asks_about_and_may_read() -> None:
    access = bitarray("11111111", endian="little")
    read = FrozenRead(2, 6, bitarray("1011", endian="little"))
    held = [read.holds_up(access, n, n + 1) for n in range(8)]
    assert held == [n in (2, 4, 5) for n in range(8)]
    assert read.holds_up(access, 3, 5)
    access[4] = 0
    assert not read.holds_up(access, 3, 5)
    assert read.holds_up(access, 3, 6)
    state = _state()
    assert not state.frozen(0, 8)
    state.frozen_reads.add(read)
    assert state.frozen(0, 8)
    assert not state.frozen(6, 8)


def test_requests_show_their_range_and_whether_they_have_ended() -> None:
    request = RangeRequest(3, 5)
    assert repr(request) == "RangeRequest(3, 5)"
    request.ended = True
    assert repr(request) == "RangeRequest(3, 5, ended)"
    assert repr(Copy(0, 1)) == "Copy(0, 1)"
