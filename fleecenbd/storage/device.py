"""The block device interface: one vocabulary for active images, temp images and simulated disks.

Names are nbdkit's (pread, pwrite, flush, trim, zero, extents), arguments are always
``(offset, length)`` in bytes, errors are ``OSError`` with an errno.

Now, or later
    ``pread_now``, ``pread_into_now`` and ``pwrite_now`` do the call at once where that cannot
    block, and say so by their answer (None, False) where it could. They are an optimisation
    only: a device that always answers None and False is correct, and slow.

Rules that every device keeps (tests/storage/test_contract.py)
    * A read returns exactly ``length`` bytes, owned by the caller: ``bytes`` or ``bytearray``.
    * ``data`` handed to a write belongs to the device until the call has ended.
    * Calls may run at the same time and end in any order. Calls that overlap are the caller's
      business.
    * Cancelling an await does not stop the call: it goes on, and ``close`` waits for it.
    * A failed write may leave anything in its range, and nothing outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray
"""What a read returns."""

Data: TypeAlias = bytes | bytearray | memoryview
"""What a write takes."""

EXTENT_HOLE = 1
"""The range holds no space (NBD_STATE_HOLE)."""
EXTENT_ZERO = 2
"""The range reads as zeroes (NBD_STATE_ZERO)."""

Extent: TypeAlias = tuple[int, int]
"""(length in bytes, EXTENT_* flags)."""


class Device(Protocol):
    """A block device of constant size."""

    @property
    def name(self) -> str:
        """What to call the device in a message: a path or a URI."""

    @property
    def size(self) -> int:
        """Bytes; constant while the device is open."""

    @property
    def hole_size(self) -> int:
        """Bytes; a power of two. A ``trim`` of an aligned range of this size frees its space."""

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        """Read now, or return None where that could block. Raises OSError."""

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` now, or return False (it may hold anything then). Raises OSError."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read ``length`` bytes at ``offset``."""

    def pwrite_now(self, offset: int, data: Data) -> bool:
        """Write all of ``data`` now, or return False (nothing written) where that could block."""

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data`` at ``offset``."""

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes.

        ``may_trim``: its space may be freed. ``fast``: raise ENOTSUP, at once and with nothing
        changed, where it would not be faster than writing zeroes.
        """

    async def trim(self, offset: int, length: int) -> None:
        """Free the range's space where the device can; it then reads as zeroes.

        Where the device cannot, nothing happens, and it is no error; a block device that
        discards without promising zeroes leaves them or what was there. (A temp image's device
        raises instead: its users count on the space, and on zeroes.)
        """

    def flush_now(self) -> bool:
        """Whether everything whose write has ended is durable already: there is nothing to do."""

    async def flush(self) -> None:
        """Return when everything whose write has ended is durable."""

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """What the range holds, in order, without a gap; lengths sum up to ``length``."""

    def close(self) -> None:
        """Take no more calls; close the file once the last call on it has ended."""

    async def wait_closed(self) -> None:
        """Return when the last call has ended and the file is closed."""


@runtime_checkable
class Cloning(Protocol):
    """What a temp image may have besides: ranges that share another device's blocks."""

    def clones(self, source: Device, offset: int, length: int) -> bool:
        """Whether a clone of the range is likely to be made, and to pay. Cannot block."""

    async def clone(self, source: Device, offset: int, length: int) -> bool:
        """As a write of what ``source`` holds in the range, which is whole blocks.

        False: refused, with nothing changed.
        """


@runtime_checkable
class Resizable(Protocol):
    """What an active image may have besides: a size that others can change."""

    async def present_size(self) -> int:
        """Bytes that it has now; ``Device.size`` is what it had when it was opened."""

    def limit(self, end: int | None) -> None:
        """From now on changes beyond ``end`` fail with EIO; None: none does. Cannot block."""


@runtime_checkable
class Roomy(Protocol):
    """What a temp image may have besides: a file system that others use, too."""

    async def room(self) -> tuple[int, int]:
        """(bytes free, bytes in all) of it; (0, 0) where it does not tell. Raises OSError."""


@runtime_checkable
class HoldingSpace(Protocol):
    """What a temp image may have besides: space that was taken in advance."""

    holds_space: bool
    """Each part holds space until it is trimmed, whether something was written there or not."""


@runtime_checkable
class TrimmingMany(Protocol):
    """What a temp image may have besides: many ranges freed by one call, not by one each."""

    async def trim_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        """``trim`` of each (offset, length), in order. Raises OSError at the first that fails."""


@runtime_checkable
class Losable(Protocol):
    """An image in the hands of another process, which can lose it."""

    on_lost: Callable[[str], None] | None
    """Called with the reason once nothing that it held can be trusted, or read, any more; at once
    where it is so when this is set."""

    async def wait_closed(self) -> None:
        """As Device has it."""


@runtime_checkable
class Reaching(Protocol):
    """An image at another server, which may be away."""

    @property
    def is_usable(self) -> bool:
        """Whether there is a connection now; while there is none, calls wait for it."""


class ReadNow(Protocol):
    """Device.pread_now, as an attribute."""

    def __call__(self, offset: int, length: int) -> Buffer | None: ...


class ReadIntoNow(Protocol):
    """Device.pread_into_now, as an attribute."""

    def __call__(self, offset: int, buffer: memoryview) -> bool: ...


class WriteNow(Protocol):
    """Device.pwrite_now, as an attribute."""

    def __call__(self, offset: int, data: Data) -> bool: ...
