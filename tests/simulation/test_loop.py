"""The virtual loop: time jumps, order is kept, deadlocks and spinning are found."""

from __future__ import annotations

import asyncio
import random

import pytest

from .loop import Deadlock, Spinning, VirtualLoop, settle, simulate


def test_time_passes_only_when_nobody_is_ready_and_then_at_once() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        moments = [loop.time()]
        for seconds in (0, 10, 3600):
            await asyncio.sleep(seconds)
            moments.append(loop.time())
        return moments

    assert simulate(main()) == [0, 0, 10, 3610]


def test_callbacks_run_first_in_first_out_and_timers_by_their_time() -> None:
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2, seen.append, "late")
        loop.call_later(1, seen.append, "first at 1")
        loop.call_later(1, seen.append, "second at 1")
        loop.call_soon(seen.append, "soon")
        await asyncio.sleep(3)

    simulate(main())
    assert seen == ["soon", "first at 1", "second at 1", "late"]


def test_a_cancelled_timer_never_runs() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(5, pytest.fail, "it ran").cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(100), 7)
        return loop.time()

    assert simulate(main()) == 7


def test_completions_of_one_moment_come_in_an_order_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        seen: list[int] = []
        loop = VirtualLoop(random.Random(seed))
        for number in range(6):
            loop.complete_at(1.0, seen.append, number)
        loop.run_until_idle()
        return seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(10)}) > 5


def test_a_deadlock_says_who_waits() -> None:
    async def waits_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match="waits_for_nobody"):
        simulate(waits_for_nobody())


def test_spinning_is_found() -> None:
    async def spin() -> None:
        asyncio.get_running_loop().call_soon(again)
        await asyncio.get_running_loop().create_future()

    def again() -> None:
        asyncio.get_running_loop().call_soon(again)

    with pytest.raises(Spinning):
        VirtualLoop(steps_max=1000).run_until_complete(spin())


def test_settle_returns_when_everybody_else_waits_and_no_time_has_passed() -> None:
    async def main() -> tuple[bool, bool, float]:
        async def hops() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        busy = asyncio.ensure_future(hops())
        sleeper = asyncio.ensure_future(asyncio.sleep(1))
        await settle()
        answer = busy.done(), sleeper.done(), asyncio.get_running_loop().time()
        await sleeper
        return answer

    assert simulate(main()) == (True, False, 0.0)


def test_a_failed_callback_fails_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):
        simulate(main())
