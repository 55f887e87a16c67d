"""An asyncio event loop whose time is a number: nothing in it waits, and a run repeats exactly.

The loop does what asyncio's own does (ready callbacks first in, first out; timers by their time)
without sockets, threads or signals. Time stands still while anything is ready and then jumps to
the next timer. Two things a real loop does not have:

* ``complete_at`` is ``call_at`` for a device's completions: among completions of one moment, and
  against timers of that moment, the order is drawn from ``rng``. Everything else is FIFO.
* A loop that has nothing left to do while somebody waits is a deadlock, and says who waits.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

Result = TypeVar("Result")

STEPS_MAX = 200_000
"""Callbacks per run; more means that somebody is spinning."""


class Deadlock(Exception):
    """The loop has nothing left to do, and the main task still waits."""


class Spinning(Exception):
    """The loop ran STEPS_MAX callbacks without coming to an end."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """asyncio without the world: call_soon, call_at, futures and tasks on virtual time."""

    def __init__(self, rng: random.Random | None = None, *, steps_max: int = STEPS_MAX) -> None:
        self._rng = rng
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, float, int, asyncio.TimerHandle]] = []
        self._sequence = 0
        self._steps_max = steps_max
        self._settle_waiters: deque[asyncio.Future[None]] = deque()
        self._running = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.steps = 0
        self.failures: list[BaseException] = []
        """What callbacks raised and what nobody retrieved: never empty in a healthy run's end."""
        self.after_step: Callable[[], None] | None = None
        """Called after every callback: where the checkers look between any two awaits."""
        self.on_quiet: Callable[[], None] | None = None
        """Called when nobody is ready, before time passes: whoever waits now needs a reason."""

    # what asyncio asks a loop for

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Result], *, name: str | None = None, context: Any = None
    ) -> asyncio.Task[Result]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self._at(when, 0.5, callback, args, context)

    def complete_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """``call_at`` whose place among the events of one moment is drawn at random."""
        tie = self._rng.random() if self._rng is not None else 0.5
        self._at(when, tie, callback, args, None)

    def _at(
        self,
        when: float,
        tie: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (max(when, self._now), tie, self._sequence, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio tells the loop; the heap drops the handle when its turn comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        failure = context.get("exception") or RuntimeError(str(context.get("message")))
        self.failures.append(failure)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        """Nothing to do: there are none."""

    # running

    def run_until_idle(self) -> None:
        """Run until there is nothing ready and no timer left."""
        previous = events._get_running_loop()
        events._set_running_loop(self)
        self._running = True
        try:
            while self._step():
                pass
        finally:
            self._running = False
            events._set_running_loop(previous)

    def run_until_complete(self, coro: Coroutine[Any, Any, Result]) -> Result:  # type: ignore[override]
        """Run the coroutine to its end; Deadlock if the loop falls idle before."""
        previous = events._get_running_loop()
        events._set_running_loop(self)
        self._running = True
        try:
            main = self.create_task(coro, name="main")
            while not main.done():
                if not self._step():
                    raise Deadlock(f"nothing left to do; waiting: {self.who_waits()}")
            return main.result()
        finally:
            self._running = False
            events._set_running_loop(previous)

    def cancel_everything(self) -> None:
        """The run is over: end what still waits, without hooks and without time."""
        self.after_step = self.on_quiet = None
        self._timers.clear()
        self._steps_max = self.steps + STEPS_MAX
        for _ in range(3):
            for task in self.tasks:
                task.cancel()
            self.run_until_idle()
        self.tasks.clear()

    def who_waits(self) -> str:
        """The tasks that have not ended, and the line each of them waits at."""
        lines = []
        for task in self.tasks:
            if not task.done():
                frames = task.get_stack()
                where = f"{frames[-1].f_code.co_qualname}:{frames[-1].f_lineno}" if frames else "?"
                lines.append(f"{task.get_name()} at {where}")
        return "; ".join(lines) or "nobody"

    async def settled(self) -> None:
        """Return when everybody else waits for a timer or for a test's word."""
        waiter = self.create_future()
        self._settle_waiters.append(waiter)
        await waiter

    def _step(self) -> bool:
        """Run one callback; False when there is nothing left to do."""
        ready = self._ready
        if not ready:
            if self._settle_waiters:
                self._settle_waiters.popleft().set_result(None)
                return True
            if self.on_quiet is not None:
                self.on_quiet()
            if not ready and not self._next_timer():
                return False
        handle = ready.popleft()
        if not handle._cancelled:
            self.steps += 1
            if self.steps > self._steps_max:
                raise Spinning(f"{self.steps} callbacks; waiting: {self.who_waits()}")
            handle._run()
            if self.after_step is not None:
                self.after_step()
        return True

    def _next_timer(self) -> bool:
        timers = self._timers
        while timers:
            when, _, _, handle = heapq.heappop(timers)
            if not handle._cancelled:
                self._now = when
                self._ready.append(handle)
                return True
        return False


def simulate(coro: Coroutine[Any, Any, Result]) -> Result:
    """Run one coroutine on a virtual loop of its own; a failed callback is a failed run."""
    loop = VirtualLoop()
    result = loop.run_until_complete(coro)
    if loop.failures:
        raise loop.failures[0]
    return result


async def settle() -> None:
    """Let everybody run who can, without letting time pass (virtual loop only)."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    await loop.settled()
