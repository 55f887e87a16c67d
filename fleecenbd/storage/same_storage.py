"""Whether two devices are two ways into the same storage: names and addresses do not tell.

Many NBD servers ignore an export's name, or have several. A temp image in the place of another, or
of a disk, would make a backup of wrong data, or wipe the disk, and nobody would be told.

    1  compare a few places, where the other has data if that can be found; they differ: no
    2  write a mark, look for it, put back what was there

So a mark is written only where all that was compared is alike: where the other is empty, that is,
or the same. If it is the same, and a guest's disk, then for as long as a few requests take a random
4 KiB of it are not the guest's: zeroes, if there were any among the places.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from fleecenbd.storage.device import EXTENT_ZERO, Buffer, Data, Extent

LOOK = 4096
"""Bytes that are looked at in one place."""
PLACES = 4
"""Places that are compared first."""
WINDOW = 64 << 20
"""Bytes in which data is looked for, from a random place on."""
MARK_S = 2.0
"""Seconds for a mark to be written and looked for: others may have to wait meanwhile,"""
RESTORE_S = 2.0
"""and for it to be written, late, and what was there to be put back."""


class Readable(Protocol):
    """What can be looked at."""

    @property
    def name(self) -> str:
        """As Device has it."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """As Device has it."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Device has it."""


class Writable(Readable, Protocol):
    """What can be changed, too."""

    async def pwrite(self, offset: int, data: Data) -> None:
        """As Device has it."""

    async def zero(self, offset: int, length: int) -> None:
        """As Device has it."""


Alone: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
"""To a context in which nobody else uses a device."""


async def is_same_storage(one: Writable, other: Readable, alone: Alone) -> bool:
    """Whether what is written to ``one`` is seen in ``other``. Raises OSError, and TimeoutError.

    ``alone``: nobody else uses the one of the two that is in use, while there is a mark.
    """
    blocks = min(one.size, other.size) // LOOK
    if not blocks:
        return False
    place = None
    is_zero = False
    differing = 0
    for _ in range(PLACES):
        offset = await _place(other, blocks)
        found = await _alike(one, other, offset)
        if found is None:
            differing += 1  # one of them may be a place that a guest never stops writing to
            if differing == 2:
                return False
        elif not is_zero:
            place, is_zero = offset, not any(found)
    assert place is not None, "most places are alike"
    async with alone():
        async with asyncio.timeout(MARK_S):
            before = await one.pread(place, LOOK)
        return await _is_marked(one, other, place, before)


async def _place(other: Readable, blocks: int) -> int:
    """The offset of a place in which ``other`` has data, or just of any."""
    offset = int.from_bytes(os.urandom(8), "big") % blocks * LOOK
    end = blocks * LOOK
    position = offset
    for length, flags in await other.extents(offset, min(WINDOW, end - offset)):
        start = position - position % LOOK
        if not flags & EXTENT_ZERO and offset <= start:
            return start
        position += length
    return offset


async def _alike(one: Readable, other: Readable, offset: int) -> Buffer | None:
    """What both have there; None: they differ."""
    for _ in range(2):  # somebody may have written in between
        found = await one.pread(offset, LOOK)
        if found == await other.pread(offset, LOOK):
            return found
    return None


async def _is_marked(one: Writable, other: Readable, offset: int, before: Buffer) -> bool:
    mark = os.urandom(LOOK)
    marking = asyncio.ensure_future(one.pwrite(offset, mark))
    marking.add_done_callback(_retrieve)
    try:
        async with asyncio.timeout(MARK_S):
            await asyncio.shield(marking)
            return await other.pread(offset, LOOK) == mark
    finally:
        restoring = asyncio.ensure_future(_restore(one, offset, before, marking))
        if (await asyncio.wait({restoring}, timeout=RESTORE_S))[1]:
            restoring.add_done_callback(_retrieve)
            raise OSError(
                errno.ETIMEDOUT,
                f"it does not answer: {LOOK} bytes at {offset} may hold a mark, and not what they "
                "held",
                one.name,
            )
        restoring.result()


def _retrieve(late: asyncio.Future[None]) -> None:
    """Nobody may wait for it any more: what it failed with is known then."""
    if not late.cancelled():
        late.exception()


async def _restore(
    one: Writable, offset: int, before: Buffer, marking: asyncio.Future[None]
) -> None:
    await asyncio.wait({marking})  # else it could come after what follows
    if any(before):
        await one.pwrite(offset, before)
    else:
        await one.zero(offset, LOOK)
