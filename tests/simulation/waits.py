"""Checker L: before time passes, everybody who waits must have a reason.

A reason is a device call in flight that stands in the way by the rules: a copy of the range where
access is still set, a frozen read that has lost none of its access, the request's own call, an
arming's hold. A wake-up that was forgotten is found here, at the moment at which it was due.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import CHANGES
from .room import SimTempInRoom
from .watch import FleeceWatch

if TYPE_CHECKING:
    from .requests import ClientRequest, GuestRequest
    from .world import SimDisk, World


class WaitChecker:
    """Looks at everybody who waits."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._violation = world.stop_with

    def on_quiet(self) -> None:
        for disk in self._world.disks:
            for request in disk.pending:
                if not self._has_reason(disk, request):
                    self._violation(f"L: {request} waits for nothing")
        for client in self._world.clients_pending:
            self._check_client_waits(client)
        for plan in self._world.armings_pending:
            if not any(
                call.kind in CHANGES
                for index in plan.disks
                for call in self._world.disks[index].device.calls
            ):
                self._violation(f"L: arming {plan.name} waits for nothing, and guests wait for it")

    def _has_reason(self, disk: SimDisk, request: GuestRequest) -> bool:
        if disk.holds:
            return True
        if any(call.request is request for call in disk.device.calls):
            return True
        return any(
            watch.dead_at is None
            and (self._holds_up(watch, request) or self._delays(watch, request))
            for watch in disk.watches
        )

    def _delays(self, watch: FleeceWatch, request: GuestRequest) -> bool:
        """Under throttle: only what would copy, as long as the temp image is nearly full, and for
        a tenth of a second each time."""
        if watch.plan.on_cbw_error != "throttle":
            return False
        first, end = watch.span(request.offset, request.length)
        if watch.fleece.copy.bits.find(1, first, end) < 0:
            return False
        limit = watch.limit
        used = watch.state.charged.bits.count(1) << watch.shift
        if limit is None and not watch.plan.reserve_clusters:
            return False
        if (
            limit is not None
            and not watch.plan.reserve_clusters
            and used <= self._world.engine.limit("LOW") * limit
        ):
            return False
        waited = self._world.loop.time() - max(request.sent_at, watch.installed_at)
        return waited <= request.pieces * (0.1 + max(0.0, request.timers_s)) + 1e-6

    def _holds_up(self, watch: FleeceWatch, request: GuestRequest) -> bool:
        first, end = watch.span(request.offset, request.length)
        access = watch.fleece.access.bits
        copies = list(watch.state.copies)
        for copy in copies:
            low, high = max(first, copy.first), min(end, copy.end)
            if low < high and access.find(1, low, high) >= 0:
                start = copy.first << watch.shift
                stop = copy.end << watch.shift
                asks = isinstance(watch.temp, SimTempInRoom) and watch.temp.asking
                if (
                    asks
                    or len(copies) > self._world.engine.limit("COPIES_MAX")
                    or any(
                        call.offset < stop and start < call.end
                        for device in (watch.temp, watch.disk.device)
                        for call in device.calls
                    )
                ):
                    return True
        for call in watch.disk.device.calls:
            if watch.is_frozen_read(call):
                call_first, call_end = watch.span(call.offset, call.length)
                low, high = max(first, call_first), min(end, call_end)
                if low >= high:
                    continue
                if call.kind == "read" and watch.all_access(call.offset, call.length):
                    return True
                if call.kind == "extents" and access.find(1, low, high) >= 0:
                    return True
        return False

    def _check_client_waits(self, client: ClientRequest) -> None:
        watch = client.watch
        if client.kind == "trim":
            if watch.dead_at is not None:
                self._violation(f"L: {client} waits, though {watch.name} has ended")
            if not watch.temp.calls:
                self._violation(f"L: {client} waits for nothing")
        elif not any(
            call.request is client
            for device in (watch.temp, watch.disk.device)
            for call in device.calls
        ):
            self._violation(f"L: {client} waits for nothing")
