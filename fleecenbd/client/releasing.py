"""What is durable is released by TRIM: whole clusters of the source, once each.

    blocks      ├─┼─┼─┼─┼─┼─┼─┼─┤      of the checksums and the journal, 1 MiB
    settled      ■ ■ ■ □ ■ ■ ■ ■       durable, or never wanted
    clusters    ├───┼───┼───┼───┤      of the source; mostly smaller than a block
    released    └───┘   └───────┘

Called with blocks only after the journal has them, durably. What the source is told goes no
further: a release that fails costs space in the server's temp image and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from fleecenbd.client.endpoints import Source
from fleecenbd.client.plan import Plan
from fleecenbd.client.together import together
from fleecenbd.engine.bitmap import cluster_runs

TRIM_LENGTH_MAX = 1 << 30
"""Bytes of one TRIM; a multiple of every cluster."""
TRIMS_MAX = 8
"""TRIMs in flight."""


class Releasing:
    """The TRIMs of one pull."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        *,
        failed: Callable[[OSError, int, int], None],
        enabled: bool = True,
    ) -> None:
        """``failed``: called for a TRIM that failed, with offset and length; may raise.

        The plan has been scanned.
        """
        self.released = 0
        """Bytes, of what was wanted: the rest of these clusters could not be read in any case."""
        self._source = source
        self._plan = plan
        self._durable = plan.durable
        self._failed = failed
        self.enabled = enabled and source.can_trim
        self._per_cluster = max(1, source.cluster // plan.block_size)
        blocks = plan.durable.clusters
        durable, wanted = plan.durable.bits[:blocks], plan.wanted.bits[:blocks]
        self._settled = durable | ~wanted
        self._released = ~wanted
        self._ready = [(first, end - first) for first, end in cluster_runs(durable, 0, blocks)]
        """Blocks (first, count) that became durable: an earlier pull may not have released its."""

    @property
    def is_ready(self) -> bool:
        """Whether there is something to ``release``."""
        return bool(self._ready)

    def add(self, blocks: Iterable[tuple[int, int]]) -> None:
        """These (first, count) are durable, and the journal says so."""
        for first, count in blocks:
            self._settled[first : first + count] = 1
            self._ready.append((first, count))

    async def release(self) -> None:
        """Release what was added since the last time; returns when that is done."""
        blocks, self._ready = joined(self._ready), []
        if not self.enabled:
            return
        turn = asyncio.Semaphore(TRIMS_MAX)

        async def trim(offset: int, length: int) -> None:
            async with turn:
                try:
                    await self._source.trim(offset, length)
                except OSError as error:
                    self._failed(error, offset, length)
                else:
                    self.released += self._plan.wanted_bytes(offset, length)

        await together(
            trim(start, min(TRIM_LENGTH_MAX, offset + length - start))
            for offset, length in self._take(blocks)
            for start in range(offset, offset + length, TRIM_LENGTH_MAX)
        )

    def _take(self, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(offset, length) of the settled clusters that these blocks touch, for the first time."""
        per, end = self._per_cluster, len(self._settled)
        found: list[tuple[int, int]] = []
        for first, count in blocks:
            start = first - first % per
            stop = min(end, -(-(first + count) // per) * per)
            for run, run_end in self._whole(start, stop):
                self._released[run:run_end] = 1
                found.append((run, run_end - run))
        return [self._durable.bytes_of(first, first + count) for first, count in joined(found)]

    def _whole(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Runs of blocks within, in which every cluster is settled whole, and released nowhere
        or in part."""
        per = self._per_cluster
        ready = self._settled[start:stop] & ~self._released[start:stop]
        if per > 1:
            for at in range(start, stop, per):
                part = slice(at - start, at - start + per)
                ready[part] = self._settled[at : at + per].all() and ready[part].any()
        return [(start + run, start + end) for run, end in cluster_runs(ready, 0, len(ready))]


def joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, count) sorted, and neighbours made one."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return found
