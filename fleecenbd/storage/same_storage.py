"""Whether two devices are two ways into the same storage: names and addresses do not tell.

Many NBD servers ignore an export's name, or have several. A temp image in the place of another, or
of a disk, would make a backup of wrong data, or wipe the disk, and nobody would be told.

Temp images are told apart by a mark: a few places are compared, and where they are alike a mark is
written to the one in use, by its own connections, looked for, and removed, before anybody else uses
it. Where that fails, it is lost, as it would be with a connection.

Nothing is written to find out whether something is a disk's storage: a mark that is late, or stays,
would be in a guest's disk. It is taken for that where all places are alike, and there is data in
one; or where they are all zeroes, and the sizes are the same. So a copy is refused, and so is an
empty export for an empty disk of its size, which can be given another size.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import Enum
from typing import Any, Protocol, TypeAlias, TypeVar

from fleecenbd.storage.device import EXTENT_ZERO, Buffer, Data, Extent

LOOK = 4096
"""Bytes that are looked at in one place."""
PLACES = 4
"""Places that are compared first."""
WINDOW = 64 << 20
WINDOW_MAX = 1 << 30
"""Bytes in which data is looked for at once, from a random place on, and what that is doubled to
while there is none: a window full of small extents takes long to be told."""
SEARCHED = 64 << 30
"""Bytes in which it is looked for at most."""
SIZE_APART = 1 << 20
"""Bytes by which what is empty must differ in size from an empty disk."""
MARK_S = 2.0
"""Seconds for one look, and for one mark: others may have to wait meanwhile."""
ANSWER_S = 8.0
"""Seconds for a comparison with a disk; of temp images, for all that follows one."""

_late: set[asyncio.Task[Any]] = set()


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


Result = TypeVar("Result")

Alone: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
"""To a context in which others are kept from a device."""


async def is_temp(new: Readable, temp: Writable, alone: Alone, lose: Callable[[str], None]) -> bool:
    """Whether what is written to a temp image in use is seen in ``new``.

    ``alone``: nobody else uses the temp image. ``lose`` is told why what it holds cannot be
    trusted any more. Raises OSError; ETIMEDOUT where one of them does not answer.
    """
    alike = await _alike_place(new, temp)
    if alike is None:
        return False
    return await _told(_mark_temp(new, temp, alike[0], alone, lose), temp.name)


async def _mark_temp(
    new: Readable, temp: Writable, place: int, alone: Alone, lose: Callable[[str], None]
) -> bool:
    mark = os.urandom(LOOK)
    async with alone():
        before = await temp.pread(place, LOOK)
        try:
            await temp.pwrite(place, mark)
            async with _answering(new.name):
                return await new.pread(place, LOOK) == mark
        finally:
            try:
                await _put_back(temp, place, before)
            except OSError as error:
                lose(f"{LOOK} bytes at {place} may not be what they were: {error.strerror}")
                raise


class Likeness(Enum):
    """What a comparison says."""

    APART = "another storage"
    SAME = "the same storage, or a copy of it"
    EMPTY = "both are empty where it was looked at, and of one size"


async def likeness(new: Readable, new_size: int, disk: Readable) -> Likeness:
    """Whether something may be a disk's storage; ``new_size``: bytes, of all of it.

    Raises OSError; ETIMEDOUT where one of them does not answer.
    """
    async with _answering(f"{new.name} or {disk.name}", ANSWER_S):
        alike = await _alike_place(new, disk)
    if alike is None:
        return Likeness.APART
    if alike[1]:
        return Likeness.SAME
    return Likeness.EMPTY if abs(new_size - disk.size) < SIZE_APART else Likeness.APART


async def _told(marking: Coroutine[Any, Any, Result], name: str) -> Result:
    """What it finds out; it goes on, whatever becomes of who asks."""
    task = asyncio.ensure_future(marking)
    _run_on(task)
    async with _answering(name, ANSWER_S):
        return await asyncio.shield(task)


def _run_on(task: asyncio.Task[Any]) -> None:
    _late.add(task)
    task.add_done_callback(_late.discard)
    task.add_done_callback(_retrieve)


@asynccontextmanager
async def _answering(name: str, seconds: float | None = None) -> AsyncIterator[None]:
    """Raises OSError(ETIMEDOUT) after MARK_S, or so many seconds."""
    try:
        async with asyncio.timeout(MARK_S if seconds is None else seconds):
            yield
    except TimeoutError as error:
        if error.errno is not None:
            raise  # somebody said so
        raise OSError(
            errno.ETIMEDOUT, "it, or what it is compared with, does not answer", name
        ) from None


async def _alike_place(new: Readable, used: Readable) -> tuple[int, bool] | None:
    """The offset of a place in which both are alike, and whether there is data in any such place;
    None: they are not the same storage."""
    blocks = min(new.size, used.size) // LOOK
    if not blocks:
        return None
    alike = []
    for count in range(PLACES):
        offset = await _place(used, blocks)
        found = await _alike(new, used, offset)
        if found is not None:
            alike.append((offset, any(found)))
        elif count + 1 - len(alike) == 2:  # one may be a place that a guest never stops writing to
            return None
    return alike[-1][0], any(is_data for _, is_data in alike)


async def _place(used: Readable, blocks: int) -> int:
    """The offset of a place in which ``used`` has data, or just of any."""
    first = int.from_bytes(os.urandom(8), "big") % blocks * LOOK
    end = blocks * LOOK
    position, left, window = first, min(end, SEARCHED), WINDOW
    while left > 0:
        stop = min(position + window, end)
        for length, flags in await used.extents(position, stop - position):
            start = -(-position // LOOK) * LOOK
            if not flags & EXTENT_ZERO and start + LOOK <= min(position + length, end):
                return start
            position += length
            left -= length
        if position >= end:
            position = 0
        window = min(2 * window, WINDOW_MAX)
    return first


async def _alike(one: Readable, other: Readable, offset: int) -> Buffer | None:
    """What both have there; None: they differ."""
    for _ in range(2):  # somebody may have written in between
        found = await one.pread(offset, LOOK)
        if found == await other.pread(offset, LOOK):
            return found
    return None


async def _put_back(device: Writable, place: int, before: Buffer) -> None:
    if any(before):
        await device.pwrite(place, before)
    else:
        await device.zero(place, LOOK)


def _retrieve(late: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more: what it failed with is known then."""
    if not late.cancelled():
        late.exception()
