"""What must hold, looked at between any two awaits (docs/semantics.md, section 10).

T0  a read, and a zero of a status reply, shows the disk at arming; so would any read now
G   what is on the active image is explained by the guests' writes (history.py)
S   nothing in the temp image for a released range from TRIM's reply on; never over temp_limit
L   nobody waits without a reason (waits.py), and no guest longer than its timers allow
B   the partition: copy, done or one copy in flight, wherever access is set; access only shrinks,
    and only by what was asked for
A   x-fleecenbd:access tells what may be read, and which image has it
X   no session breaks, no guest write fails and no read is refused without a cause
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bitarray import bitarray

from .calls import CHANGES, Call
from .devices import SimDevice
from .history import GuestWrite
from .room import SimTempInRoom
from .watch import FleeceWatch

if TYPE_CHECKING:
    from .requests import ClientRequest, GuestRequest
    from .world import SimDisk, World

EPSILON_S = 1e-6


class Violation(Exception):
    """A checker's finding; the first one ends the run."""


class Checkers:
    """The watcher of every device of a world, called after every step of its loop."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.watches: list[FleeceWatch] = []
        self.live: list[FleeceWatch] = []
        self.met: Counter[str] = Counter()
        self.by_temp: dict[SimDevice, FleeceWatch] = {}

    def violation(self, text: str) -> None:
        self.world.stop_with(text)

    # between any two awaits

    def after_step(self) -> None:
        for disk in self.world.disks:
            if disk.engine_disk.fleeces != disk.fleeces_seen:
                self._fleeces_changed(disk)
        for watch in self.live:
            self._check_partition(watch)
        if any(watch.dead_at is not None for watch in self.live):
            self.live = [watch for watch in self.live if watch.dead_at is None]

    def _fleeces_changed(self, disk: SimDisk) -> None:
        now = self.world.loop.time()
        for fleece in disk.engine_disk.fleeces:
            if fleece in disk.fleeces_seen:
                continue
            plan = self.world.plan_of_temp[fleece.temp]
            watch = FleeceWatch(fleece, disk, plan, now)
            for call in disk.device.calls:
                if call.kind in CHANGES:
                    self.violation(f"T0: {watch.name} was armed while {call} was in flight")
            self.watches.append(watch)
            self.live.append(watch)
            self.by_temp[watch.temp] = watch
            disk.watches.append(watch)
            for request in disk.pending:
                request.timers_s += plan.cbw_timeout_s * request.pieces
                request.untimed |= plan.cbw_timeout_s == 0
            missing = [
                index
                for index in plan.disks
                if not any(
                    self.world.plan_of_temp[f.temp] is plan
                    for f in self.world.disks[index].engine_disk.fleeces
                )
            ]
            if missing:
                self.violation(f"T0: {plan.name} was not armed on all its disks in one step")
            self.met["fleeces armed"] += 1
            self.world.log(f"{watch.name} armed")
        disk.fleeces_seen = list(disk.engine_disk.fleeces)

    def _check_partition(self, watch: FleeceWatch) -> None:
        fleece = watch.fleece
        if watch.dead:
            self._died(watch)
            return
        access, copy, done = fleece.access.bits, fleece.copy.bits, fleece.done.bits
        in_flight = [(c.first, c.end) for c in watch.state.copies]
        key = (access.tobytes(), copy.tobytes(), done.tobytes())
        if isinstance(watch.temp, SimTempInRoom):
            self._check_room(watch, watch.temp)
        if key == watch.key and in_flight == watch.ranges_in_flight:
            return
        watch.key = key
        name = watch.name
        outside = ~access
        if (copy & outside).any():
            self.violation(f"B: {name}: copy is set where access is not")
        if (done & outside).any():
            self.violation(f"B: {name}: done is set where access is not")
        covered = copy ^ done
        if (copy & done).any():
            self.violation(f"B: {name}: a cluster is both copy and done")
        for first, end in in_flight:
            live = access[first:end]
            if (covered[first:end] & live).any():
                self.violation(
                    f"B: {name}: clusters {first}..{end} are in flight, and copy, done or in "
                    "flight twice"
                )
            covered[first:end] |= live
        if covered != access:
            lost = (covered ^ access).find(1)
            self.violation(f"B: {name}: cluster {lost} is neither copy nor done nor in flight")
        if access != watch.access_seen:
            self._access_shrank(watch, access)
        watch.ranges_in_flight = in_flight
        self.would_return(watch)

    def _check_room(self, watch: FleeceWatch, temp: SimTempInRoom) -> None:
        """No more is charged than the file system had above its reserve, when it was asked."""
        charged = watch.state.charged.bits
        new = (charged & ~watch.charged_seen).count(1)
        watch.charged_seen = bitarray(charged)
        if not new or not watch.plan.reserve_clusters:
            return
        temp.note_charged(new)
        left = max(0, temp.known - (watch.plan.reserve_clusters << watch.shift)) >> watch.shift
        if temp.charged > left:
            self.violation(
                f"S: {watch.name}: {temp.charged} clusters charged since its file system had "
                f"{left} above its reserve"
            )

    def _access_shrank(self, watch: FleeceWatch, access: bitarray) -> None:
        if (access & ~watch.access_seen).any():
            self.violation(f"B: {watch.name}: access was set again")
        cleared = watch.access_seen & ~access
        for cluster in cleared.search(bitarray("1")):
            start = cluster << watch.shift
            end = min(start + (1 << watch.shift), watch.size)
            if watch.asked.find(0, start, end) >= 0:
                self.violation(f"B: {watch.name}: cluster {cluster} was released unasked")
        for first, end in watch.ranges_in_flight:
            if cleared[first:end].any():
                self.met["copies cancelled in flight"] += 1
                if access[first:end].any():
                    self.met["copies cancelled in part"] += 1
        for call in watch.disk.device.calls:
            if watch.is_frozen_read(call):
                first, end = watch.span(call.offset, call.length)
                if cleared[first:end].any():
                    self.met["TRIMs during frozen reads"] += 1
        for call in watch.temp.calls:
            if call.kind == "read":
                first, end = watch.span(call.offset, call.length)
                if cleared[first:end].any():
                    self.met["TRIMs during temp reads"] += 1
        watch.access_seen = bitarray(access)

    def _died(self, watch: FleeceWatch) -> None:
        watch.dead_at = self.world.loop.time()
        fleece = watch.fleece
        if fleece.access.bits.any() or fleece.copy.bits.any() or fleece.done.bits.any():
            self.violation(f"B: {watch.name} ended and kept some bits")
        if watch.ranges_in_flight:
            self.met["sessions ended with copies in flight"] += 1
        if fleece.broken is not None:
            self.met["breaks"] += 1
            self.world.log(f"{watch.name} broke: {fleece.broken}")
            self._check_cause(watch)
        else:
            self.met["fleeces finished"] += 1
            self.world.log(f"{watch.name} finished")

    def _check_cause(self, watch: FleeceWatch) -> None:
        if watch.plan.on_cbw_error == "break-guest-write":
            self.violation(f"X: {watch.name} broke under break-guest-write")
        temp = watch.temp
        if isinstance(temp, SimTempInRoom) and "are its reserve" in watch.fleece.broken:
            self.met["breaks for want of room"] += 1
            if temp.answered_at < min(request.sent_at for request in watch.disk.pending):
                self.violation(f"X: {watch.name} broke, and nobody had asked for room again")
        if not self.has_cause(watch, watch.disk.pending):
            self.violation(f"X: {watch.name} broke without a cause: {watch.fleece.broken}")

    def has_cause(self, watch: FleeceWatch, requests: list[GuestRequest]) -> bool:
        """Did anything happen for which a fleece may break, or one of these requests fail?"""
        if watch.limit is not None or watch.plan.reserve_clusters:
            return True
        for request in requests:
            first, end = watch.span(request.offset, request.length)
            low, high = first << watch.shift, end << watch.shift
            for moment, offset, stop in watch.failures:
                if moment >= request.sent and offset < high and low < stop:
                    return True
        timeout_s = watch.plan.cbw_timeout_s
        now = self.world.loop.time()
        return timeout_s > 0 and any(
            now - max(r.sent_at, watch.installed_at) >= timeout_s - EPSILON_S for r in requests
        )

    # T0

    def would_return(self, watch: FleeceWatch, first: int = 0, end: int | None = None) -> None:
        """What a read of clusters ``[first, end)`` would return now is the disk at arming."""
        fleece, t0 = watch.fleece, watch.t0
        access, done = fleece.access.bits, fleece.done.bits
        active, temp = watch.disk.device.content, watch.temp.content
        end = watch.clusters if end is None else end
        while (first := access.find(1, first, end)) >= 0:
            bit = done[first]
            stop = end
            for bits, value in ((access, 0), (done, not bit)):
                found = bits.find(value, first, stop)
                stop = found if found >= 0 else stop
            low, high = first << watch.shift, min(stop << watch.shift, watch.size)
            source = temp if bit else active
            if source[low:high] != t0[low:high]:
                where = "temp" if bit else "active"
                wrong = next(i for i in range(low, high) if source[i] != t0[i])
                self.violation(
                    f"T0: {watch.name}: a read would return wrong data at {wrong} "
                    f"(cluster {wrong >> watch.shift}, from the {where} image)"
                )
            first = stop

    # devices

    def call_began(self, device: SimDevice, call: Call) -> None:
        if self.world.tracing:
            copies = isinstance(call.request, GuestWrite) and (
                device.is_temp or call.kind not in CHANGES
            )
            whose = f"a copy ({call.request})" if copies else call.request
            self.world.log(f"    {device.name}: {call} begins, for {whose}")
        if call.kind in CHANGES and not device.is_temp:
            if isinstance(call.request, GuestWrite):
                call.request.changes.append(call)
            if not self.world.disk_of[device].may_change():
                self.violation(f"T0: {call} of {device.name} began while an arming holds guests")
        self.world.react(device, call)

    def call_landed(self, device: SimDevice, call: Call, offset: int, length: int) -> None:
        if call.kind not in CHANGES or not length:
            return
        if self.world.tracing:
            self.world.log(f"    {device.name}: {call} lands {offset}+{length}")
        if not device.is_temp:
            for watch in self.world.disk_of[device].watches:
                if watch.dead_at is None and not watch.dead:
                    self.would_return(watch, *watch.span(offset, length))
            return
        watch = self.by_temp.get(device)
        if watch is None or watch.dead:
            return
        first, end = watch.span(offset, length)
        self.would_return(watch, first, min(end, watch.clusters))
        if call.kind != "trim":
            if 1 in watch.freed[first:end] and self._holds_freed(watch, first, end):
                self.violation(
                    f"S: {watch.name}: {call} took space in a range whose TRIM was replied to"
                )
            limit = watch.limit
            if limit is not None and device.used_bytes() > limit:
                self.violation(f"S: {watch.name}: {device.used_bytes()} bytes, limit {limit}")

    def call_ended(self, device: SimDevice, call: Call) -> None:
        if self.world.tracing:
            verdict = f"fails ({call.error})" if call.fails else "ends"
            self.world.log(f"    {device.name}: {call} {verdict}")
        if not call.fails:
            self.met["clones"] += call.kind == "clone"
            return
        self.met[f"{'temp' if device.is_temp else 'active'} {call.kind} failures"] += 1
        request = call.request
        if request is not None:
            request.device_failed = True  # type: ignore[attr-defined]
        if device.is_temp:
            watch = self.by_temp.get(device)
            if watch is not None and call.kind == "trim":
                watch.punch_failed = True
            elif watch is not None and call.kind in CHANGES:
                self._failed(watch, call)
        elif call.kind == "read" and isinstance(request, GuestWrite):
            for watch in self.world.disk_of[device].watches:
                self._failed(watch, call)

    def _failed(self, watch: FleeceWatch, call: Call) -> None:
        if watch.has_access(call.offset, call.length):
            watch.failures.append((self.world.tick(), call.offset, call.end))
            return
        first, end = watch.span(call.offset, call.length)
        for copy in watch.state.copies:
            if copy.first <= first and end <= copy.end:
                live = watch.fleece.access.bits.find(1, copy.first, copy.end) >= 0
                self.met["failures on released clusters of a live copy"] += live

    def _holds_freed(self, watch: FleeceWatch, first: int, end: int) -> bool:
        size = 1 << watch.shift
        return any(
            watch.freed[cluster] and watch.temp.holds(cluster * size, size)
            for cluster in range(first, end)
        )

    # what a client is told

    def check_access_map(
        self, watch: FleeceWatch, request: ClientRequest, offset: int, length: int
    ) -> None:
        """x-fleecenbd:access, byte by byte of a cluster, against access and both images.

        Told as held in the temp image: it is there; told as readable and not there: the active
        image still has it.
        """
        position = offset
        for extent_length, flags in watch.fleece.access_status(offset, length):
            stop = position + extent_length
            while position < stop:
                end = min(stop, ((position >> watch.shift) + 1) << watch.shift)
                self._check_told(watch, request, position, end, flags)
                position = end
        if position != offset + length:
            self.violation(f"A: {request}: x-fleecenbd:access ends at {position}")

    def _check_told(
        self, watch: FleeceWatch, request: ClientRequest, begin: int, end: int, flags: int
    ) -> None:
        if bool(flags & 1) != watch.has_access(begin, 1):
            self.violation(f"A: {request}: x-fleecenbd:access is wrong at {begin}")
        if not flags & 1:
            if flags:
                self.violation(f"A: {request}: {flags} is told of released bytes at {begin}")
            return
        in_temp = bool(flags & 2)
        self.met["access map: in temp" if in_temp else "access map: not in temp"] += 1
        device = watch.temp if in_temp else watch.disk.device
        if bytes(device.content[begin:end]) != watch.t0[begin:end]:
            self.violation(f"A: {request}: {device.name} does not hold {begin}..{end}, as told")

    # the end

    def at_end(self) -> None:
        for disk in self.world.disks:
            self._check_disk_at_end(disk)
        for watch in self.watches:
            self._check_fleece_at_end(watch)
        for device in self.world.devices:
            if device.hung_count:
                self.met["hung devices"] += 1
                self.met["hung calls"] += device.hung_count

    def _check_disk_at_end(self, disk: SimDisk) -> None:
        for request in disk.pending:
            # It has a reason to wait (on_quiet): only a call that never ends may be one.
            if any(call.request is request for call in disk.device.calls):
                continue
            if not request.untimed:
                self.violation(f"L: {request} waits for ever")
            self.met["guest writes held for ever, cbw_timeout 0"] += 1
        why = disk.history.unexplained(0, bytes(disk.device.content))
        if why is not None:
            self.violation(f"G: {disk.name}: {why}")
        for seen in disk.reads_seen:
            why = disk.history.unexplained(seen.offset, seen.data, seen.began, seen.ended)
            if why is not None:
                self.violation(f"G: {disk.name}: {seen}: {why}")

    def _check_fleece_at_end(self, watch: FleeceWatch) -> None:
        stats = watch.fleece.stats
        self.met["copies"] += stats.copies_done
        self.met["copies failed"] += stats.copies_failed
        self.met["guest writes released by a TRIM"] += stats.guest_released_by_trim
        self.met["frozen waits"] += stats.frozen_waits
        self.met["timeouts"] += stats.timeouts
        self.met["limits hit"] += stats.limit_hits
        self.met["guest requests throttled"] += stats.throttled
        self.met["partial releases"] += stats.part_trims
        if watch.dead_at is not None:
            if not watch.temp.closed:
                self.violation(f"S: {watch.name} ended, and its temp image is still open")
            return
        if watch.temp.closed:
            self.violation(f"S: {watch.name} lives, and its temp image is closed")
        self.would_return(watch)
        size = 1 << watch.shift
        charged = watch.state.charged.bits
        pending = any(client.watch is watch for client in self.world.clients_pending)
        # With nobody who waits, only a call that never ends may keep the space.
        pending = pending or (watch.read_once and bool(watch.temp.calls))
        for cluster in range(watch.clusters):
            held = watch.temp.holds(cluster * size, size)
            if held and not charged[cluster]:
                self.violation(f"S: {watch.name}: cluster {cluster} holds space uncharged")
            released = not watch.fleece.access.bits[cluster]
            if held and released and not pending and not watch.punch_failed:
                self.violation(f"S: {watch.name}: released cluster {cluster} holds space")
