"""Requests in flight over ranges of clusters, and those who wait for a range.

A request list is short (a few hundred at most: every source of requests has a limit), so a scan
beats a tree. Ranges are half-open cluster ranges ``[first, end)``.

Waiting is by range, never by request: whoever changes something that another could wait for (a
copy ends, a range is released, a frozen read thaws) wakes the range, and the woken look again
at what they wait for. So nobody can wait for a request that no longer matters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Generic, TypeVar


class RangeRequest:
    """A request in flight over the clusters ``[first, end)``."""

    __slots__ = ("end", "ended", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self.ended = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.first}, {self.end}{', ended' if self.ended else ''})"


RequestT = TypeVar("RequestT", bound=RangeRequest)


class RequestList(Generic[RequestT]):
    """Requests in flight, in the order in which they began. True while there is one."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: dict[RequestT, None] = {}

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RequestT]:
        return iter(self._requests)

    def add(self, request: RequestT) -> RequestT:
        self._requests[request] = None
        return request

    def remove(self, request: RequestT) -> None:
        """The request has ended. Raises KeyError if it was not in flight."""
        del self._requests[request]
        request.ended = True

    def overlapping(self, first: int, end: int) -> list[RequestT]:
        """Those that touch ``[first, end)``, oldest first."""
        return [r for r in self._requests if r.first < end and first < r.end]


class _Waiter:
    __slots__ = ("end", "first", "future")

    def __init__(self, first: int, end: int, future: asyncio.Future[bool]) -> None:
        self.first = first
        self.end = end
        self.future = future


def _set_result(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)


class Waiters:
    """Those who wait until something about a range of clusters changes."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[_Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, first: int, end: int, deadline: float | None = None) -> bool:
        """Return True when the range was woken, False when ``deadline`` (loop time) passed.

        Cancelling the wait is safe: nothing is left behind.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        waiter = _Waiter(first, end, future)
        timer = None
        if deadline is not None:
            timer = loop.call_at(deadline, _set_result, future, False)
        self._waiters[waiter] = None
        try:
            return await future
        finally:
            del self._waiters[waiter]
            if timer is not None:
                timer.cancel()

    def wake(self, first: int, end: int) -> int:
        """Wake all who wait on a part of ``[first, end)``; returns how many."""
        count = 0
        for waiter in self._waiters:
            if waiter.first < end and first < waiter.end and not waiter.future.done():
                waiter.future.set_result(True)
                count += 1
        return count

    def wake_all(self) -> int:
        """Wake everybody; returns how many."""
        count = 0
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_result(True)
                count += 1
        return count
