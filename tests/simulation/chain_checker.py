"""Checker C: no change is forgotten, whatever fails when, kills included.

It remembers what every disk held when a session was armed, and whose backup is the last good one.
A bitmap says "since session S": then the disk may differ from what it was at S only where a bit is
set. So must, all the time and in what a kill leaves:

    recording bitmap   since the last good backup, or since a session that resets it and lives
    own bits           since the last good backup, where that session resets the bitmap

and from the two follows that every change since the last good backup is in one of them. Own bits
never change; a bit is set before its active write begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitarray import bitarray

from .calls import CHANGES, Call

if TYPE_CHECKING:
    from .chains import Life
    from .world import SimDisk

Contents = dict[tuple[str, str], bytes]
"""(disk, id of a session): what the disk held at that session's moment."""


class ChainChecker:
    """Looks at the bitmaps of one life of the server."""

    def __init__(self, life: Life, contents: Contents, last_good: dict[str, str | None]) -> None:
        self._life = life
        self.contents = contents
        self.last_good = last_good
        self._own: dict[Any, bitarray] = {}
        """Of each fleece that lives: its own bits at arming."""

    def _violation(self, text: str) -> None:
        self._life.stop_with(f"C: {text}")

    # what happens

    def described(self, session: Any) -> None:
        """The session is about to be described; the guests are held."""
        for fleece in session.fleeces:
            disk = self._life.by_name(fleece.disk.name)
            self.contents[disk.name, session.id] = bytes(disk.device.content)

    def armed(self, session: Any) -> None:
        """In the step in which it was armed, or taken up again."""
        for fleece in session.fleeces:
            own = fleece.own
            disk = fleece.disk.name
            self._own[fleece] = bitarray(own.bitmap.bits)
            since = own.since
            begins = since.session_id if since is not None else None
            if own.resets and not own.made and begins != self.last_good.get(disk):
                self._violation(f"{fleece.name}: own bits since {begins}, not the last good backup")
            if own.dirty_only and session.state == "active":
                self._readable(fleece)
            if own.dirty_only or own.resets:
                self._covers(
                    f"own bits of {fleece.name}",
                    own.bitmap,
                    disk,
                    since,
                    self.contents[disk, session.id],
                )

    def _readable(self, fleece: Any) -> None:
        """What is dirty can be read, where no TRIM has been sent since."""
        watch = self._life.checkers.by_temp[fleece.temp]
        for offset, length, dirty in fleece.own.bitmap.runs(0, fleece.size):
            for start, run, readable in fleece.access.runs(offset, length) if dirty else ():
                if not readable and watch.asked.find(0, start, start + run) >= 0:
                    self._violation(f"{fleece.name}: dirty bytes {start}+{run} cannot be read")

    def finished(self, session: Any, *, failed: bool) -> None:
        """In the step in which it was finished, as a failed one or not."""
        if session.failed != failed:
            self._violation(f"{session.name} was finished, failed {session.failed}, not {failed}")
        for fleece in session.fleeces:
            if not session.failed and fleece.own.resets:
                self.last_good[fleece.disk.name] = session.id
            del self._own[fleece]
        self.check(f"{session.name} was finished")

    def began(self, disk: SimDisk, call: Call, *, landed: bool = False) -> None:
        """A call on the active image begins, or lands."""
        if call.kind not in CHANGES:
            return
        for bitmap in disk.engine_disk.bitmaps.values():
            if bitmap.lost is None and not bitmap.bitmap.all(call.offset, call.length):
                what = "landed" if landed else "began"
                self._violation(f"{disk.name}: {call} {what} and is not in bitmap {bitmap.name}")

    def after_step(self) -> None:
        """Own bits are constant."""
        for fleece, bits in self._own.items():
            if fleece.own.bitmap.bits != bits:
                self._violation(f"{fleece.name}: its own bits changed")

    # what must hold

    def check(self, when: str) -> None:
        """Every recording bitmap, now."""
        for disk in self._life.disks:
            alive = {
                session.id
                for session in self._life.active.values()
                for fleece in session.fleeces
                if fleece.disk is disk.engine_disk and fleece.own.resets
            }
            for bitmap in disk.engine_disk.bitmaps.values():
                if bitmap.lost is not None:
                    continue
                label = f"{when}: bitmap {bitmap.name} of {disk.name}"
                since = bitmap.since.session_id if bitmap.since is not None else None
                if since != self.last_good.get(disk.name) and since not in alive:
                    self._violation(f"{label} records since {since}, not the last good backup")
                now = bytes(disk.device.content)
                self._covers(label, bitmap.bitmap, disk.name, bitmap.since, now)

    def _covers(self, label: str, bitmap: Any, disk: str, since: Any, now: bytes) -> None:
        """Outside of the bits, ``now`` is what the disk held at ``since``."""
        if since is None:
            return
        then = self.contents[disk, since.session_id]
        for offset, length, dirty in bitmap.runs(0, bitmap.size):
            if not dirty and then[offset : offset + length] != now[offset : offset + length]:
                self._violation(
                    f"{label}: bytes {offset}..{offset + length} changed since {since.session}, "
                    "and no bit of them is set"
                )
