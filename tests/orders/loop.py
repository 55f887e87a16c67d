"""The virtual loop, driven from outside: it never decides by itself what comes next.

Completions of devices (``complete_at``) and timers are kept as events. Which of them comes, and
before which of the callbacks that are ready, is a choice of the run. The callbacks themselves stay
first in, first out, as asyncio has them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

from tests.simulation.loop import VirtualLoop


class OrderLoop(VirtualLoop):
    """A VirtualLoop whose next event somebody else chooses."""

    def __init__(self) -> None:
        super().__init__(None)
        self.completions: dict[Any, Callable[..., object]] = {}
        """What could happen next to each device call in flight."""

    def complete_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """The moment does not matter: the call goes on when it is chosen."""
        (call,) = args
        self.completions[call] = callback

    def ready(self) -> bool:
        """Is a callback ready?"""
        while self._ready and self._ready[0]._cancelled:
            self._ready.popleft()
        return bool(self._ready)

    def run_next(self) -> None:
        """Run the callback that has been ready for longest."""
        self._run(self._ready.popleft())

    def start(self, coro: Any, name: str) -> asyncio.Task[Any]:
        """A task whose first step runs now, as that of a request that has just arrived."""
        task = self.create_task(coro, name=name)
        self._run(self._ready.pop())
        return task

    def next_timer(self) -> asyncio.TimerHandle | None:
        """The timer that is due first."""
        timers = self._timers
        while timers and timers[0][3]._cancelled:
            heapq.heappop(timers)
        return timers[0][3] if timers else None

    def timers(self) -> list[asyncio.TimerHandle]:
        """All timers that still count, the first one first."""
        return [entry[3] for entry in sorted(self._timers) if not entry[3]._cancelled]

    def let_time_pass(self) -> None:
        """Until the next timer, which is due then."""
        self._now = self._timers[0][0]

    def fire(self) -> None:
        """The timer that is due first fires."""
        self._run(heapq.heappop(self._timers)[3])

    def _run(self, handle: asyncio.Handle) -> None:
        self.steps += 1
        handle._run()

    def ready_handles(self) -> list[asyncio.Handle]:
        """The callbacks that are ready, in their order."""
        return [handle for handle in self._ready if not handle._cancelled]
