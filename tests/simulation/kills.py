"""Kills: where one may fall, and what it leaves.

A kill can come between any two stores into what outlives the server. ``StoredBits`` takes the
place of the engine's ``bitarray``: each store into bits that live in a buffer is preceded by a
point at which the kill may fall, and then perhaps half of the store is done. Points are also: each
step of the loop, and each stage of the store's calls. At the chosen point the state is copied; what
the dead server's step still does counts for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bitarray import bitarray

from .calls import CHANGES
from .devices import WRITES, SimDevice
from .engine import Engine


class Killer:
    """Waits for its event, then counts points."""

    def __init__(self, event: str, number: int, points: int, rng: random.Random) -> None:
        """The kill falls at the ``points``-th point after the ``number``-th ``event``."""
        self._event = event
        self._number = number
        self._points = points
        self._counting = False
        self._cleared: Any = None
        """The range of the last store, if it was cleared."""
        self.rng = rng
        self.on_kill: Callable[[], None] | None = None

    def event(self, name: str) -> None:
        """Something happened at which points may begin to count."""
        if name == self._event and not self._counting:
            self._number -= 1
            self._counting = self._number <= 0

    def stores(self, key: Any, value: Any) -> bool:
        """A store comes: does the kill fall before it?

        The same range cleared twice running, in two bitmaps, is a release.
        """
        self.event("store")
        cleared = key if isinstance(value, int) and not value else None
        if cleared is not None:
            self.event("release" if cleared == self._cleared else "clear")
        self._cleared = cleared
        return self.due()

    def due(self) -> bool:
        """Does the kill fall at this point?"""
        if not self._counting or self.on_kill is None:
            return False
        self._points -= 1
        return self._points <= 0

    def kill(self) -> None:
        """It falls, once."""
        assert self.on_kill is not None, "it was due"
        on_kill, self.on_kill = self.on_kill, None
        on_kill()

    def point(self) -> None:
        """A kill may fall here."""
        if self.due():
            self.kill()


_killer: Killer | None = None


class StoredBits(bitarray):
    """A bitarray; where its bits live in a caller's buffer, each store is a point."""

    stored = False

    def __new__(cls, *arguments: Any, **keywords: Any) -> StoredBits:
        bits = super().__new__(cls, *arguments, **keywords)
        bits.stored = keywords.get("buffer") is not None
        return bits

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.stored and _killer is not None and _killer.stores(key, value):
            if isinstance(key, slice) and _killer.rng.random() < 0.5:
                start, stop, _ = key.indices(len(self))
                if start < stop:
                    half = _killer.rng.randrange(start, stop)
                    part = value if isinstance(value, int) else value[: half - start]
                    super().__setitem__(slice(start, half), part)
            _killer.kill()
        super().__setitem__(key, value)

    def setall(self, value: Any) -> None:
        self[:] = value

    def __ior__(self, other: Any) -> StoredBits:  # type: ignore[override,misc]
        self[:] = self | other
        return self

    def __iand__(self, other: Any) -> StoredBits:  # type: ignore[override,misc]
        self[:] = self & other
        return self


@contextmanager
def falling(killer: Killer | None, under_test: Engine) -> Iterator[None]:
    """Kills fall into the stores of this engine, for as long as a life lasts."""
    global _killer
    module = under_test.modules["bitmap"]
    saved = module.bitarray
    module.bitarray, _killer = StoredBits, killer  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.bitarray, _killer = saved, None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Image:
    """What a device holds."""

    content: bytes
    space: bytes


def left_by(device: SimDevice, rng: random.Random) -> Image:
    """The device once the dead server's last call on it has ended: each landed a part, or all."""
    content, space = bytearray(device.content), bytearray(device.space)
    size = device.hole_size
    for call in device.calls:
        if call.kind not in CHANGES:
            continue
        ends = [call.offset + call.landed, *call.cuts, call.end]
        offset, end = call.offset + call.landed, rng.choice(ends)
        if end <= offset:
            continue
        if call.kind in WRITES:
            if call.source is not None:
                content[offset:end] = call.source.content[offset:end]
            else:
                content[offset:end] = call.data[offset - call.offset : end - call.offset]
            for block in range(offset // size, -(-end // size)):
                space[block] = 1
        else:
            content[offset:end] = bytes(end - offset)
    return Image(bytes(content), bytes(space))
