"""Several calls at a time, and the one failure that came first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


async def together(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all of them, at the same time. One that fails cancels the others.

    Raises its exception, or that in a group (``first_of``).
    """
    waiting = list(calls)
    if len(waiting) == 1:
        await waiting[0]
        return
    async with asyncio.TaskGroup() as group:
        for call in waiting:
            group.create_task(call)


def first_of(failure: BaseException) -> BaseException:
    """The one that came first, whatever groups of tasks it came through."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
