"""TempRemote: a temp image that another process keeps, and TempExport: one at any NBD server.

What is trimmed must read as zeroes, and be free. NBD's TRIM promises neither, so a trim is a
WRITE_ZEROES that may punch holes: where that frees nothing, the server cannot.

A connection that is lost is not made anew, and is the end of the others. Whoever answers then may
have lost what had been written and not flushed, or all of it, and a backup would be handed that;
and what the lost one was asked for may still be done, after what came later. Nobody can tell, so
the image is lost: its session breaks at once (``on_lost``), whatever its policy is.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from fleecenbd.storage.device import EXTENT_ZERO, Buffer, Data, Extent
from fleecenbd.storage.errors import closed_error
from fleecenbd.storage.losing import Losing
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.nbd_errors import NbdLost
from fleecenbd.storage.remote import (
    ALLOCATION,
    CLOSE_S,
    CONNECTIONS_MAX,
    RemoteDevice,
    Result,
)

logger = logging.getLogger(__name__)

HOLE_SIZE_MIN = 4096
HOLE_SIZE_MAX = 2 << 20
ALONE_S = 2.0
"""Seconds that what is in flight has to end before a look at it: everybody waits meanwhile."""
WIPE_S = 60.0
"""Seconds that the end of a session leaves to freeing an export's space."""


class TempRemote(Losing, RemoteDevice):
    """A temp image at the other end of connections that are made once."""

    def __init__(self, client: NbdClient, name: str, *, size: int, **facts: Any) -> None:
        """``size``: bytes that are used of what is there."""
        super().__init__(client, name, **facts)
        self.size = size

    async def trim(self, offset: int, length: int) -> None:
        """Free the range's space; it then reads as zeroes. Raises OSError where that fails."""
        await self.zero(offset, length)

    def _failed(self, error: OSError) -> None:
        if isinstance(error, NbdLost):
            self.lose(error.strerror or str(error))

    def lose(self, why: str) -> None:
        """Nothing that it held can be trusted any more."""
        if not self._is_closed:
            self._lose(why)


class TempExport(TempRemote):
    """An export of an NBD server, with its offsets; empty at the start and at the end."""

    def __init__(self, client: NbdClient, name: str, *, size: int, hole_size: int) -> None:
        super().__init__(client, name, size=size, hole_size=hole_size)
        self.on_closed: Callable[[], None] | None = None
        """Called once the connections are closed."""
        self.is_ours = False
        """What it holds is ours to give back."""
        self._alone = asyncio.Lock()
        self._going_on: asyncio.Event | None = None
        """While nothing is asked, for ``alone``."""
        client.when_lost(lambda error: self.lose(error.strerror or str(error)))

    @property
    def whole_size(self) -> int:
        """Bytes of the export, of which ``size`` are used."""
        return self._client.size

    @property
    def is_unanswered(self) -> bool:
        """Whether its server may still do what it was asked to, once it is closed."""
        return self._client.left_changing

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Within it, nothing is asked but through ``besides``. One waits for the other. Raises
        OSError where what is being asked takes too long."""
        async with self._alone:
            if self._is_closed:
                raise closed_error(self.name)
            self._going_on = asyncio.Event()
            try:
                if self._calls and (await asyncio.wait(self._calls, timeout=ALONE_S))[1]:
                    raise OSError(errno.ETIMEDOUT, "it does not answer", self.name)
                yield
            finally:
                self._going_on.set()
                self._going_on = None

    @property
    def besides(self) -> Besides:
        """A way to it while nothing else is asked, and until the connections are closed."""
        return Besides(self)

    async def _run(self, call: Coroutine[Any, Any, Result]) -> Result:
        if self._going_on is not None:
            call = _after(self._going_on, call)
        return await super()._run(call)

    async def wipe(self) -> None:
        """Free all of its space. Raises OSError."""
        for offset, length in await self._held():
            await self._client.zero(offset, length)

    async def take(self, *, overwrite: bool) -> None:
        """Empty it, or make sure that it is: from now on it is ours. ``overwrite``: it may hold
        data, which goes. Raises OSError; EBUSY where it may hold data."""
        if overwrite:
            await self.wipe()
        else:
            await self.check_empty()
        self.is_ours = True

    async def check_empty(self) -> None:
        """Raises OSError(EBUSY) where it may hold data."""
        if await self._held():
            tells = ALLOCATION in self._client.facts.contexts
            raise OSError(
                errno.EBUSY,
                ("it holds data" if tells else "its server does not tell whether it holds data")
                + ", which a temp image would write over; if that can go, say so with "
                "--temp-overwrite",
                self.name,
            )

    async def _held(self) -> list[tuple[int, int]]:
        """(offset, length) of what may be no zeroes."""
        if ALLOCATION not in self._client.facts.contexts:
            return [(0, self.size)]
        held = []
        offset = 0
        for length, flags in await self._client.block_status(ALLOCATION, 0, self.size):
            if not flags & EXTENT_ZERO:
                held.append((offset, length))
            offset += length
        return held

    async def _hang_up(self) -> None:
        is_alone = False
        if self._client.is_connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    is_alone = await self._alone.acquire()  # what was there is put back
            if self._calls:
                await asyncio.wait(self._calls, timeout=CLOSE_S)
        try:
            if self.is_ours and self._client.is_connected and not self.is_lost:
                await self._wipe_at_end()
            await super()._hang_up()
        finally:
            if is_alone:
                self._alone.release()
        if self.on_closed is not None:
            self.on_closed()

    async def _wipe_at_end(self) -> None:
        try:
            async with asyncio.timeout(WIPE_S):
                await self.wipe()
        except (OSError, TimeoutError) as error:
            logger.warning(
                "%s: what the temp image held could not be freed: %s",
                self.name,
                getattr(error, "strerror", None) or f"it takes more than {WIPE_S:g} s",
            )


async def _after(event: asyncio.Event, call: Coroutine[Any, Any, Result]) -> Result:
    try:
        await event.wait()
    except BaseException:
        call.close()
        raise
    return await call


class Besides:
    """same_storage.Writable."""

    def __init__(self, export: TempExport) -> None:
        self.name = export.name
        self.size = export.size
        self._export = export

    async def pread(self, offset: int, length: int) -> Buffer:
        """As Device has it."""
        return await self._export._client.pread(offset, length)

    async def pwrite(self, offset: int, data: Data) -> None:
        """As Device has it."""
        await self._export._write(offset, memoryview(data))

    async def zero(self, offset: int, length: int) -> None:
        """As Device has it."""
        await self._export._zero(offset, length, may_trim=True, fast=False)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As Device has it."""
        client = self._export._client
        if ALLOCATION not in client.facts.contexts:
            return [(length, 0)]
        return await client.block_status(ALLOCATION, offset, length)


async def open_temp_export(uri: str, size: int, *, cluster_size: int) -> TempExport:
    """Connect to an export that is to hold a temp image of ``size`` bytes; ``take`` comes next.

    ``cluster_size``: as ``TempImage.create`` has it. Raises OSError: ENOSPC where it is too small.
    """
    client = await NbdClient.open(
        uri, contexts=(ALLOCATION,), connections=CONNECTIONS_MAX, retries=0, lasts=False
    )
    try:
        facts = client.facts
        preferred = min(facts.block_size_preferred, HOLE_SIZE_MAX)
        # Servers count what they free in these, as far as one can know; a power of two.
        hole_size = max(HOLE_SIZE_MIN, facts.block_size_min, 1 << preferred.bit_length() >> 1)
        unit = max(cluster_size, hole_size)
        needed = -(-size // unit) * unit
        if facts.is_read_only:
            raise OSError(errno.EROFS, "it can only be read", uri)
        if not facts.can_zero:
            raise OSError(
                errno.EINVAL, "its server offers no WRITE_ZEROES, so that no space is freed", uri
            )
        if client.size < needed:
            raise OSError(
                errno.ENOSPC,
                f"it has {client.size} bytes, and a temp image of this disk needs {needed}",
                uri,
            )
        return TempExport(client, uri, size=needed, hole_size=hole_size)
    except BaseException:
        client.close()
        await client.wait_closed()
        raise
