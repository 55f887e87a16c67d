"""Whether two devices are two ways into the same storage: names and addresses do not tell.

Many NBD servers ignore an export's name, or have several. A temp image in the place of another, or
of a disk, would make a backup of wrong data, or wipe the disk, and nobody would be told.

    1  compare a few places, where the one in use has data if that can be found; they differ: no
    2  write a mark, look for it, put back what was there

So a mark is written only where all that was compared is alike: where the one in use is empty, that
is, or the same. Where the mark is written, and what guarantees that it goes:

    temp images    the one in use, by its own connections, and nobody else uses it before what was
                   there is back. Where that fails, it is lost, as it would be with a connection.
    disks          the other: a guest's disk is not touched, unless it is the same. No guest of
                   any disk writes before what was there is back; where a disk is the same, it is
                   put there by the disk's own way. Who reads there meanwhile, guest or backup, may
                   read the mark: 4 KiB, for as long as two requests take, in place of zeroes, if
                   there were any among the places.

What is late is waited for, and put right then. Guests do not wait for that: where a disk is the
same, the server took longer than MARK_S over that one request, and a guest wrote to that very place
meanwhile, then the mark may have come over what it wrote, and what was there before comes back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeAlias, TypeVar

from fleecenbd.storage.device import EXTENT_ZERO, Buffer, Data, Extent

logger = logging.getLogger(__name__)

LOOK = 4096
"""Bytes that are looked at in one place."""
PLACES = 4
"""Places that are compared first."""
WINDOW = 64 << 20
"""Bytes in which data is looked for, from a random place on."""
MARK_S = 2.0
"""Seconds for one look, and for one mark: others may have to wait meanwhile."""
ANSWER_S = 8.0
"""Seconds for all that follows the comparison."""

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
AloneBut: TypeAlias = Callable[[bytes], AbstractAsyncContextManager[None]]
"""The same, but this may be written by anybody: the mark may come by way of a guest's export."""


async def is_temp(new: Readable, temp: Writable, alone: Alone, lose: Callable[[str], None]) -> bool:
    """Whether what is written to a temp image in use is seen in ``new``.

    ``alone``: nobody else uses the temp image. ``lose`` is told why what it holds cannot be
    trusted any more. Raises OSError; ETIMEDOUT where one of them does not answer.
    """
    place = await _alike_place(new, temp)
    if place is None:
        return False
    return await _told(_mark_temp(new, temp, place, alone, lose), temp.name)


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


async def which_disk(new: Writable, disks: Sequence[Writable], alone: AloneBut) -> Writable | None:
    """The one of these disks in which what is written to ``new``, which nobody uses, is seen.

    ``alone``: nobody writes to any of them, nor uses ``new``. Raises OSError; ETIMEDOUT where one
    of all does not answer.
    """
    for disk in disks:
        place = await _alike_place(new, disk)
        if place is not None:
            # It may be another one that is the same, and is alike there, too.
            beside = [disk for disk in disks if disk.size >= place + LOOK]
            found = await _told(_mark_disks(new, place, beside, alone), new.name)
            if found is not None:
                return found
    return None


async def _mark_disks(
    new: Writable, place: int, disks: Sequence[Writable], alone: AloneBut
) -> Writable | None:
    mark = os.urandom(LOOK)
    async with alone(mark):
        async with _answering(new.name):
            before = await new.pread(place, LOOK)
        marking = asyncio.ensure_future(new.pwrite(place, mark))
        try:
            async with _answering(new.name):
                await asyncio.shield(marking)
            for disk in disks:
                async with _answering(disk.name):
                    is_same = await disk.pread(place, LOOK) == mark
                if is_same:
                    await _put_back(_writable(new, disk), place, before)
                    return disk
            async with _answering(new.name):
                await _put_back(new, place, before)
        except BaseException:
            undoing = _undo_late(new, place, disks, mark, before, marking, alone)
            _run_on(asyncio.create_task(undoing, name=f"mark in {new.name}"))
            raise
    return None


async def _undo_late(
    new: Writable,
    place: int,
    disks: Sequence[Writable],
    mark: bytes,
    before: Buffer,
    marking: asyncio.Future[None],
    alone: AloneBut,
) -> None:
    """Once the mark has its answer, or never will."""
    await asyncio.wait({marking})
    _retrieve(marking)
    try:
        async with alone(mark):
            for disk in disks:
                if await _has(disk, place, mark):
                    await _put_back(_writable(new, disk), place, before)
                    return
            async with _answering(new.name):
                if await new.pread(place, LOOK) == mark:
                    await _put_back(new, place, before)
    except OSError as error:
        logger.error(
            "%s: %d bytes at %d may hold a test mark in place of what was there: %s",
            error.filename or new.name,
            LOOK,
            place,
            error.strerror,
        )


def _writable(new: Writable, disk: Writable) -> Writable:
    """A way to storage that is that of both."""
    return new if getattr(disk, "read_only", False) else disk


async def _has(device: Readable, place: int, mark: bytes) -> bool:
    """Whether it tells that it has it."""
    try:
        async with _answering(device.name):
            return await device.pread(place, LOOK) == mark
    except OSError:
        return False


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
        text = (
            f"it, or what it is compared with, does not answer; {LOOK} bytes of it may hold a test "
            "mark in place of what was there"
        )
        raise OSError(errno.ETIMEDOUT, text, name) from None


async def _alike_place(new: Readable, used: Readable) -> int | None:
    """The offset of a place in which both are alike; None: they are not the same storage."""
    blocks = min(new.size, used.size) // LOOK
    if not blocks:
        return None
    place = None
    is_zero = False
    differing = 0
    for _ in range(PLACES):
        offset = await _place(used, blocks)
        found = await _alike(new, used, offset)
        if found is None:
            differing += 1  # one of them may be a place that a guest never stops writing to
            if differing == 2:
                return None
        elif not is_zero:
            place, is_zero = offset, not any(found)
    assert place is not None, "most places are alike"
    return place


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


async def _put_back(device: Writable, place: int, before: Buffer) -> None:
    if any(before):
        await device.pwrite(place, before)
    else:
        await device.zero(place, LOOK)


def _retrieve(late: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more: what it failed with is known then."""
    if not late.cancelled():
        late.exception()
