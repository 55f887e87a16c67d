"""Writes that share a block: which of them must wait for which.

A device that takes whole blocks only writes a part of one by reading the block, changing it, and
writing it whole. Another write to the same block, between that read and that write, would be
undone. So in a block that somebody writes in part there is one writer at a time; blocks that are
written whole are nobody else's business, and two such writes never wait for each other.

    claim A   ███████████░░░░          ░ a part of a block: alone there
    claim B              ░░░░█████     waits for A
    claim C   ███████                  waits for nobody

First come, first served: a claim waits for those that came before it, and for no other. So none
waits for ever, and no two for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""(start, end) in bytes."""


class _Claim:
    __slots__ = ("parts", "whole")

    def __init__(self, whole: Range, parts: tuple[Range, ...]) -> None:
        self.whole = whole
        self.parts = parts

    def conflicts(self, other: _Claim) -> bool:
        return any(_meet(part, other.whole) for part in self.parts) or any(
            _meet(part, self.whole) for part in other.parts
        )


class Claims:
    """The writes to one device that are at work or wait: for threads, which wait asleep."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        # Under its lock; oldest first.
        self._claims: list[_Claim] = []

    @contextmanager
    def of(self, whole: Range, parts: tuple[Range, ...]) -> Iterator[None]:
        """Inside, nobody else writes to ``parts``, nor in part to what is in ``whole``.

        ``whole``: all blocks that the write touches; ``parts``: those of them that it writes in
        part. Not to be taken twice by one thread.
        """
        claim = _Claim(whole, parts)
        with self._news:
            self._claims.append(claim)
            while self._must_wait(claim):
                self._news.wait()
        try:
            yield
        finally:
            with self._news:
                self._claims.remove(claim)
                self._news.notify_all()

    def _must_wait(self, claim: _Claim) -> bool:
        for earlier in self._claims:
            if earlier is claim:
                return False
            if earlier.conflicts(claim):
                return True
        raise AssertionError("a claim that waits is in the list")


def _meet(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]
