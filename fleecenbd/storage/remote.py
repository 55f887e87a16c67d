"""RemoteDevice: an NBD export as a disk's active image, or as a temp image.

    engine ──▶ RemoteDevice ──▶ NbdClient ──▶ its connections ──▶ another server, or a QEMU of ours

What NBD does not promise, and a device does:
    * Any range can be written. Where the server has blocks, the rest of one that is written in
      part is read first, and nothing else is in flight there meanwhile.
    * Zeroes and writes that share a cluster are one after the other: QEMU's qcow2 mixes up what is
      in flight together (apart.py), and what an export is made of is not told.
    * A call that is cancelled goes on.

A connection that is lost is made anew, for ever, and requests wait for it: a disk that is away for
a while is better than one that fails. What was written and never flushed may be gone then, if the
server lost more than its connections; a log line says so, as no reply can.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Coroutine
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from fleecenbd.storage.apart import Apart
from fleecenbd.storage.device import Buffer, Data, Extent
from fleecenbd.storage.errors import closed_error, read_only_error
from fleecenbd.storage.nbd_client import NbdClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ALLOCATION = "base:allocation"
CLUSTER_MAX = 2 << 20
"""Bytes: the largest cluster of a qcow2 image; an NBD server does not tell what its image has."""
CONNECTIONS_MAX = 4
CLOSE_S = 10.0
"""Seconds that calls in flight have to end at the end: their server may have gone."""
TOLD_AT_ONCE = 5
"""Attempts to connect again that are logged one by one; then every TOLD_EVERY-th is."""
TOLD_EVERY = 10


_ITS_OWN = frozenset(
    {errno.EPERM, errno.EINVAL, errno.ENOMEM, errno.ENOSPC, errno.ENOTSUP, errno.EBADF}
)
"""Errors of a request that its sender is told as they are."""


class RemoteDevice:
    """storage.device.Device over an NbdClient, which it closes."""

    def __init__(
        self,
        client: NbdClient,
        name: str,
        *,
        cluster: int = CLUSTER_MAX,
        hole_size: int = 4096,
        read_only: bool = False,
    ) -> None:
        """``cluster``: bytes; no smaller than that of the image behind it, if that has any.
        ``hole_size``: as Device has it."""
        self.name = name
        self.size = client.size
        self.hole_size = hole_size
        self.read_only = read_only
        self._client = client
        self._mask = client.facts.block_size_min - 1
        self._apart = Apart(max(cluster, client.facts.block_size_min))
        self._calls: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._changes = 0
        """Begun and ended, counted: what a flush covers has ended before it begins."""
        self._durable = 0
        """What the count was when the last flush that went well began."""
        self._generation = client.generation
        """Connections that had been lost then."""
        self._closing: asyncio.Task[None] | None = None

    # -- its size ------------------------------------------------------------------------------

    async def present_size(self) -> int:
        """What the last connection that was tried led to; see ``limit``."""
        return self._client.size_offered

    def limit(self, end: int | None) -> None:
        """Nothing to do: what has another size may be another disk, and is asked for nothing."""

    # -- now: nothing is ----------------------------------------------------------------------

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        """None: it has to be asked for."""
        return None

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        """False."""
        return False

    def pwrite_now(self, offset: int, data: Data) -> bool:
        """False; raises EPERM where nothing may be written."""
        if self.read_only:
            raise read_only_error(self.name)
        return False

    def flush_now(self) -> bool:
        """Whether nothing was changed since the last flush."""
        return self._durable == self._changes and not self._is_closed

    # -- later --------------------------------------------------------------------------------

    async def pread(self, offset: int, length: int) -> Buffer:
        """READ."""
        return await self._run(self._client.pread(offset, length))

    async def pwrite(self, offset: int, data: Data) -> None:
        """WRITE; blocks that are covered in part are read first."""
        await self._change(self._write(offset, memoryview(data)))

    async def _write(self, offset: int, data: memoryview) -> None:
        length, mask = len(data), self._mask
        if not (offset | length) & mask:
            async with self._apart.request(offset, length, is_alone=False):
                await self._client.pwrite(offset, data)
            return
        start, end = offset & ~mask, (offset + length + mask) & ~mask
        async with self._apart.request(start, end - start, is_alone=True):
            whole = bytearray(await self._client.pread(start, end - start))
            whole[offset - start : offset - start + length] = data
            await self._client.pwrite(start, whole)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """WRITE_ZEROES."""
        await self._change(self._zero(offset, length, may_trim, fast))

    async def _zero(self, offset: int, length: int, may_trim: bool, fast: bool) -> None:
        start, end = self._whole_blocks(offset, length)
        if start >= end:
            await self._write(offset, memoryview(bytes(length)))
            return
        async with self._apart.request(start, end - start, is_alone=True):
            await self._client.zero(start, end - start, may_trim=may_trim, fast=fast)
        for at, stop in ((offset, start), (end, offset + length)):
            if at < stop:
                await self._write(at, memoryview(bytes(stop - at)))

    async def trim(self, offset: int, length: int) -> None:
        """TRIM, of what can be freed: whole pieces of ``hole_size``."""
        mask, end = self.hole_size - 1, offset + length
        start = (offset + mask) & ~mask
        stop = end if end == self.size else end & ~mask
        if start < stop:
            await self._change(self._trim(start, stop - start))
        elif self.read_only or self._is_closed:
            await self._change(self._client.trim(offset, 0))

    async def _trim(self, offset: int, length: int) -> None:
        async with self._apart.request(offset, length, is_alone=True):
            await self._client.trim(offset, length)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        end = offset + length
        return (offset + self._mask) & ~self._mask, end & ~self._mask

    async def flush(self) -> None:
        """FLUSH."""
        if self.read_only:
            return
        changes = self._changes
        await self._run(self._client.flush())
        if changes > self._durable and self._client.generation != self._generation:
            logger.warning(
                "%s: a connection was lost since it was flushed last: if its server lost more than "
                "that, what was written before is gone",
                self.name,
            )
        self._durable = max(self._durable, changes)
        self._generation = self._client.generation

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """BLOCK_STATUS of base:allocation; all data where the server has none."""
        if ALLOCATION not in self._client.facts.contexts:
            if self._is_closed:
                raise closed_error(self.name)
            return [(length, 0)]
        return await self._run(self._client.block_status(ALLOCATION, offset, length))

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    @property
    def is_usable(self) -> bool:
        """Whether a request would be asked now, and not wait for a connection, or fail."""
        return not self._is_closed and self._client.is_connected

    # -- calls, and the end -------------------------------------------------------------------

    async def _change(self, call: Coroutine[Any, Any, None]) -> None:
        if self.read_only:
            call.close()
            raise read_only_error(self.name)
        if self._is_closed:
            call.close()
            raise closed_error(self.name)
        self._changes += 1
        await self._run(self._counted(call))

    async def _counted(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            await call
        finally:
            self._changes += 1  # a flush may have begun meanwhile

    async def _run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """The call, which goes on if it is cancelled here."""
        if self._is_closed:
            call.close()
            raise closed_error(self.name)
        task = asyncio.get_running_loop().create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except OSError as error:
            self._failed(error)
            # What is wrong with a connection is no guest's fault. Nor must a guest export ever say
            # ESHUTDOWN: QEMU hands it on to the guest.
            number = error.errno if error.errno in _ITS_OWN else errno.EIO
            raise OSError(number, error.strerror, self.name) from error

    def _failed(self, error: OSError) -> None:
        """A call has, and somebody waited for it."""

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits, if anybody does

    def close(self) -> None:
        """Take no more calls; hang up once those in flight have ended."""
        if not self._is_closed:
            self._is_closed = True
            self._closing = asyncio.get_running_loop().create_task(
                self._hang_up(), name=f"close {self.name}"
            )

    async def _hang_up(self) -> None:
        if self._calls and self._client.is_connected:
            await asyncio.wait(self._calls, timeout=CLOSE_S)
        self._client.close()
        await self._client.wait_closed()

    async def wait_closed(self) -> None:
        """Return when the connections are closed."""
        assert self._closing is not None, "close() comes first"
        await asyncio.shield(self._closing)


class Telling:
    """What a client tells of its attempts to connect again, in the log: less and less, until it is
    connected."""

    def __init__(self) -> None:
        self._told = 0
        self._since = 0.0

    def start(self) -> None:
        """It is connected: what comes next is about another outage."""
        self._told = 0

    def connected(self, uri: str) -> None:
        """It is again."""
        if self._told:
            logger.info("%s: connected again, after %.1f s", uri, monotonic() - self._since)
        self.start()

    def __call__(self, text: str) -> None:
        """A line."""
        if not self._told:
            self._since = monotonic()
        self._told += 1
        if self._told <= TOLD_AT_ONCE or not self._told % TOLD_EVERY:
            logger.warning("%s", text)


async def open_remote(uri: str, *, read_only: bool = False) -> RemoteDevice:
    """Connect to an export that is to be a disk. Raises OSError."""
    telling = Telling()
    client = await NbdClient.open(
        uri, contexts=(ALLOCATION,), connections=CONNECTIONS_MAX, retries=None, tell=telling
    )
    telling.start()  # it may have told of fewer connections than were asked for
    client.when_connected(partial(telling.connected, uri))
    try:
        facts = client.facts
        if not facts.size:
            raise OSError(errno.EINVAL, "it has no bytes", uri)
        if facts.is_read_only and not read_only:
            raise OSError(errno.EROFS, "it can only be read; serve it with --read-only", uri)
        if not facts.can_flush and not read_only:
            raise OSError(
                errno.EINVAL,
                "its server offers no FLUSH, so that nothing a guest writes would ever be durable",
                uri,
            )
        return RemoteDevice(client, uri, read_only=read_only)
    except BaseException:
        client.close()
        await client.wait_closed()
        raise
