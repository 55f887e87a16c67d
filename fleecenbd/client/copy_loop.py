"""The copying itself: what is read, written, made durable, noted, and only then released.

    pending ─▶ read, digest, write ─▶ written ─▶ flush ─▶ journal ─▶ durable ─▶ TRIM ─▶ released
       ▲                                  │
       └────────── TargetLost ◀───────────┘

A few workers each take the next block (``plan``), read it, and write it. Beside them one task at a
time makes durable whatever is written by then: one flush, one record of the journal, for many
blocks; and one releases what is durable. Reading goes on meanwhile.

Order rules
    * A block is *written* in the step that ends its last write, and only what was written when a
      flush began is durable when it has ended.
    * Durable blocks are noted in the journal, durably, before a TRIM of them is sent; then nothing
      that happens to the target's machine or to ours can make them be needed again.
    * A TRIM covers whole clusters of the source, each durable to its last byte (``releasing``).
    * TargetLost takes back all that is written and not durable, the blocks that are just being
      written among it: a part of such a block may be gone while the rest is still to come. They
      were not released, so they can be read again.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fleecenbd.client.block_io import READ_LENGTH_MAX, BlockIO, Parts
from fleecenbd.client.checksums import Checksums
from fleecenbd.client.endpoints import Source, SourceLost, Target, TargetLost
from fleecenbd.client.journal import Journal
from fleecenbd.client.plan import Item, Plan
from fleecenbd.client.rate import Rate
from fleecenbd.client.releasing import Releasing, joined
from fleecenbd.client.together import first_of

IN_FLIGHT_LENGTH_MAX = 16 << 20
"""Bytes of blocks that are read and written at a time."""
BATCH_LENGTH = 32 << 20
"""Bytes of data that are written before they are made durable."""
BATCH_S = 1.0
"""Seconds after which less than that is."""
WRITTEN_LENGTH_MAX = 512 << 20
"""Bytes of data that may be written and not durable: then reading waits for the target."""
WRITTEN_ITEMS_MAX = 4096
"""The same for blocks that hold little data."""
RELEASE_TIMEOUT_S = 60.0
"""Seconds that the last TRIMs may take: a server whose temp image hangs must not keep what is
durable from being called complete."""
LOST_IN_A_ROW_MAX = 5
"""How often a target may be lost with nothing becoming durable in between."""


@dataclass(slots=True)
class Written:
    """What a flush makes durable."""

    item: Item
    digest: bytes | None
    """None: there are no checksums, or it is zeroes."""


class CopyLoop:
    """One pull's copying, from one source to one target."""

    def __init__(
        self,
        source: Source,
        target: Target,
        plan: Plan,
        journal: Journal,
        *,
        rate: Rate,
        note: Callable[[str], None],
        checksums: Checksums | None = None,
        trims: bool = True,
        reads_once: bool = False,
        in_flight_length: int = IN_FLIGHT_LENGTH_MAX,
        batch_length: int = BATCH_LENGTH,
        read_length: int = READ_LENGTH_MAX,
    ) -> None:
        """``trims``: release what is durable, where the source can. ``reads_once``: what is read
        is released by that. ``note``: tell the user."""
        self._reads_once = reads_once
        self.durable = plan.resumed
        """Bytes; see events.Progress."""
        self.stopping = False
        self._target = target
        self._plan = plan
        self._journal = journal
        self._rate = rate
        self._note = note
        self._checksums = checksums
        self._batch_length = batch_length
        self._workers = max(
            1,
            min(
                source.requests + target.requests,
                in_flight_length // plan.block_size,
            ),
        )
        self._io = BlockIO(source, target, rate, read_length=read_length)
        self._releasing = Releasing(source, plan, failed=self._trim_failed, enabled=trims)
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._paused = False
        self._exhausted = False
        """The plan has no more blocks."""
        self._busy = 0
        """Items that workers have in hand."""
        self._busy_length = 0
        self._again: deque[Item] = deque()
        self._written: list[Written] = []
        self._written_length = 0
        self._written_since = 0.0
        self._flushing_length = 0
        self._is_flushing = False
        self._epoch = 0
        """How often the target was lost."""
        self._lost_in_a_row = 0
        self._committed = False
        """Nothing more will become durable."""
        self._trim_failures = 0

    # -- from outside --------------------------------------------------------------------------

    @property
    def read(self) -> int:
        """Bytes read."""
        return self._io.read

    @property
    def released(self) -> int:
        """Bytes released, by TRIM or by being read."""
        return self._io.read if self._reads_once else self._releasing.released

    @property
    def releases(self) -> bool:
        """Whether anything is released at all."""
        return self._reads_once or self._releasing.enabled

    @property
    def data_left(self) -> int:
        """Bytes that are still to be read, or written and not durable: an estimate."""
        again = sum(item.data_length for item in self._again)
        in_hand = self._busy_length + self._written_length + self._flushing_length
        return self._plan.data_left + again + in_hand

    @property
    def paused(self) -> bool:
        """Whether nothing is read; blocks that were read already still become durable."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._rate.hold(paused and not self.stopping)
        self._ring()

    def stop(self) -> None:
        """Take nothing new; ``run`` returns when what is in hand is durable, and released."""
        self.stopping = True
        self._rate.set(None)
        self._rate.hold(False)
        self._ring()

    async def run(self) -> None:
        """Copy everything, or until ``stop``. Raises the first OSError that ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                mapping = group.create_task(self._plan.map(), name="map")
                releasing = group.create_task(self._release_as_it_comes(), name="release")
                committing = group.create_task(self._commit_as_it_comes(), name="commit")
                async with asyncio.TaskGroup() as workers:
                    for number in range(self._workers):
                        workers.create_task(self._work(), name=f"copy {number}")
                mapping.cancel()
                await asyncio.wait({committing})
                await asyncio.wait({releasing}, timeout=RELEASE_TIMEOUT_S)
                if not releasing.done():
                    releasing.cancel()
                    self._note(
                        "everything is durable here, and the server has not answered the last "
                        f"TRIMs for {RELEASE_TIMEOUT_S:g} s: they are not waited for"
                    )
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        if not self.stopping:
            assert self.durable == self._plan.to_copy, (
                f"{self.durable} of {self._plan.to_copy} bytes are durable, and nothing is left"
            )

    # -- workers -------------------------------------------------------------------------------

    async def _work(self) -> None:
        while (item := await self._next()) is not None:
            await self._copy(item)

    async def _next(self) -> Item | None:
        """The next blocks, in hand from now on; None when nothing is left, or to be begun."""
        async with self._turn:
            while not self.stopping:
                if self._paused or self._is_far_ahead():
                    await self._changed.wait()
                elif self._again:
                    return self._in_hand(self._again.popleft())
                elif not self._exhausted:
                    item = await self._plan.next()
                    if item is None:
                        self._exhausted = True
                        self._ring()
                    elif self.stopping:
                        return None
                    else:
                        return self._in_hand(item)
                elif self._busy or self._written or self._is_flushing:
                    await self._changed.wait()  # it may come back
                else:
                    return None
            return None

    def _in_hand(self, item: Item) -> Item:
        self._busy += 1
        self._busy_length += item.data_length
        return item

    def _is_far_ahead(self) -> bool:
        return (
            self._written_length + self._flushing_length > WRITTEN_LENGTH_MAX
            or len(self._written) > WRITTEN_ITEMS_MAX
        )

    async def _copy(self, item: Item) -> None:
        parts = await self._io.read_item(item)
        digest = await self._digest(item, parts)
        while True:
            epoch = self._epoch
            await self._io.write_parts(parts)
            if epoch == self._epoch:
                break
        # In one step with the look at the epoch.
        if not self._written:
            self._written_since = asyncio.get_running_loop().time()
        self._written.append(Written(item, digest))
        self._written_length += item.data_length
        self._busy -= 1
        self._busy_length -= item.data_length
        self._ring()

    async def _digest(self, item: Item, parts: Parts) -> bytes | None:
        """None for whole blocks of zeroes, whose digest everybody knows."""
        block_length = self._plan.durable.bytes_of(item.first, item.first + 1)[1]
        if self._checksums is None or (not item.data and item.wanted >= block_length):
            return None
        return await self._checksums.of([piece for _, piece in parts])

    # -- durable -------------------------------------------------------------------------------

    async def _commit_as_it_comes(self) -> None:
        while await self._is_due():
            await self._commit()
        self._committed = True
        self._ring()

    async def _is_due(self) -> bool:
        """Wait until there is a batch to be made durable; False: none will come."""
        loop = asyncio.get_running_loop()
        while True:
            is_last = not self._busy and (self.stopping or (self._exhausted and not self._again))
            if not self._written:
                if is_last:
                    return False
                await self._changed.wait()
                continue
            left_s = self._written_since + BATCH_S - loop.time()
            if is_last or left_s <= 0 or self._written_length >= self._batch_length:
                return True
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _commit(self) -> None:
        """Make durable, and note, what is written by now."""
        batch, self._written = self._written, []
        self._is_flushing = True
        self._flushing_length, self._written_length = self._written_length, 0
        try:
            await self._target.flush()
        except TargetLost as error:
            self._take_back(batch, error)
            return
        self._lost_in_a_row = 0
        data = [(w.item.first, w.item.count) for w in batch if not _is_zeroes(w, self._checksums)]
        zeroes = [(w.item.first, w.item.count) for w in batch if _is_zeroes(w, self._checksums)]
        digests = {w.item.first: w.digest for w in batch if w.digest is not None}
        await self._journal.add(joined(data), joined(zeroes), digests)
        self._releasing.add((*data, *zeroes))
        self.durable += sum(written.item.wanted for written in batch)
        self._flushing_length = 0
        self._is_flushing = False
        self._ring()

    def _take_back(self, batch: list[Written], error: TargetLost) -> None:
        """All that is not durable has to be written again."""
        self._lost_in_a_row += 1
        if self._lost_in_a_row > LOST_IN_A_ROW_MAX:
            raise OSError(
                errno.EIO,
                f"it was lost {self._lost_in_a_row} times, and nothing became durable in between: "
                f"{error.strerror or error}",
                self._target.name,
            ) from error
        self._epoch += 1
        lost = sorted(batch + self._written, key=lambda written: written.item.first)
        self._again.extendleft(written.item for written in reversed(lost))
        self._written, self._written_length, self._flushing_length = [], 0, 0
        self._is_flushing = False
        self._note(
            f"{self._target.name} was lost and is back: what was not durable is copied again"
        )
        self._ring()

    # -- released ------------------------------------------------------------------------------

    async def _release_as_it_comes(self) -> None:
        while True:
            if self._releasing.is_ready:
                await self._releasing.release()
            elif self._committed:
                return
            else:
                await self._changed.wait()

    def _trim_failed(self, error: OSError, offset: int, length: int) -> None:
        is_needed = self.durable < self._plan.to_copy and not self.stopping
        if is_needed and isinstance(error, SourceLost):
            raise error
        # Anything else: if the session is over, the next read says so, and better.
        self._trim_failures += 1
        if self._trim_failures == 1:
            self._note(
                f"the server was told to release {length} bytes at {offset}, and did not: "
                f"{error.strerror or error}; they are safe here"
            )

    def _ring(self) -> None:
        """Whoever waits for a change looks again."""
        self._changed.set()
        self._changed.clear()


def _is_zeroes(written: Written, checksums: Checksums | None) -> bool:
    return checksums is not None and written.digest is None
