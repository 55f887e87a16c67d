"""The planted bugs, as patches (old text, new text) of the engine's modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlantedBug:
    """A bug: what it is, where, and the edits that plant it."""

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]


def _bug(name: str, module: str, *edits: tuple[str, str]) -> PlantedBug:
    return PlantedBug(name, module, edits)


_FROZEN_WAIT = """\
            while not state.dead and state.frozen(first, end):
                if deadline is not None and loop.time() >= deadline:
                    self._give_up("a backup read of the same range")
                    return
                waited = True
                state.stats.frozen_waits += 1
                await state.guests.wait(first, end, deadline)
"""
_CLAIM_LOOP = """\
            ours = list(claimed or ())
            while not state.dead:
"""

# Caught by seeds of the kind "full" only: a file system with a reserve, limits, throttle.
ROOM = (
    _bug(
        "a delay is not ended by a release",
        "copy_before_write",
        (
            "is_delayed = True\n            await state.guests.wait(first, end, until)",
            "is_delayed = True\n            await asyncio.sleep(until - loop.time())",
        ),
    ),
    _bug(
        "a delay is no part of the request's time",
        "copy_before_write",
        (
            "waited = claimed is None and await self._delay(first, end, started)",
            "waited = claimed is None and await self._delay(first, end, started)\n"
            "        deadline = deadline and loop.time() + state.cbw_timeout_s",
        ),
    ),
    _bug(
        "a delay may take all of the request's time",
        "copy_before_write",
        ("until = started + min(most, state.room.delay_s())", "until = started + 0.1"),
    ),
    _bug(
        "what is charged is not counted down",
        "state",
        ("room.left = left - new", "pass"),
    ),
    _bug(
        "what is charged while the file system answers is forgotten",
        "room",
        (">> self._state.shift) - self.during", ">> self._state.shift)"),
    ),
    _bug(
        "a copy without room does not ask again",
        "room",
        ("            await self.look()\n            try:", "            try:"),
    ),
    _bug(
        "the reserve is given away",
        "room",
        ("self.left = (max(0, free - self.reserve)", "self.left = (free"),
    ),
)

GUEST_SIDE = (
    _bug(
        "a guest does not wait for frozen reads",
        "copy_before_write",
        ("while not state.dead and state.frozen(first, end):", "while False:"),
    ),
    _bug(
        "a guest waits for frozen reads before the copy, not after",
        "copy_before_write",
        (_FROZEN_WAIT, ""),
        (_CLAIM_LOOP, _FROZEN_WAIT + _CLAIM_LOOP),
    ),
    _bug(
        "the timer does not cover the wait for frozen reads",
        "copy_before_write",
        (
            "frozen_waits += 1\n                await state.guests.wait(first, end, deadline)",
            "frozen_waits += 1\n                await state.guests.wait(first, end)",
        ),
    ),
    _bug(
        "the claimer waits for its own copies",
        "copy_before_write",
        (
            "if not state.copy_in_flight(first, end):\n                    break",
            "if all(copy.ended for copy in ours) and not state.copy_in_flight(first, end):\n"
            "                    break",
        ),
    ),
    _bug(
        "a timeout makes the clusters dirty again",
        "copy_before_write",
        (
            "state.stats.timeouts += 1",
            "state.stats.timeouts += 1\n"
            "        for copy in state.copies:\n"
            "            live = state.access.bits[copy.first : copy.end]\n"
            "            state.copy.bits[copy.first : copy.end] |= live",
        ),
    ),
    _bug(
        "a guest write fails with the errno of the copy",
        "copy_before_write",
        (
            'raise OSError(errno.EIO, f"{state.name}: old data could',
            'raise OSError(copy.error.errno, f"{state.name}: old data could',
        ),
    ),
    _bug(
        "a guest write in one step ignores frozen reads",
        "copy_before_write",
        ("return not (state.frozen_reads and state.frozen(first, end))", "return True"),
    ),
    _bug(
        "a guest write in one step ignores copies in flight",
        "copy_before_write",
        ("if state.copies and state.copy_in_flight(first, end):", "if False:"),
    ),
    _bug(
        "a guest waits for copies that a TRIM cancelled",
        "state",
        ("if low < high and find(1, low, high) >= 0:", "if low < high:"),
    ),
    _bug(
        "a guest waits for a frozen read that was released",
        "state",
        ("return access.find(0, self.first, self.end) < 0", "return True"),
    ),
    _bug(
        "a release wakes nobody",
        "state",
        ("woken = self.guests.wake(first, end)", "woken = 0"),
    ),
    _bug(
        "a release does not wake those who wait for a read of a wider range",
        "state",
        ("woken += self.guests.wake(read.first, read.end)", "pass"),
    ),
    _bug(
        "a break or finish wakes nobody",
        "state",
        (
            "self.release(0, self.clusters)\n        self.guests.wake_all()",
            "for bitmap in (self.access, self.copy, self.done):\n            bitmap.bits.setall(0)",
        ),
    ),
)

COPYING = (
    _bug(
        "a copy sets done where access was lost",
        "block_copy",
        ("|= live\n", "|= live if error is not None else live | ~live\n"),
    ),
    _bug(
        "a failed copy sets copy where access was lost",
        "block_copy",
        ("|= live\n", "|= live if error is None else live | ~live\n"),
    ),
    _bug(
        "a failed copy counts as done",
        "block_copy",
        ("            self._end(copy, error)", "            self._end(copy, None)"),
    ),
    _bug(
        "a copy's failure on released clusters fails the guest",
        "block_copy",
        (
            "            if state.access.bits.find(1, first, end) >= 0:\n                raise",
            "            if True:\n                raise",
        ),
    ),
    _bug(
        "a copy writes clusters that lost access meanwhile",
        "block_copy",
        (
            "            stop = access.find(0, first, end)\n"
            "            if stop < 0:\n"
            "                stop = end\n"
            "            only_zeroes =",
            "            stop = end\n            only_zeroes =",
        ),
    ),
    _bug(
        "a copy takes what begins with a hole for a hole",
        "copy_reads",
        (
            "return all(flags & EXTENT_ZERO for _, flags in extents)",
            "return bool(extents[0][1] & EXTENT_ZERO)",
        ),
    ),
    _bug(
        "a clone shares clusters that lost access meanwhile",
        "block_copy",
        (
            "            stop = access.find(0, first, end)\n"
            "            if stop < 0:\n"
            "                stop = end\n"
            "            state.charge(first, stop)",
            "            stop = end\n            state.charge(first, stop)",
        ),
    ),
    _bug(
        "a clone is charged once it is made",
        "block_copy",
        (
            "            state.charge(first, stop)\n            clone =",
            "            clone =",
        ),
        (
            "            state.stats.cloned_bytes +=",
            "            state.charge(first, stop)\n            state.stats.cloned_bytes +=",
        ),
    ),
    _bug(
        "a clone that was refused counts as made",
        "block_copy",
        ("return await call is not False", "return await call in (None, True, False)"),
    ),
    _bug(
        "TRIM does not wait for a clone in flight",
        "block_copy",
        (
            "            if not await self._temp_write(first, stop, clone):\n",
            "            if not await clone:\n",
        ),
    ),
    _bug(
        "the disk's last, partial cluster is cloned",
        "copy_reads",
        (
            "whole = min(end, self._state.size >> self._state.shift)",
            "whole = min(end, -(-self._state.size >> self._state.shift))",
        ),
    ),
    _bug(
        "what is data in part only is a hole to a clone",
        "copy_reads",
        (
            "data[start >> shift : -(-end >> shift)] = 1",
            "data[-(-start >> shift) : max(end >> shift, -(-start >> shift))] = 1",
        ),
    ),
    _bug(
        "a claim leaves the copy bits set",
        "block_copy",
        ("            bits[first:stop] = 0\n            copy =", "            copy ="),
    ),
    _bug(
        "a failed copy gives its share of temp_limit back",
        "block_copy",
        (
            "                copy.error = error\n",
            "                copy.error = error\n"
            "                state.uncharge(copy.first, copy.end)\n",
        ),
    ),
    _bug(
        "temp_limit is given back before the punch",
        "block_copy",
        (
            "                await state.target.trim(low << state.shift,"
            " (high - low) << state.shift)\n"
            "                state.uncharge(low, high)\n",
            "                state.uncharge(low, high)\n"
            "                await state.target.trim(low << state.shift,"
            " (high - low) << state.shift)\n",
        ),
    ),
    _bug(
        "temp_limit is checked after the write",
        "state",
        ("        total = stats.temp_clusters + new\n", "        total = stats.temp_clusters\n"),
        ("stats.temp_clusters = total", "stats.temp_clusters = total + new"),
    ),
)

BACKUP_SIDE = (
    _bug(
        "a read does not look again before its reply",
        "snapshot_access",
        (
            "            self._look(first, end)\n            if offset >= stop:\n"
            "                break\n",
            "            if offset >= stop:\n                break\n"
            "            self._look(first, end)\n",
        ),
    ),
    _bug(
        "a read looks again at access only, not at broken",
        "snapshot_access",
        (
            "        if state.dead:\n            raise state.death()\n"
            "        if state.access.bits.find(0, first, end) >= 0:\n"
            "            raise self._denied(first, end)\n\n    async def",
            "        if state.access.bits.find(0, first, end) >= 0:\n"
            "            raise self._denied(first, end)\n\n    async def",
        ),
    ),
    _bug(
        "a read looks at done in one step and freezes in another",
        "snapshot_access",
        (
            "            if run_end < 0:\n                run_end = end\n            run_stop",
            "            if run_end < 0:\n                run_end = end\n"
            "            await state.source.flush()\n            run_stop",
        ),
    ),
    _bug(
        "the end of a frozen read wakes nobody",
        "snapshot_access",
        (
            "            state.guests.wake(first, end)\n\n    async def _temp_read",
            "            pass\n\n    async def _temp_read",
        ),
    ),
    _bug(
        "a read of the active image is not frozen",
        "state",
        ("return access.find(0, self.first, self.end) < 0", "return False"),
    ),
    _bug(
        "block status is not frozen",
        "state",
        (
            "return (self.asked[low - self.first : high - self.first] & access[low:high]).any()",
            "return False",
        ),
    ),
    _bug(
        "block status does not look at access again",
        "snapshot_access",
        ("return self._unreadable_as_data(offset, extents)", "return extents"),
    ),
    _bug(
        "block status says zero for what was released",
        "snapshot_access",
        ("flags if readable else _DATA", "flags"),
    ),
    _bug(
        "the access map tells of what was ever begun to be copied as held",
        "snapshot_access",
        (
            "access_extents(state.access, state.done, offset",
            "access_extents(state.access, state.charged, offset",
        ),
    ),
    _bug(
        "a read in one step does not look at access",
        "snapshot_access",
        (
            "        if state.access.bits.find(0, first, end) >= 0:\n"
            "            raise self._denied(first, end)\n        if length >",
            "        if length >",
        ),
    ),
)

RELEASING = (
    _bug(
        "TRIM does not wait for temp writes in flight",
        "block_copy",
        ("            *state.temp_writes.overlapping(first, end),\n", ""),
    ),
    _bug(
        "a second TRIM of a range replies at once",
        "block_copy",
        (
            "        request = self.release_later(first, end)\n",
            "        if state.access.bits.find(1, first, end) < 0:\n            return\n"
            "        request = self.release_later(first, end)\n",
        ),
    ),
    _bug(
        "TRIM does not free the space",
        "block_copy",
        ("if not state.dead and (low := charged.find(1, first, end)) >= 0:", "if False:"),
    ),
    _bug(
        "the end of a temp write does not wake TRIM",
        "block_copy",
        (
            "            state.temp_writes.remove(request)\n"
            "            state.trims.wake(first, end)\n",
            "            state.temp_writes.remove(request)\n",
        ),
    ),
    _bug(
        "TRIM waits on though the session has ended",
        "block_copy",
        ("while not request.ended and not state.dead:", "while not request.ended:"),
    ),
    _bug(
        "READ_ONCE releases clusters that it covered in part",
        "parts",
        (
            "return (offset + mask) >> shift, (stop + mask if stop == size else stop) >> shift",
            "return offset >> shift, (stop + mask) >> shift",
        ),
    ),
    _bug(
        "READ_ONCE never releases the short last cluster",
        "parts",
        ("(stop + mask if stop == size else stop) >> shift", "stop >> shift"),
    ),
    _bug(
        "parts that were read once add up to whole clusters",
        "snapshot_access",
        (
            "first, end = covered_whole(offset, length, state.size, state.shift)",
            "first, end = self._covered(offset, offset + length)",
        ),
    ),
    _bug(
        "READ_ONCE does not free the space",
        "snapshot_access",
        (
            "self._block_copy.release_later(first, end, untold=True)",
            "state.release(first, end)",
        ),
    ),
    _bug(
        "READ_ONCE releases in a later step",
        "snapshot_access",
        (
            "            self._block_copy.release_later(first, end, untold=True)\n",
            "            import asyncio\n"
            "            asyncio.get_running_loop().call_soon(\n"
            "                self._block_copy.release_later, first, end\n            )\n",
        ),
    ),
    _bug(
        "a release leaves done set",
        "state",
        ("        self.done.bits[first:end] = 0\n", ""),
    ),
    _bug(
        "parts of a cluster add up by length",
        "parts",
        (
            "start, end = min(start, low), max(end, high)",
            "start, end = min(start, low), min(start, low) + (end - start) + (high - low)",
        ),
        ("if start == 0 and end == whole:", "if start == 0 and end >= whole:"),
    ),
    _bug(
        "a TRIM of the disk's last bytes releases the whole last cluster",
        "snapshot_access",
        (
            "if (offset, stop) == (tail_start, tail_start + tail_length):",
            "if stop == tail_start + tail_length:",
        ),
    ),
    _bug(
        "the last, partial cluster is never covered whole",
        "snapshot_access",
        (
            "tail_length = min(1 << shift, state.size - tail_start)",
            "tail_length = 1 << shift",
        ),
    ),
)

ARMING = (
    _bug(
        "arming does not wait for active writes",
        "session",
        ("while busy := [disk for disk in disks if disk.active_writes]:", "while busy := []:"),
    ),
    _bug(
        "arming waits for guest writes that wait in copy-before-write",
        "disk",
        (
            "        await self._before_write(ranges)\n"
            "        await self._active(ranges, self.device.pwrite(offset, data))\n",
            "        async def both() -> None:\n"
            "            await self._before_write(ranges)\n"
            "            await self.device.pwrite(offset, data)\n\n"
            "        await self._active(ranges, both())\n",
        ),
    ),
    _bug(
        "a guest write does not look again for new fleeces",
        "disk",
        ("            passed.update(fleeces)\n", "            return\n"),
    ),
    _bug(
        "a guest write in one step ignores an arming's hold",
        "disk",
        ("if self._holds or length >", "if length >"),
    ),
    _bug(
        "a guest write in more than one step ignores an arming's hold",
        "disk",
        ("            elif self._holds:\n", "            elif False:\n"),
    ),
    _bug(
        "a session's fleeces are installed one by one",
        "session",
        (
            "                fleece.disk.fleeces.append(fleece)\n",
            "                fleece.disk.fleeces.append(fleece)\n"
            "                await asyncio.sleep(0)\n",
        ),
    ),
)

_WRITE = """\
        await self._before_write(ranges)
        await self._active(ranges, self.device.pwrite(offset, data))
"""

ACTIVE_IMAGE = (
    _bug(
        "a guest write that fails for a session's sake is written all the same",
        "disk",
        (
            _WRITE,
            "        try:\n"
            "            await self._before_write(ranges)\n"
            "        except OSError:\n"
            "            await self._active(ranges, self.device.pwrite(offset, data))\n"
            "            raise\n"
            "        await self._active(ranges, self.device.pwrite(offset, data))\n",
        ),
    ),
    _bug(
        "a guest write that fails for a session's sake is acknowledged",
        "disk",
        (
            _WRITE,
            "        try:\n"
            "            await self._before_write(ranges)\n"
            "        except OSError:\n"
            "            return\n"
            "        await self._active(ranges, self.device.pwrite(offset, data))\n",
        ),
    ),
    _bug(
        "a guest's status begins at a sector",
        "disk",
        (
            "windowed_status(self.device.extents, offset, length,",
            "windowed_status(self.device.extents, offset & ~511, length,",
        ),
    ),
    _bug(
        "a guest's zeroes begin at a sector",
        "disk",
        (
            "self.device.zero(offset, length, may",
            "self.device.zero(offset & ~511, length + (offset & 511), may",
        ),
    ),
    _bug(
        "a guest write is acknowledged before it has ended",
        "disk",
        (
            "        await asyncio.shield(task)\n",
            "",
        ),
    ),
)

PLANTED = (*GUEST_SIDE, *COPYING, *BACKUP_SIDE, *RELEASING, *ARMING, *ACTIVE_IMAGE, *ROOM)
