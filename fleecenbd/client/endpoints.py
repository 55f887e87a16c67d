"""What a pull reads from and writes to: two small interfaces, many kinds.

Calls take ``(offset, length)`` in bytes and raise OSError with an errno. They may run at the same
time, and end in any order; calls that overlap are the caller's business. Extents are
``(length, flags)``, in order, without a gap, as those of ``storage.device``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from fleecenbd.client.options import Backing
from fleecenbd.storage.device import Buffer, Data, Extent


class SourceLost(OSError):
    """The source is gone for good, or is another one now: what is copied so far stays."""


class TargetLost(OSError):
    """Writes that no ``flush`` has covered may be gone: they have to be made again.

    An NBD target whose connection was made anew raises it from the next ``flush``, once.
    """


class Source(Protocol):
    """An export that is read, and that may be told what need not be kept."""

    @property
    def name(self) -> str:
        """What to call it in a message: its URI."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def cluster(self) -> int:
        """Bytes, a power of two: a TRIM aligned to it frees (the preferred block size)."""

    @property
    def can_trim(self) -> bool:
        """Whether a TRIM releases: a fleecing export that offers it. False for anything else: on
        a guest's own disk a TRIM would discard the disk's data."""

    @property
    def session_id(self) -> str | None:
        """The session's id (UUID), where it is a fleecing export of ours."""

    @property
    def contexts(self) -> frozenset[str]:
        """Meta contexts that were agreed on."""

    @property
    def requests(self) -> int:
        """How many requests should be in flight at most, over all connections."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes, the caller's own."""

    async def trim(self, offset: int, length: int) -> None:
        """Release the range."""

    async def extents(self, context: str, offset: int, length: int) -> list[Extent]:
        """What a meta context says of the range, all of it: lengths sum up to ``length``."""

    async def close(self) -> None:
        """Say goodbye; returns when the connections are closed."""


class Target(Protocol):
    """Where the data goes. Not called done before ``complete`` has returned."""

    @property
    def name(self) -> str:
        """What to call it in a message: the path or URI that the user gave."""

    @property
    def is_zero(self) -> bool:
        """Whether all that was not written reads as zeroes already, and is durable so."""

    @property
    def requests(self) -> int:
        """How many writes should be in flight at most."""

    @property
    def write_unit(self) -> int:
        """Bytes, a power of two, at most 64 KiB: writes begin and end at multiples of it, or at
        the disk's end, and none of a unit's bytes is written twice. 1: there is no such rule."""

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data``."""

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, without space where that can be."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read back, for ``--verify``: from the device rather than from a cache, if it can."""

    async def flush(self) -> None:
        """Return when everything whose write has ended is durable. Raises TargetLost."""

    async def complete(self) -> None:
        """All is there, and durable: give the target its final name, durably, and close it."""

    async def keep(self) -> None:
        """Close; what is there stays for ``--resume``."""

    async def discard(self) -> None:
        """Close, and remove what this pull has made."""


class OpenSource(Protocol):
    """As ``source.open_source``."""

    async def __call__(
        self,
        uri: str,
        *,
        contexts: tuple[str, ...],
        connections: int | None,
        requests: int | None,
        retries: int,
        tell: Callable[[str], None],
    ) -> Source:
        """Raises OSError."""


class OpenTarget(Protocol):
    """As ``targets.open_target``."""

    async def __call__(
        self,
        text: str,
        size: int,
        *,
        force: bool,
        resume: bool,
        compress: bool,
        backing: Backing | None,
        connections: int | None,
        retries: int,
        tell: Callable[[str], None],
    ) -> Target:
        """Raises OSError."""


def check_session(source: Source, session_id: str) -> None:
    """A name is another session's once its own is over. Raises SourceLost."""
    if source.session_id != session_id:
        raise SourceLost(
            errno.ESTALE,
            f"session {source.session_id or 'none'} answers there, and not {session_id}: that one "
            "is over, or another server has taken its server's place",
            source.name,
        )
