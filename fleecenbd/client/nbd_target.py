"""A target behind NBD: any server's export that can be written and flushed.

What was written on a connection that was lost may be gone, whatever the server had answered, as
long as no flush has covered it: the next ``flush`` raises TargetLost then, once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from fleecenbd.client.endpoints import TargetLost
from fleecenbd.client.file_target import LOOK_LENGTH, holds_something, too_small
from fleecenbd.client.plan import ACCESS
from fleecenbd.storage.apart import Apart
from fleecenbd.storage.device import Buffer, Data
from fleecenbd.storage.nbd_client import NbdClient

CLUSTER_MAX = 2 << 20
"""Bytes: the largest cluster of a qcow2 image; an NBD server does not tell what its image has."""
CONNECTIONS_MAX = 4
REQUESTS_PER_CONNECTION = 8
"""Writes in flight."""


class NbdTarget:
    """endpoints.Target over an NbdClient, which it closes."""

    def __init__(
        self, name: str, client: NbdClient, *, is_zero: bool = False, cluster: int = CLUSTER_MAX
    ) -> None:
        """``cluster``: bytes; no smaller than that of the image behind it, if that has any."""
        self.name = name
        self.is_zero = is_zero
        self.requests = REQUESTS_PER_CONNECTION * client.connections
        self.write_unit = client.facts.block_size_min
        self._client = client
        self._generation = client.generation
        self._apart = Apart(cluster)

    async def pwrite(self, offset: int, data: Data) -> None:
        """WRITE."""
        async with self._apart.request(offset, len(data), is_alone=False):
            await self._client.pwrite(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """WRITE_ZEROES, which may free space."""
        async with self._apart.request(offset, length, is_alone=True):
            await self._client.zero(offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        """READ; what the server reads it from is its own business."""
        return await self._client.pread(offset, length)

    async def flush(self) -> None:
        """FLUSH. Raises TargetLost where a connection was lost since the last one."""
        await self._client.flush()
        if self._client.generation != self._generation:
            self._generation = self._client.generation
            raise TargetLost(errno.EIO, "its connection was lost", self.name)

    async def complete(self) -> None:
        """Everything is durable: hang up."""
        await self.keep()

    async def keep(self) -> None:
        """Hang up."""
        self._client.close()
        await self._client.wait_closed()

    async def discard(self) -> None:
        """Hang up; what was written there cannot be taken back."""
        await self.keep()


async def open_nbd(
    uri: str,
    size: int,
    *,
    force: bool,
    resume: bool,
    connections: int | None,
    retries: int,
    tell: Callable[[str], None],
) -> NbdTarget:
    """Connect to an export that can be a target. Raises OSError."""
    client = await NbdClient.open(
        uri,
        contexts=[ACCESS],
        connections=connections or CONNECTIONS_MAX,
        retries=retries,
        tell=tell,
        explains=True,
    )
    try:
        await _check(client, size, force=force or resume)
        return NbdTarget(uri, client)
    except BaseException:
        client.close()
        await client.wait_closed()
        raise


async def _check(client: NbdClient, size: int, *, force: bool) -> None:
    facts = client.facts
    if ACCESS in facts.contexts:
        raise OSError(
            errno.EINVAL, "is a point in time, which cannot be written; name another", client.name
        )
    if facts.is_read_only:
        raise OSError(errno.EROFS, "is read-only; name another target", client.name)
    if not facts.can_flush:
        raise OSError(
            errno.EINVAL,
            "its server offers no FLUSH, so nothing there could ever be called durable; name "
            "another target",
            client.name,
        )
    if facts.size < size:
        raise too_small(client.name, facts.size, size)
    if not force:
        length = min(LOOK_LENGTH, facts.size)
        for at in (0, facts.size - length):
            if any(await client.pread(at, length)):
                raise holds_something(client.name)
