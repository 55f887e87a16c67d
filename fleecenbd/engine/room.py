"""How full a temp image is: its limit, and what its file system has left above a reserve.

    used    charged clusters
    left    what the file system had free at the last look, without the reserve, less what was
            charged since; None where there is no file system to ask
    limit   the least of temp_limit and used + left: what the temp image can come to hold

Others take space, too. So somebody looks once a second (server/temp_watch.py), and a copy for which
nothing is left looks again before it fails. What is charged while a look is under way counts: the
answer may be from before.

From LOW of the limit on, under ``throttle``, guest writes that would copy are delayed, in
proportion to what is gone of the rest. A burst is stretched, and the backup has time to release.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from fleecenbd.storage.device import Device, HoldingSpace, Roomy

if TYPE_CHECKING:
    from fleecenbd.engine.state import FleeceState

Argument = TypeVar("Argument")

RESERVE_SHARE = 0.05
RESERVE_MIN = 1 << 30
"""Of a temp file system, by default; the larger of the two, in bytes."""
LOW = 0.8
"""Share of the limit in use from which on it is low."""
THROTTLE_MAX_S = 0.1
"""What a guest request is delayed when all of the rest is gone."""
TIMER_SHARE = 0.5
"""Of a guest request's time, what a delay takes at most: the copy needs some, too."""


def default_reserve(total: int) -> int:
    """Bytes that are kept free of a file system of so many."""
    return max(RESERVE_MIN, int(total * RESERVE_SHARE))


def holds_space(temp: Device) -> bool:
    """Whether a temp image's space was taken in advance."""
    return isinstance(temp, HoldingSpace) and temp.holds_space


class NoRoom(OSError):
    """The temp image's file system had nothing left above its reserve, when it was looked at."""


async def room_of(
    temp: Device, reserve: int | None, cluster_size: int, label: str
) -> tuple[int, int]:
    """What ``Roomy.room`` says of a new temp image; (0, 0) where nobody is asked any more.

    Raises OSError; ENOSPC where there is no room for a cluster, or where the image has taken its
    space in advance, and of the reserve.
    """
    if reserve == 0 or not isinstance(temp, Roomy):
        return 0, 0
    free, total = await temp.room()
    kept = default_reserve(total) if reserve is None else reserve
    if total and free - kept < (0 if holds_space(temp) else cluster_size):
        raise OSError(
            errno.ENOSPC,
            f"{label}: the temp image's file system has {free} bytes free of {total}, and {kept} "
            "are its reserve: choose another one (--temp-dir), or another reserve (--temp-reserve)",
        )
    return (0, 0) if holds_space(temp) else (free, total)


class Room:
    """What one temp image has left to grow."""

    def __init__(self, state: FleeceState, reserve: int | None) -> None:
        """``reserve``: bytes; None: the default; 0: none, and nobody is asked."""
        self._state = state
        self._asked = reserve
        target = state.target
        self._target: Roomy | None = None
        if reserve != 0 and isinstance(target, Roomy) and not holds_space(target):
            self._target = target
        self.left: int | None = None
        """Clusters. Looked at and counted down by ``FleeceState.charge``."""
        self.free = 0
        """Bytes that the file system had free at the last look,"""
        self.reserve = 0
        """and how many of them are kept."""
        self.during = 0
        """Clusters charged since the last look began; counted up by ``charge``."""
        self._looking: asyncio.Task[None] | None = None
        self._looks_again = False

    @property
    def is_asked(self) -> bool:
        """Whether there is a file system with a reserve."""
        return self._target is not None

    async def twice(self, call: Callable[[Argument], Awaitable[None]], argument: Argument) -> None:
        """A call that charges; once more, after a look, where there was no room as of the last."""
        try:
            await call(argument)
        except NoRoom:
            await self.look()
            try:
                await call(argument)
            except NoRoom:
                self._state.stats.limit_hits += 1
                raise

    def punched(self) -> None:
        """Some was freed: how much is asked at once where guests are delayed for want of it."""
        if self._target is None or self.delay_s() <= 0:
            return
        if self._looking is None:
            self._begin_look(self._target)
        else:
            self._looks_again = True  # it may be answered as of before

    async def look(self) -> None:
        """Ask the file system; one question at a time. A failure changes nothing."""
        if self._target is None:
            return
        if self._looking is not None:
            # What was asked before may be answered as of before.
            await asyncio.shield(self._looking)
        await asyncio.shield(self._looking or self._begin_look(self._target))

    def _begin_look(self, target: Roomy) -> asyncio.Task[None]:
        self._looking = asyncio.get_running_loop().create_task(
            self._look(target), name=f"room of {self._state.name}"
        )
        return self._looking

    async def _look(self, target: Roomy) -> None:
        # What these write may not be counted there yet.
        self.during = sum(write.end - write.first for write in self._state.temp_writes)
        try:
            told = await target.room()
        except OSError:
            return
        finally:
            self._looking = None
            again, self._looks_again = self._looks_again, False
        self.told(*told)
        if again:
            self.punched()

    def told(self, free: int, total: int) -> None:
        """The file system's answer, in bytes; a ``total`` of 0 is none."""
        if total:
            self.free = free
            self.reserve = default_reserve(total) if self._asked is None else self._asked
            self.left = (max(0, free - self.reserve) >> self._state.shift) - self.during
            if self._state.throttles:
                self._state.guests.wake_all()  # the delays may be shorter now

    # -- what follows ----------------------------------------------------------------------

    def limit(self) -> int | None:
        """Clusters that the temp image can come to hold; None: no limit."""
        state = self._state
        limit = None if state.temp_limit is None else state.temp_limit >> state.shift
        if self.left is not None:
            whole = state.stats.temp_clusters + max(0, self.left)
            limit = whole if limit is None else min(limit, whole)
        return limit

    def delay_s(self) -> float:
        """What a guest request that would copy is delayed now, under ``throttle``."""
        limit = self.limit()
        if limit is None:
            return 0.0
        low = LOW * limit
        over = self._state.stats.temp_clusters - low
        if over <= 0:
            return 0.0
        return THROTTLE_MAX_S * min(1.0, over / (limit - low))

    def error(self) -> NoRoom:
        """Nothing is left."""
        return NoRoom(
            errno.ENOSPC,
            f"the file system of {self._state.name}'s temp image has {self.free} bytes free, and "
            f"{self.reserve} are its reserve",
        )
