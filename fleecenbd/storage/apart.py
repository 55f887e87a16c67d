"""Zeroes and writes that share a cluster of the target are never in flight together.

QEMU's qcow2 driver makes a whole cluster zeroes where the rest of it reads as zeroes already. A
write to that rest may be in flight just then, and may have read what it copies from the backing
file: when it ends, old data stands where zeroes had been acknowledged. Seen with QEMU 7.2: a WRITE
of a cluster's first part beside a WRITE_ZEROES of its second, over a backing file that holds data
in the second. Writes beside writes are kept apart by QEMU itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Entry:
    __slots__ = ("end", "ended", "is_alone", "start")

    def __init__(self, start: int, end: int, *, is_alone: bool) -> None:
        self.start = start
        self.end = end
        self.is_alone = is_alone
        self.ended = asyncio.Event()


class Apart:
    """Lets requests through in the order in which they come, where they share a cluster."""

    def __init__(self, cluster: int) -> None:
        """``cluster``: bytes, a power of two; no smaller than the target's."""
        self._mask = cluster - 1
        self._entries: dict[_Entry, None] = {}

    @asynccontextmanager
    async def request(self, offset: int, length: int, *, is_alone: bool) -> AsyncIterator[None]:
        """Wait until nothing that came before and must not be beside it is in flight.

        ``is_alone``: nothing may be; else only those that are.
        """
        end = offset + length
        entry = _Entry(offset & ~self._mask, (end + self._mask) & ~self._mask, is_alone=is_alone)
        before = [
            other
            for other in self._entries
            if (is_alone or other.is_alone) and other.start < entry.end and entry.start < other.end
        ]
        self._entries[entry] = None
        try:
            for other in before:
                await other.ended.wait()
            yield
        finally:
            del self._entries[entry]
            entry.ended.set()
