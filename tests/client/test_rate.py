"""The token bucket, on virtual time."""

from __future__ import annotations

import asyncio

import pytest

from fleecenbd.client.rate import BURST_S, Rate
from tests.simulation.loop import settle, simulate


def test_the_mean_is_exact_whatever_the_length_of_a_request() -> None:
    async def run() -> float:
        rate = Rate(1000)
        for _ in range(50):
            await rate.take(700)
        return asyncio.get_running_loop().time()

    # The first is free, and pays later.
    assert simulate(run()) == pytest.approx(49 * 0.7, abs=0.01)


def test_many_at_a_time_share_it_in_their_order() -> None:
    async def run() -> tuple[list[int], float]:
        rate, order = Rate(100), list[int]()

        async def one(number: int) -> None:
            await rate.take(100)
            order.append(number)

        await asyncio.gather(*map(one, range(5)))
        return order, asyncio.get_running_loop().time()

    order, elapsed = simulate(run())
    assert order == [0, 1, 2, 3, 4]
    assert elapsed == pytest.approx(4, abs=0.05)


def test_little_is_saved_up() -> None:
    async def run() -> float:
        rate = Rate(1000)
        await rate.take(1)
        await asyncio.sleep(1000)
        began = asyncio.get_running_loop().time()
        await rate.take(500)
        await rate.take(1)
        return asyncio.get_running_loop().time() - began

    assert simulate(run()) == pytest.approx(0.5 - BURST_S, abs=0.01)


@pytest.mark.parametrize("limit", [None, 100])
def test_what_is_held_waits_however_much_is_allowed(limit: float | None) -> None:
    async def run() -> float:
        rate = Rate(limit)
        rate.hold(True)
        waiting = [asyncio.create_task(rate.take(1)) for _ in range(3)]
        await asyncio.sleep(1000)
        assert not any(task.done() for task in waiting)
        rate.hold(False)
        await asyncio.gather(*waiting)
        return asyncio.get_running_loop().time()

    assert simulate(run()) == pytest.approx(1000, abs=0.1)


def test_no_limit_takes_no_time() -> None:
    async def run() -> float:
        rate = Rate()
        for _ in range(100):
            await rate.take(1 << 40)
        return asyncio.get_running_loop().time()

    assert simulate(run()) == 0.0


@pytest.mark.parametrize(("new", "after"), [(None, 0.0), (1000.0, 0.0), (1.0, 0.0)])
def test_a_new_limit_holds_for_who_waits_already(new: float | None, after: float) -> None:
    async def run() -> float:
        rate = Rate(1)
        await rate.take(1000)
        task = asyncio.ensure_future(rate.take(1))
        await settle()
        assert not task.done()
        began = asyncio.get_running_loop().time()
        rate.set(new)
        await task
        return asyncio.get_running_loop().time() - began

    assert simulate(run()) == after  # the debt is forgotten
