"""The thread pool: results come back, a hung call holds up nobody, closing waits for the last."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from fleecenbd.storage.pool import ThreadPool

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    """Run a coroutine on a loop of its own, as asyncio.run does."""

    def run_on_new_loop(main: Awaitable[Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main)

    return run_on_new_loop


def finished(pool: ThreadPool) -> None:
    """Close a pool and wait, on no loop, for its last thread's last act."""
    ended = threading.Event()
    pool.close(ended.set)
    assert ended.wait(10)


def test_results_and_errors_come_back_to_their_callers(run) -> None:
    pool = ThreadPool("disk", "active")

    async def main() -> list[Any]:
        calls = [pool.run(divmod, 7, n) for n in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    by_zero, by_one, by_two = run(main())
    assert isinstance(by_zero, ZeroDivisionError)
    assert (by_one, by_two) == ((7, 0), (3, 1))
    finished(pool)


def test_many_results_take_few_wake_ups(run) -> None:
    pool = ThreadPool("disk", "active", size_max=4)
    wake_ups = 0

    async def main() -> None:
        nonlocal wake_ups
        loop = asyncio.get_running_loop()
        gate = threading.Event()
        calls = [pool.run(gate.wait) for _ in range(4)]
        calls += [pool.run(int) for _ in range(996)]
        call_soon_threadsafe = loop.call_soon_threadsafe

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(loop, name)

            def call_soon_threadsafe(self, *arguments: Any) -> Any:
                nonlocal wake_ups
                wake_ups += 1
                return call_soon_threadsafe(*arguments)

        pool._outbox.loop = Counting()  # uvloop's loops take no attributes
        gate.set()
        while pool.unfinished:  # the loop is busy: it handles nothing until all have ended
            pass
        await asyncio.gather(*calls)

    run(main())
    assert 1 <= wake_ups <= 10
    finished(pool)


def test_no_more_threads_run_than_the_limit(run) -> None:
    pool = ThreadPool("disk", "active", size_max=3)
    lock = threading.Lock()
    gate = threading.Event()
    together = at_most = 0

    def call() -> None:
        nonlocal together, at_most
        with lock:
            together += 1
            at_most = max(at_most, together)
            if together == 3:
                gate.set()
        assert gate.wait(10)
        with lock:
            together -= 1

    async def main() -> None:
        assert pool.size == 0
        await asyncio.gather(*(pool.run(call) for _ in range(50)))
        assert pool.size <= 3

    run(main())
    assert at_most == 3
    finished(pool)


def test_one_call_at_a_time_takes_one_thread(run) -> None:
    pool = ThreadPool("disk", "active")

    async def main() -> set[int]:
        return {await pool.run(threading.get_ident) for _ in range(20)}

    assert len(run(main())) == 1
    finished(pool)


def test_threads_with_nothing_to_do_end_and_come_back(run) -> None:
    pool = ThreadPool("disk", "active", idle_s=0.001)

    async def main() -> None:
        for _ in range(3):
            thread = await pool.run(threading.current_thread)
            thread.join(10)
            assert not thread.is_alive()
            assert pool.size == 0

    run(main())
    finished(pool)


def test_idle_threads_end_when_the_pool_is_closed(run) -> None:
    pool = ThreadPool("disk", "active", size_max=4)
    barrier = threading.Barrier(4)

    def call() -> threading.Thread:
        barrier.wait(10)
        return threading.current_thread()

    async def main() -> list[threading.Thread]:
        threads = await asyncio.gather(*(pool.run(call) for _ in range(4)))
        pool.close()
        await pool.wait_closed()
        return threads

    for thread in run(main()):
        thread.join(5)  # far less than the idle time
        assert not thread.is_alive()
    assert pool.size == 0


def test_a_cancelled_await_leaves_the_call_running_and_the_others_alone(run) -> None:
    pool = ThreadPool("disk", "active")
    gate = threading.Event()
    ended = []

    def call() -> None:
        assert gate.wait(10)
        ended.append(True)

    async def main() -> int:
        slow = asyncio.ensure_future(pool.run(call))
        await asyncio.sleep(0)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert not ended
        gate.set()
        answer = await pool.run(int, "42")
        pool.close()
        await pool.wait_closed()
        return answer

    assert run(main()) == 42
    assert ended == [True]


def test_a_closed_pool_takes_no_more_calls_and_ends_with_its_last_one(run) -> None:
    pool = ThreadPool("disk", "active", size_max=2)
    gate = threading.Event()
    events: list[str] = []

    def call(name: str) -> None:
        assert gate.wait(10)
        events.append(name)

    async def main() -> None:
        calls = [pool.run(call, "call") for _ in range(5)]
        pool.close(lambda: events.append("last"))
        pool.close(lambda: events.append("never"))
        with pytest.raises(OSError, match="the device was closed"):
            pool.run(int)
        waiters = [asyncio.ensure_future(pool.wait_closed()) for _ in range(2)]
        await asyncio.sleep(0)
        assert events == []
        assert not any(waiter.done() for waiter in waiters)
        gate.set()
        await asyncio.gather(*waiters)
        assert events == ["call"] * 5 + ["last"]
        await asyncio.gather(*calls)
        await pool.wait_closed()

    run(main())


def test_a_pool_that_never_ran_a_call_closes(run) -> None:
    pool = ThreadPool("disk", "active")
    ended = []

    async def main() -> None:
        pool.close(lambda: ended.append(True))
        await pool.wait_closed()

    run(main())
    assert ended == [True]


def test_a_loop_that_was_closed_in_between_does_no_harm(run) -> None:
    pool = ThreadPool("disk", "active")
    gate = threading.Event()
    ended = threading.Event()

    def call() -> None:
        assert gate.wait(10)
        ended.set()

    async def leave() -> None:
        pool.run(call)
        pool.run(gate.wait, 10)

    async def come_back() -> int:
        gate.set()
        return await pool.run(int, "42")

    run(leave())
    assert run(come_back()) == 42
    assert ended.wait(10)
    finished(pool)


def test_a_hung_call_holds_up_no_other_pool(run) -> None:
    hung, healthy = ThreadPool("hung", "temp", size_max=2), ThreadPool("disk", "active")
    gate = threading.Event()

    async def main() -> int:
        for _ in range(5):
            hung.run(gate.wait, 10)
        return await healthy.run(int, "42")

    assert run(main()) == 42
    assert hung.unfinished == 5
    gate.set()
    finished(hung)
    finished(healthy)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No thread can be started, until this is undone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return monkeypatch


def test_a_call_that_no_thread_can_be_started_for_is_an_error_of_the_system(
    run, no_threads: pytest.MonkeyPatch
) -> None:
    pool = ThreadPool("disk", "active")

    async def main() -> int:
        with pytest.raises(OSError, match=r"no thread can be started.*disk") as caught:
            pool.run(int)
        assert caught.value.errno == errno.EAGAIN
        assert (pool.size, pool.unfinished) == (0, 0)
        no_threads.undo()
        return await pool.run(int, "42")

    assert run(main()) == 42
    finished(pool)


def test_calls_wait_for_the_threads_there_are_where_no_more_can_be_started(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ThreadPool("disk", "active")
    gate = threading.Event()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> list[Any]:
        calls: list[Any] = [pool.run(gate.wait, 10)]
        monkeypatch.setattr(threading.Thread, "start", refuse)
        calls.append(pool.run(int, "42"))
        gate.set()
        return await asyncio.gather(*calls)

    assert run(main()) == [True, 42]
    finished(pool)


def test_a_pool_closes_without_a_thread_where_none_can_be_started(
    run, no_threads: pytest.MonkeyPatch
) -> None:
    pool = ThreadPool("disk", "active")
    ended: list[int] = []

    async def main() -> None:
        waiter = asyncio.ensure_future(pool.wait_closed())
        await asyncio.sleep(0)
        pool.close(lambda: ended.append(threading.get_ident()))
        assert ended == [threading.get_ident()]
        pool.close(lambda: ended.append(0))
        await waiter
        await pool.wait_closed()
        with pytest.raises(OSError, match="the device was closed"):
            pool.run(int)

    run(main())
    assert len(ended) == 1
    assert (pool.size, pool.unfinished) == (0, 0)


@pytest.mark.parametrize("threads", [True, False])
def test_a_close_that_fails_is_told_and_is_a_close(
    run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, threads: bool
) -> None:
    pool = ThreadPool("disk", "active")

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        if not threads:
            monkeypatch.setattr(threading.Thread, "start", refuse)
        pool.close(fail)
        await pool.wait_closed()

    run(main())
    (message,) = caplog.messages
    assert "disk" in message
    assert pool.size == 0


HUNG_PROCESS = """
import asyncio, threading
from fleecenbd.storage.pool import ThreadPool

async def main():
    pool = ThreadPool("hung", "temp")
    started = threading.Event()
    pool.run(lambda: (started.set(), threading.Event().wait()))
    started.wait()
    pool.close()

asyncio.run(main())
print("ended")
"""


def test_a_hung_call_does_not_keep_the_process_from_ending() -> None:
    process = subprocess.run(
        [sys.executable, "-c", HUNG_PROCESS], timeout=30, capture_output=True, text=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "ended\n", "")
