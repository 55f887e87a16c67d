"""One item read from the source and written to the target: pieces in flight, zeroes left out."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine, Iterable
from typing import Any, TypeAlias

from fleecenbd.client.checksums import Piece
from fleecenbd.client.endpoints import Source, Target
from fleecenbd.client.plan import Item
from fleecenbd.client.rate import Rate
from fleecenbd.client.together import together
from fleecenbd.engine.zeroes import ZEROES, is_zero
from fleecenbd.storage.device import Buffer

READ_LENGTH_MAX = 256 << 10
"""Bytes of one READ: what a server of ours gives a backup before others have their turn."""
ZERO_RUN = 4096
"""Bytes: zeroes within data that are left out of what is written, where the target has them."""
ZERO_CALL_MIN = 64 << 10
"""Bytes of zeroes within data from which on a target that has none there is told to make them."""

Parts: TypeAlias = "list[tuple[int, Piece]]"
"""Offset and content of all that is wanted, in order: bytes, or a number of zeroes."""


class BlockIO:
    """Reads and writes of one pull, no more of them at a time than each end takes."""

    def __init__(
        self, source: Source, target: Target, rate: Rate, *, read_length: int = READ_LENGTH_MAX
    ) -> None:
        self.read = 0
        """Bytes read."""
        self._source = source
        self._target = target
        self._rate = rate
        self._read_length = read_length
        self._reads = asyncio.Semaphore(source.requests)
        self._writes = asyncio.Semaphore(target.requests)

    async def read_item(self, item: Item) -> Parts:
        """All that is wanted of it, in pieces as they were read."""
        step, parts = self._read_length, list[tuple[int, Piece]]()
        reads = []

        async def fetch(index: int, offset: int, length: int) -> None:
            parts[index] = offset, await self._read_piece(offset, length)

        for offset, length, is_data in item.parts:
            if not is_data:
                parts.append((offset, length))
                continue
            for at in range(offset, offset + length, step):
                count = min(step, offset + length - at)
                reads.append(fetch(len(parts), at, count))
                parts.append((at, count))
        await together(reads)
        return parts

    async def _read_piece(self, offset: int, length: int) -> Buffer:
        await self._rate.take(length)
        async with self._reads:
            data = await self._source.pread(offset, length)
        if len(data) != length:
            raise OSError(
                errno.EIO, f"{len(data)} bytes came for {length} at {offset}", self._source.name
            )
        self.read += length
        return data

    async def write_parts(self, parts: Parts) -> None:
        """Write them all; zeroes only where the target does not have them already."""
        if self._target.write_unit > 1:
            parts = await self._in_units(parts)
        await together(call for offset, piece in parts for call in self._write_calls(offset, piece))

    async def _in_units(self, parts: Parts) -> Parts:
        """The same in whole units, each in one piece; between the parts the target stays as it is.

        An item begins and ends at a multiple of every unit, so nobody else writes these.
        """
        unit = self._target.write_unit
        runs: list[tuple[int, int, Parts]] = []
        """Start and end of what hangs together, in bytes, and what is in it."""
        for offset, piece in parts:
            start, end = offset // unit * unit, -(-(offset + _length(piece)) // unit) * unit
            members: Parts = []
            if runs and start <= runs[-1][1]:
                start, before, members = runs.pop()
                end = max(before, end)
            runs.append((start, end, [*members, (offset, piece)]))
        found: Parts = []
        for start, end, members in runs:
            if len(members) == 1 and isinstance(members[0][1], int) and members[0][0] == start:
                stop = start + members[0][1]
                if stop == end or stop == self._source.size:
                    found.append((start, end - start))  # it may be long
                    continue
            if self._target.is_zero:
                data = bytearray(end - start)
            else:
                data = bytearray(await self._target.pread(start, end - start))
            for offset, piece in members:
                new = bytes(piece) if isinstance(piece, int) else piece
                data[offset - start : offset - start + len(new)] = new
            found.append((start, data))
        return found

    def _write_calls(self, offset: int, piece: Piece) -> Iterable[Coroutine[Any, Any, None]]:
        if isinstance(piece, int):
            if not self._target.is_zero:
                yield self._zero(offset, piece)
            return
        view = memoryview(piece)
        zero_min = ZERO_RUN if self._target.is_zero else ZERO_CALL_MIN
        for start, length, is_data in data_runs(piece, zero_min, self._target.write_unit):
            if is_data:
                yield self._write(offset + start, view[start : start + length])
            elif not self._target.is_zero:
                yield self._zero(offset + start, length)

    async def _write(self, offset: int, data: memoryview) -> None:
        async with self._writes:
            await self._target.pwrite(offset, data)

    async def _zero(self, offset: int, length: int) -> None:
        async with self._writes:
            await self._target.zero(offset, length)


def _length(piece: Piece) -> int:
    return piece if isinstance(piece, int) else len(piece)


def data_runs(data: Buffer, zero_min: int, unit: int = 1) -> list[tuple[int, int, bool]]:
    """(start, length, is data) of the data, and of the zeroes in it that are ``zero_min`` long.

    They begin at multiples of ``unit``, as ``data`` does.
    """
    zeroes = memoryview(ZEROES)[:ZERO_RUN]
    if data.find(zeroes) < 0:
        return [(0, len(data), True)]
    runs: list[tuple[int, int, bool]] = []
    step = max(ZERO_RUN, unit)
    for start in range(0, len(data), step):
        length = min(step, len(data) - start)
        is_data = not is_zero(data, start, length)
        if runs and runs[-1][2] == is_data:
            runs[-1] = (runs[-1][0], runs[-1][1] + length, is_data)
        else:
            runs.append((start, length, is_data))
    merged: list[tuple[int, int, bool]] = []
    for start, length, is_data in runs:
        is_data = is_data or length < zero_min
        if merged and merged[-1][2] == is_data:
            merged[-1] = (merged[-1][0], merged[-1][1] + length, is_data)
        else:
            merged.append((start, length, is_data))
    return merged
