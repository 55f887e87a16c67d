"""Bugs planted into bitmaps, own bits, arming and resume, for checker C and its kin."""

from __future__ import annotations

from .planted import PlantedBug, _bug

RECORDING = (
    _bug(
        "recording bits are set once the active write has ended",
        "disk",
        (
            "        if self._noted:\n            self._note_begin(ranges)\n",
            "",
        ),
        (
            "        del self._active_calls[task]\n",
            "        self._note_begin(self._active_calls.pop(task))\n",
        ),
    ),
    _bug(
        "recording bits are set after a write in one step",
        "disk",
        (
            "        self._record(offset, len(data))\n        stamps = self._stamps\n",
            "        stamps = self._stamps\n",
        ),
        (
            "        self.writes += written\n",
            "        self._record(offset, len(data))\n        self.writes += written\n",
        ),
    ),
    _bug(
        "a write records its first cluster only",
        "disk",
        ("bits[first : last + 1] = 1", "bits[first] = 1"),
    ),
    _bug(
        "a discard is not recorded",
        "disk",
        (
            "await self._active([(start, run)], self.device.trim(start, run))",
            "await self._active([], self.device.trim(start, run))",
        ),
    ),
    _bug(
        "a bitmap at another granularity loses its last part",
        "recording",
        (
            "        return wide[:clusters]\n",
            "        return wide[: clusters - 1] + bitarray('0')\n",
        ),
    ),
)

ARMING = (
    _bug(
        "recording bits are cleared before the description is replaced",
        "own_bits",
        (
            "        self.since = recording.since\n",
            "        self.since = recording.since\n"
            "        if self.resets:\n"
            "            recording.bitmap.bits.setall(0)\n",
        ),
    ),
    _bug(
        "recording bits are cleared before the own bits are written",
        "own_bits",
        (
            "        clusters = self.bitmap.clusters\n",
            "        clusters = self.bitmap.clusters\n"
            "        if self.resets:\n"
            "            recording.bitmap.bits.setall(0)\n",
        ),
    ),
    _bug(
        "own bits are not written",
        "own_bits",
        (
            "        self.bitmap.bits[:clusters] = recording.bitmap.bits[:clusters]\n",
            "",
        ),
    ),
    _bug(
        "recording bits are cleared while active writes are in flight",
        "session",
        (
            "            await _wait_idle(disks, deadline, deadline_s)\n",
            "            for fleece in fleeces:\n"
            "                if fleece.own is not None and not fleece.own.made:\n"
            "                    fleece.own.recording.bitmap.bits.setall(0)\n"
            "            await _wait_idle(disks, deadline, deadline_s)\n",
        ),
    ),
    _bug(
        "two sessions reset one bitmap at a time",
        "own_bits",
        ("        if user is not None and self.mode != KEEP:\n", "        if False:\n"),
    ),
    _bug(
        "a lost bitmap is used",
        "own_bits",
        (
            "    if existing.lost is not None:\n"
            '        return f"the bitmap was lost: {existing.lost}"\n',
            "",
        ),
        (
            "            if existing.lost is not None:\n"
            "                raise _lost(disk, existing)\n",
            "            existing.lost = None\n",
        ),
    ),
)

ENDING = (
    _bug(
        "a rollback does not merge the own bits",
        "own_bits",
        ("            merge_bits(self.bitmap, recording.bitmap)\n", ""),
    ),
    _bug(
        "a rollback leaves the session as since",
        "own_bits",
        ("            recording.since = self.since\n", ""),
    ),
    _bug(
        "a full backup that failed breaks the chain",
        "own_bits",
        (
            "        if not self.resets:\n            return\n        recording = self.recording\n",
            "        if not self.resets or self.mode == NEW:\n"
            "            self.recording.used_by = None\n            return\n"
            "        recording = self.recording\n",
        ),
    ),
    _bug(
        "a session that broke commits",
        "session",
        ('failed or self.state == "broken"', "failed"),
    ),
    _bug(
        "a bitmap that a failed session made stays",
        "own_bits",
        (
            "            disk.put_bitmap(self.name, self.replaced)\n"
            "            if self.replaced is not None:\n"
            "                self.replaced.used_by = None\n"
            "            recording.close()\n",
            "            pass\n",
        ),
    ),
    _bug(
        "that a session failed is forgotten in a kill",
        "session",
        ('fleece.state.note_failed("it was finished as failed")', "pass"),
    ),
    _bug(
        "a TRIM clears the own bits",
        "snapshot_access",
        (
            "        self._count(first, end)\n        await self._block_copy.release(first, end)\n",
            "        self._count(first, end)\n"
            "        if self._own is not None:\n"
            "            self._own.bitmap.clear(*self._state.access.bytes_of(first, end))\n"
            "        await self._block_copy.release(first, end)\n",
        ),
    ),
)

RESUMING = (
    _bug(
        "a break is noted after the release",
        "state",
        (
            "        self._bits.mark_broken(cause)\n"
            "        self.broken = cause\n"
            "        self._die()\n",
            "        self.broken = cause\n"
            "        self._die()\n"
            "        self._bits.mark_broken(cause)\n",
        ),
    ),
    _bug(
        "a break is not noted",
        "state",
        ("        self._bits.mark_broken(cause)\n        self.broken", "        self.broken"),
    ),
    _bug(
        "a release clears done before access",
        "state",
        (
            "        access[first:end] = 0\n        self.copy.bits[first:end] = 0\n"
            "        self.done.bits[first:end] = 0\n",
            "        self.copy.bits[first:end] = 0\n        self.done.bits[first:end] = 0\n"
            "        access[first:end] = 0\n",
        ),
    ),
    _bug(
        "done without access is taken up",
        "state",
        ("            self.done.bits &= self.access.bits\n", ""),
    ),
    _bug(
        "what was copied is copied again",
        "state",
        (
            "            self.copy.bits[:] = self.access.bits & ~self.done.bits\n",
            "            self.copy.bits[:] = self.access.bits\n"
            "            self.done.bits.setall(0)\n",
        ),
    ),
    _bug(
        "what the temp image holds is not charged",
        "resume",
        ("        if flags & HOLE != HOLE:\n", "        if False:\n"),
    ),
    _bug(
        "own bits are taken up without their since",
        "resume",
        ("        since=remains.since,\n", ""),
    ),
)

CHAIN_PLANTED: tuple[PlantedBug, ...] = (*RECORDING, *ARMING, *ENDING, *RESUMING)
