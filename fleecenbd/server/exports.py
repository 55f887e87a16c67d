"""What a connection is served from: the one place where protocol, engine and storage meet.

    GuestExport      a disk, read/write, as its guest sees it now
    FleecingExport   a disk as of a session's arming: READ, BLOCK_STATUS and TRIM

Both have the same calls, in pairs: ``*_now`` answers in the same step or says that it cannot;
its partner may wait. Requests are inside the export, and allowed there: RequestRules has looked.
Errors are OSError.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from copy import copy
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, TypeVar

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.nbd.catalog import ExportInfo
from fleecenbd.nbd.constants import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    PAYLOAD_ADVERTISED,
)
from fleecenbd.storage.device import Buffer, Data, Extent

BASE_ALLOCATION = "base:allocation"
ACCESS = "x-fleecenbd:access"
DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""and the bitmap's name: what changed since, for a session that reads no more than that."""

READ_ONCE = "+once"
"""What the name of an export ends with whose READs release. No other name has a plus sign."""
RELEASES_READS = ", what is read is released"
"""The end of such an export's description."""

BLOCK_PREFERRED = 64 << 10
"""Bytes."""


ReadNow: TypeAlias = Callable[[int, int], Buffer | None]
Read: TypeAlias = Callable[[int, int], Coroutine[Any, Any, Buffer]]


class Export(Protocol):
    """What a connection needs of an export."""

    is_guest: bool
    main: Export
    """Itself, or the export that it is another way into: whose clients these are."""
    info: ExportInfo
    read_now: ReadNow
    read: Read
    releases_reads: bool
    """Every READ is a READ_ONCE: what its reply held is released when that has left."""

    def release_read(self, offset: int, length: int) -> None:
        """The reply to this READ_ONCE was handed to the kernel, whole. A plain call, no error."""

    def write_now(self, offset: int, data: Data) -> bool:
        """Write in this step, or False."""

    async def write(self, offset: int, data: Data) -> None:
        """Write."""

    def trim_now(self, offset: int, length: int) -> bool:
        """Discard in this step, or False."""

    async def trim(self, offset: int, length: int) -> None:
        """Discard."""

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        """Zero the range."""

    def flush_now(self) -> bool:
        """Whether what was replied to is durable already."""

    async def flush(self) -> None:
        """Make durable what was replied to."""

    async def status(
        self, names: list[str], offset: int, length: int, *, one: bool
    ) -> list[list[Extent]]:
        """The extents of each meta context of ``names``, from ``offset`` on."""


class GuestExport:
    """A disk for its guest."""

    is_guest = True
    releases_reads = False

    def __init__(self, disk: Disk, *, read_only: bool, shared: int) -> None:
        self.main: Export = self
        self.disk = disk
        self.shared = shared
        flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE
        if read_only:
            flags |= NBD_FLAG_READ_ONLY
        else:
            flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
        if shared != 1:
            flags |= NBD_FLAG_CAN_MULTI_CONN
        self.info = ExportInfo(
            name=disk.name,
            description=f"guest disk {disk.name}",
            size=disk.size,
            flags=flags,
            block_minimum=1,
            block_preferred=BLOCK_PREFERRED,
            block_maximum=PAYLOAD_ADVERTISED,
            contexts=(BASE_ALLOCATION,),
            can_write=not read_only,
        )
        self.read_now: ReadNow = disk.read_now
        self.read: Read = disk.read
        self.write_now = disk.write_now
        self.write = disk.write

    def release_read(self, offset: int, length: int) -> None:
        """Never called: RequestRules lets no READ_ONCE through."""

    def trim_now(self, offset: int, length: int) -> bool:
        """Never: fallocate can block."""
        return False

    async def trim(self, offset: int, length: int) -> None:
        """A hint; what would have to be copied first stays."""
        await self.disk.trim(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        """Zero the range; ENOTSUP when ``fast`` and it would not be."""
        await self.disk.write_zeroes(offset, length, may_trim=may_trim, fast=fast)

    def flush_now(self) -> bool:
        """Whether nothing was written since the last one."""
        return self.disk.flush_now()

    async def flush(self) -> None:
        """fdatasync."""
        await self.disk.flush()

    async def status(
        self, names: list[str], offset: int, length: int, *, one: bool
    ) -> list[list[Extent]]:
        """base:allocation of the active image."""
        extents = await self.disk.status(offset, length, one=one)
        return [extents for _ in names]


class FleecingExport:
    """A disk as of its session's arming. A TRIM releases; a WRITE is refused.

    ``releases_reads``: so does every READ, once its reply has left (docs/semantics.md, section 6).
    """

    is_guest = False

    def __init__(self, fleece: Fleece, *, description: str, releases_reads: bool = False) -> None:
        self.main: Export = self
        self.fleece = fleece
        self.releases_reads = releases_reads
        contexts = [BASE_ALLOCATION, ACCESS]
        self._dirty: str | None = None
        if fleece.own is not None and fleece.own.dirty_only:
            # One of this kind: some clients take none when they see several.
            self._dirty = f"{DIRTY_BITMAP}{fleece.own.name}"
            contexts.insert(1, self._dirty)
        # Never READ_ONLY: clients refuse to TRIM a read-only export.
        self.info = ExportInfo(
            name=fleece.name,
            description=description,
            size=fleece.size,
            flags=(
                NBD_FLAG_HAS_FLAGS
                | NBD_FLAG_SEND_FLUSH
                | NBD_FLAG_SEND_TRIM
                | NBD_FLAG_CAN_MULTI_CONN
            ),
            block_minimum=1,
            block_preferred=max(BLOCK_PREFERRED, fleece.cluster_size),
            block_maximum=PAYLOAD_ADVERTISED,
            contexts=tuple(contexts),
            read_once_context=ACCESS,
            can_write=False,
        )
        self.read_now: ReadNow = fleece.read_now
        self.read: Read = fleece.read
        self.trim_now: Callable[[int, int], bool] = fleece.trim_now
        self.trim = fleece.trim
        self.release_read = fleece.release_read
        self._used: Callable[[], None] | None = None

    def reading_once(self) -> FleecingExport:
        """Another way into the same: its READs release."""
        export = copy(self)
        export.releases_reads = True
        export.info = replace(
            self.info,
            name=f"{self.info.name}{READ_ONCE}",
            description=self.info.description.removesuffix(RELEASES_READS) + RELEASES_READS,
        )
        return export

    def tell_use(self, used: Callable[[], None]) -> None:
        """Call ``used`` with each request from now on; before the first client comes only.

        Costs the requests of this export a call, and nobody else's.
        """
        self._used = used
        self.read_now = _telling(used, self.read_now)
        self.trim_now = _telling(used, self.trim_now)

    def write_now(self, offset: int, data: Data) -> bool:
        """Refused: EPERM. RequestRules answers before."""
        raise OSError(errno.EPERM, f"{self.info.name} cannot be written")

    async def write(self, offset: int, data: Data) -> None:
        """Refused: EPERM."""
        self.write_now(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        """Refused; not advertised, so RequestRules answers before."""
        self.write_now(offset, b"")

    def flush_now(self) -> bool:
        """Always: nothing to make durable."""
        return True

    async def flush(self) -> None:
        """Nothing to make durable."""

    async def status(
        self, names: list[str], offset: int, length: int, *, one: bool
    ) -> list[list[Extent]]:
        """What was allocated at arming, what had changed until then, and what may still be read,
        as of this call's end."""
        if self._used is not None:
            self._used()
        extents: dict[str, list[Extent]] = {}
        if BASE_ALLOCATION in names:
            extents[BASE_ALLOCATION] = await self.fleece.status(offset, length, one=one)
        # Taken in the last step before the reply.
        if self._dirty is not None and self._dirty in names:
            extents[self._dirty] = self.fleece.dirty_status(offset, length, one=one)
        if ACCESS in names:
            extents[ACCESS] = self.fleece.access_status(offset, length, one=one)
        return [extents[name] for name in names]


Answer = TypeVar("Answer")


def _telling(
    used: Callable[[], None], call: Callable[[int, int], Answer]
) -> Callable[[int, int], Answer]:
    def telling(offset: int, length: int) -> Answer:
        used()
        return call(offset, length)

    return telling
