"""What the checkers know about one fleece, from outside of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitarray import bitarray

from .calls import Call
from .devices import SimDevice

if TYPE_CHECKING:
    from .plan import SessionPlan
    from .world import SimDisk


class FleeceWatch:
    """What the checkers know about one fleece, from the step that installed it."""

    def __init__(self, fleece: Any, disk: SimDisk, plan: SessionPlan, now: float) -> None:
        self.fleece = fleece
        self.state = fleece.state
        self.disk = disk
        self.plan = plan
        self.temp: SimDevice = fleece.temp
        self.shift = self.state.shift
        self.size = disk.device.size
        self.clusters = self.state.clusters
        self.t0 = bytes(disk.device.content)
        self.installed_at = now
        self.access_seen = bitarray(fleece.access.bits)
        self.key: tuple[bytes, ...] = ()
        self.asked = bytearray(self.size)
        """Per byte: a TRIM of it has been sent, or a READ_ONCE has released it."""
        self.read_once = False
        """Something was released that nobody waits for: its space is freed a little later."""
        self.freed = bytearray(self.clusters)
        """Per cluster: a TRIM of it has been acknowledged."""
        self.punch_failed = False
        self.failures: list[tuple[int, int, int]] = []
        """(moment, offset, end) of calls that failed, that a copy needed, on a cluster with
        access."""
        self.dead_at: float | None = None
        self.session: Any = None
        self.ranges_in_flight: list[tuple[int, int]] = []
        self.charged_seen = bitarray(self.state.charged.bits)

    @property
    def name(self) -> str:
        return str(self.fleece.name)

    @property
    def dead(self) -> bool:
        return bool(self.fleece.broken is not None or self.fleece.finished)

    @property
    def limit(self) -> int | None:
        clusters = self.plan.temp_limit_clusters
        return None if clusters is None else clusters << self.shift

    def span(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self.shift, ((offset + length - 1) >> self.shift) + 1

    def has_access(self, offset: int, length: int) -> bool:
        """Any cluster of the bytes has its access bit."""
        first, end = self.span(offset, length)
        return bool(self.fleece.access.bits.find(1, first, end) >= 0)

    def all_access(self, offset: int, length: int) -> bool:
        first, end = self.span(offset, length)
        return bool(self.fleece.access.bits.find(0, first, end) < 0)

    def is_frozen_read(self, call: Call) -> bool:
        """Is this call on the active image a read, or a block status, of this fleece's client?"""
        kinds = ("read", "extents")
        return call.kind in kinds and getattr(call.request, "fleece", None) is self.fleece
