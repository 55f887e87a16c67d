"""A call on a simulated device, what the device is like, and who is told."""

from __future__ import annotations

import asyncio
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .devices import SimDevice

REQUEST: ContextVar[object | None] = ContextVar("request", default=None)
"""The client request on whose behalf the current step runs; device calls remember it."""

CHANGES = ("write", "zero", "trim", "clone")


@dataclass(frozen=True)
class Profile:
    """What a device is like. Chances are 0 to 1 per call."""

    latency_min_s: float = 0.0005
    latency_max_s: float = 0.02
    slow_chance: float = 0.0
    slow_factor: float = 30.0
    quantum_s: float = 0.0
    """Latencies are rounded up to multiples of this, so that calls end at one moment."""
    pieces_max: int = 4
    pace: dict[str, float] = field(default_factory=dict)
    """Factor of the latency, by kind of call."""
    now_read_chance: float = 0.0
    now_write_chance: float = 0.0
    fail: dict[str, float] = field(default_factory=dict)
    """Chance to fail, by kind of call: read, write, zero, trim, flush, extents (a clone: write)."""
    hang: dict[str, float] = field(default_factory=dict)
    late_chance: float = 0.5
    """Share of the hung calls that end after all, ``late_s`` later."""
    late_s: float = 400.0
    dies_at_s: float = math.inf
    lives_again_at_s: float = math.inf
    fast_zero: bool = True
    clones: float = 0.0
    """Chance that a clone is likely, when somebody asks."""
    refuses_clone: float = 0.0
    """Chance that it is refused then."""
    space_max: int | None = None
    """Bytes; a write past it fails with ENOSPC."""


@dataclass(eq=False)
class Call:
    """One call on a device, in flight or ended."""

    kind: str
    offset: int
    length: int
    request: object | None
    began_at: float
    data: Any = None
    cuts: list[int] = field(default_factory=list)
    """Ends of the pieces that have still to land, last one first."""
    landed: int = 0
    fails: bool = False
    error: int = 0
    hangs_at: int | None = None
    hung: bool = False
    ended: bool = False
    ended_at: float = 0.0
    future: asyncio.Future[None] | None = None
    keep_space: bool = False
    source: SimDevice | None = None
    """Of a clone."""

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{self.kind} {self.offset}+{self.length}"


class Watcher(Protocol):
    """Who is told what happens on the device."""

    def call_began(self, device: SimDevice, call: Call) -> None: ...

    def call_landed(self, device: SimDevice, call: Call, offset: int, length: int) -> None: ...

    def call_ended(self, device: SimDevice, call: Call) -> None: ...

    def violation(self, text: str) -> None: ...
