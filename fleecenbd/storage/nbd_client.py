"""A remote disk: an NBD export, read and written through libnbd on the running loop.

What is longer than the server takes in one request is asked for in pieces; what does not begin and
end at its blocks is read with the rest of them. Block status is asked for until all of the range
is covered, however little each reply covers.

What was written is durable when a ``flush`` that began after it has ended, *and* ``generation`` is
then what it was when the write began: with each connection that is lost the server may have lost
what was not flushed. Nothing in here looks at ``generation``.

A call that is cancelled has its reply awaited all the same, and its buffer stays alive until then.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeAlias

from fleecenbd.storage.device import Buffer, Data, Extent
from fleecenbd.storage.errors import slow_zero_error
from fleecenbd.storage.libnbd import nbd
from fleecenbd.storage.nbd_connection import Send
from fleecenbd.storage.nbd_connections import Accept, NbdConnections, Tell
from fleecenbd.storage.nbd_errors import NbdErrorReply
from fleecenbd.storage.nbd_handshake import NbdFacts

RETRIES = 5
"""Attempts in a row to connect again."""
NO_PAYLOAD_LENGTH_MAX = 1 << 30
"""Bytes that one request without payload (TRIM, WRITE_ZEROES, BLOCK_STATUS) covers."""
ZEROES = bytes(1 << 20)
"""What is written where a server has no WRITE_ZEROES."""

Piece: TypeAlias = Callable[[int, int], Coroutine[Any, Any, None]]


class NbdClient:
    """One export. Raises OSError: NbdErrorReply is the server's answer to a request, NbdLost and
    what ``accept`` raised are the end of everything."""

    def __init__(self, uri: str, connections: NbdConnections, *, explains: bool) -> None:
        """Use ``open``."""
        self.name = uri
        self._connections = connections
        self._explains = explains
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        uri: str,
        *,
        contexts: Sequence[str] = (),
        connections: int = 1,
        retries: int | None = RETRIES,
        tell: Tell = lambda text: None,
        accept: Accept = lambda facts: None,
        explains: bool = False,
        lasts: bool = True,
    ) -> NbdClient:
        """Connect to an NBD URI, by as many connections as are asked for and the server allows.

        ``contexts``: meta contexts to ask for. ``retries``: attempts in a row to connect again,
        once a connection is lost, None: without end; ``tell`` gets a line for the user at each.
        ``accept`` looks at what a connection leads to, each time one is made, and raises OSError
        if it is the wrong thing. ``explains``: what fails is asked for once more, for the server's
        own text. ``lasts`` False: the first connection that is lost is the end of all.

        Raises OSError, and NbdRefused if somebody answers who will not serve the export as asked.
        """
        made = NbdConnections(uri, contexts, retries=retries, tell=tell, accept=accept, lasts=lasts)
        try:
            await made.open(connections)
        except BaseException:
            await made.hang_up()
            raise
        return cls(uri, made, explains=explains)

    @property
    def facts(self) -> NbdFacts:
        """What was agreed on with the server."""
        return self._connections.facts

    @property
    def size(self) -> int:
        """Bytes."""
        return self.facts.size

    @property
    def size_offered(self) -> int:
        """Bytes of what answered last; other than ``size``, it is asked for nothing."""
        return self._connections.size_offered

    @property
    def connections(self) -> int:
        """How many there are, or are being made anew."""
        return self._connections.wanted

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connections.is_open

    def when_connected(self, tell: Callable[[], None]) -> None:
        """``tell`` is called each time that what was lost is there again."""
        self._connections.on_connected = tell

    @property
    def left_changing(self) -> bool:
        """Whether the server may still change the export as it was asked to, once all has ended."""
        return self._connections.left_changing

    def when_lost(self, tell: Callable[[OSError], None]) -> None:
        """``tell`` is called once no call succeeds any more, but for ``close``; perhaps at once."""
        self._connections.when_failed(tell)

    @property
    def generation(self) -> int:
        """Connections lost so far (see the top of this file)."""
        return self._connections.generation

    # -- data ----------------------------------------------------------------------------------

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read ``length`` bytes: a bytearray of the caller's own."""
        facts = self.facts
        if not length:
            return bytearray()
        if length > facts.payload_max or (offset | length) & (facts.block_size_min - 1):
            return await self._pread_pieces(offset, length)
        # A bytearray whose memory was not cleared: a fifth of a pull's CPU time. It is taken out of
        # its nbd.Buffer, because libnbd (1.14, 1.22) never lets go of what it is handed in one.
        buffer: bytearray = nbd.Buffer(length)._o
        await self._ask(lambda handle: handle.aio_pread(buffer, offset), length)
        return buffer

    async def _pread_pieces(self, offset: int, length: int) -> Buffer:
        start, stop = self._widened(offset, length)
        data = bytearray(stop - start)
        view = memoryview(data)

        async def read(at: int, count: int) -> None:
            piece = view[at - start : at - start + count]
            await self._ask(lambda handle: handle.aio_pread(piece, at), count)

        await self._in_pieces(read, start, stop - start, self.facts.payload_max)
        return data if len(data) == length else data[offset - start : offset - start + length]

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data``, which must not change before the call has ended."""
        view = memoryview(data)

        async def write(at: int, count: int) -> None:
            piece = view[at - offset : at - offset + count]
            await self._write(lambda handle: handle.aio_pwrite(piece, at), count)

        await self._in_pieces(write, offset, len(view), self.facts.payload_max)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes; see ``storage.device``."""
        facts = self.facts
        if not facts.can_zero or (fast and not facts.can_fast_zero):
            if fast:
                raise slow_zero_error(self.name)
            step = min(len(ZEROES), facts.payload_max)
            await self._in_pieces(self._write_zeroes, offset, length, step)
            return
        flags = (0 if may_trim else nbd.CMD_FLAG_NO_HOLE) | (nbd.CMD_FLAG_FAST_ZERO if fast else 0)

        async def zero(at: int, count: int) -> None:
            await self._write(lambda handle: handle.aio_zero(count, at, None, flags), 0)

        await self._in_pieces(zero, offset, length, NO_PAYLOAD_LENGTH_MAX)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        piece = memoryview(ZEROES)[:length]
        await self._write(lambda handle: handle.aio_pwrite(piece, offset), length)

    async def trim(self, offset: int, length: int) -> None:
        """Discard what the range has of whole blocks, where the server can. It may read as
        anything then."""
        facts = self.facts
        mask = facts.block_size_min - 1
        start, stop = (offset + mask) & ~mask, offset + length
        if stop != facts.size:
            stop &= ~mask
        if not facts.can_trim or start >= stop:
            return

        async def trim(at: int, count: int) -> None:
            await self._ask(lambda handle: handle.aio_trim(count, at), 0)

        await self._in_pieces(trim, start, stop - start, NO_PAYLOAD_LENGTH_MAX)

    async def flush(self) -> None:
        """Return when the server says that everything whose write has ended is durable."""
        if self.facts.can_flush:
            await self._write(lambda handle: handle.aio_flush(), 0)

    # -- block status --------------------------------------------------------------------------

    async def block_status(self, context: str, offset: int, length: int) -> list[Extent]:
        """What a meta context says of the range: lengths sum up to ``length``."""
        found: list[Extent] = []
        start, stop = self._widened(offset, length)
        at = start
        while at < stop:
            count = min(NO_PAYLOAD_LENGTH_MAX, stop - at)
            for extent_length, flags in await self._status_reply(context, at, count):
                extent_length = min(extent_length, stop - at)
                cut = min(extent_length, max(0, offset - at))
                kept = min(at + extent_length, offset + length) - at - cut
                at += extent_length
                if kept <= 0:
                    continue
                if found and found[-1][1] == flags:
                    found[-1] = (found[-1][0] + kept, flags)
                else:
                    found.append((kept, flags))
        return found

    async def _status_reply(self, context: str, offset: int, length: int) -> list[Extent]:
        """What one reply says; it may cover less, or more. Raises OSError if it says nothing."""
        reply: list[int] = []

        def send(handle: Any) -> int:
            entries: list[int] = []

            def extent(name: str, _offset: int, values: list[int], _error: Any) -> int:
                if name == context:
                    entries.extend(values)
                return 0

            nonlocal reply
            reply = entries
            cookie: int = handle.aio_block_status(length, offset, extent)
            return cookie

        await self._ask(send, 0)
        if not any(reply[::2]):
            raise OSError(
                errno.EIO, f"the server's reply says nothing of {context} at {offset}", self.name
            )
        return list(zip(reply[::2], reply[1::2], strict=True))

    # -- requests ------------------------------------------------------------------------------

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        """Start and stop, at the server's blocks."""
        mask = self.facts.block_size_min - 1
        return offset & ~mask, min(
            (offset + length + mask) & ~mask, max(self.size, offset + length)
        )

    async def _in_pieces(self, call: Piece, offset: int, length: int, step: int) -> None:
        if length <= step:
            if length:
                await call(offset, length)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for at, count in _pieces(offset, length, step):
                    group.create_task(call(at, count))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _ask(self, send: Send, length: int) -> None:
        try:
            await self._connections.call(send, length)
        except NbdErrorReply as error:
            if not self._explains:
                raise
            await self._connections.ask_again(send, length, error)

    async def _write(self, send: Send, length: int) -> None:
        try:
            await self._connections.call(send, length, changes=True)
        except NbdErrorReply as error:
            # On another connection only where a flush of these covers it.
            if not (self._explains and self.facts.can_multi_conn):
                raise
            await self._connections.ask_again(send, length, error)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; hang up once what is being written has ended."""
        self._connections.close()
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._connections.hang_up(), name=f"close {self.name}"
            )

    async def wait_closed(self) -> None:
        """Return when all connections are closed."""
        assert self._closing is not None, "close() comes first"
        await asyncio.shield(self._closing)


def _pieces(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of parts that end at multiples of ``step``."""
    end = offset + length
    while offset < end:
        count = min(step - offset % step, end - offset)
        yield offset, count
        offset += count
