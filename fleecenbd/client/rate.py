"""A limit on bytes per second, to be changed, paused and taken away at any time.

A token bucket (as in tc-tbf(8)) that may go into debt: a request waits until the bucket is not
empty, takes all that it needs at once, and the next one waits until the debt is paid off. So a
request longer than the bucket is neither refused nor cut, and the mean is exact.
"""

from __future__ import annotations

import asyncio

BURST_S = 0.1
"""Seconds' worth of bytes that may be saved up."""


class Rate:
    """Who asks first is served first."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        """None: no limit."""
        self._bytes_per_s = bytes_per_s
        self._held = False
        self._tokens = 0.0
        self._since: float | None = None
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def bytes_per_s(self) -> float | None:
        """The limit now."""
        return self._bytes_per_s

    def set(self, bytes_per_s: float | None) -> None:
        """From now on, also for who waits already; what was saved up or owed is forgotten."""
        self._bytes_per_s = bytes_per_s
        self._tokens = 0.0
        self._since = None
        self._changed.set()

    def hold(self, held: bool) -> None:
        """Whether nothing may be sent for at all, by who waits already neither."""
        self._held = held
        self._changed.set()

    async def take(self, length: int) -> None:
        """Return when ``length`` bytes may be sent for."""
        if self._bytes_per_s is None and not self._held and not self._turn.locked():
            return
        async with self._turn:
            while (wait_s := self._wait_s()) != 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                except TimeoutError:
                    pass
            self._tokens -= length

    def _wait_s(self) -> float | None:
        """Seconds until the bucket is not empty; None: nobody knows."""
        if self._held:
            return None
        rate = self._bytes_per_s
        if rate is None:
            return 0.0
        now = asyncio.get_running_loop().time()
        if self._since is not None:
            self._tokens = min(self._tokens + (now - self._since) * rate, BURST_S * rate)
        self._since = now
        # A debt of less than a byte is the arithmetic's, not the caller's.
        return 0.0 if self._tokens > -1.0 else -self._tokens / rate
