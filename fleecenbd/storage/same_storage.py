"""Whether two devices are two ways into the same storage: names and addresses do not tell.

Many NBD servers ignore an export's name, or have several. A temp image in the place of another, or
of a disk, would make a backup of wrong data, or wipe the disk, and nobody would be told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from fleecenbd.storage.device import Buffer, Data

LOOK = 4096
"""Bytes that are looked at in one place."""
PLACES = 4
"""Places that are compared first."""


class Readable(Protocol):
    """What can be looked at."""

    @property
    def size(self) -> int:
        """Bytes."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """As Device has it."""


class Writable(Readable, Protocol):
    """What can be changed, too."""

    async def pwrite(self, offset: int, data: Data) -> None:
        """As Device has it."""

    async def zero(self, offset: int, length: int) -> None:
        """As Device has it."""


Alone: TypeAlias = Callable[[int, int], AbstractAsyncContextManager[None]]
"""(offset, length) to a context in which nobody else writes there."""


async def is_same_storage(one: Writable, other: Readable, alone: Alone) -> bool:
    """Whether what is written to ``one`` is seen in ``other``. Raises OSError.

    Only where some places are alike a mark is written to one of them, and what was there is put
    back; ``alone``: nobody else writes to ``other`` meanwhile.
    """
    blocks = min(one.size, other.size) // LOOK
    if not blocks:
        return False
    for _ in range(PLACES):
        offset = int.from_bytes(os.urandom(8), "big") % blocks * LOOK
        if await one.pread(offset, LOOK) != await other.pread(offset, LOOK):
            return False
    mark = os.urandom(LOOK)
    async with alone(offset, LOOK):
        before = await one.pread(offset, LOOK)
        try:
            await one.pwrite(offset, mark)
            return await other.pread(offset, LOOK) == mark
        finally:
            if any(before):
                await one.pwrite(offset, before)
            else:
                await one.zero(offset, LOOK)
