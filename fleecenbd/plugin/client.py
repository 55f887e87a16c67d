"""One client of nbdkit: its place at an export, and its requests.

    nbdkit's thread: request() ──call_soon_threadsafe──▶ loop: _serve ──▶ the export
                        waits  ◀──────── a future ─────────────┘ now, or later, in a task

nbdkit's threads are many, the engine's is one. A request takes two hops, and its thread waits.

The memory that nbdkit lends for a WRITE is its own again when the callback returns: so a WRITE is
waited for to its end, whatever happens. What a READ has read is copied by nbdkit's thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from concurrent.futures import Future
from typing import Any

from fleecenbd.nbd.catalog import ExportInfo
from fleecenbd.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_REP_ERR_POLICY,
)
from fleecenbd.nbd.errors import NegotiationError
from fleecenbd.nbd.transmission import Request
from fleecenbd.nbd.validation import RequestRules
from fleecenbd.server.clients import Clients
from fleecenbd.server.exports import BASE_ALLOCATION, Export, GuestExport
from fleecenbd.server.requests import change, error_number
from fleecenbd.storage.device import Extent

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 5.0
"""Seconds that a client waits for a place at a guest export: nbdkit tells only after the last
request of a client has ended that it has gone, and a guest that comes back comes at once."""


class RequestFailed(Exception):
    """A request is answered with the NBD error ``number``, which is Linux's too."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class PluginClient:
    """A client (server.clients.Client). ``open``, ``request`` and ``leave`` are called by
    nbdkit's threads, all else by the loop's."""

    backup_only = False
    handshaking = False

    def __init__(
        self, clients: Clients, loop: asyncio.AbstractEventLoop, *, pid: int | None
    ) -> None:
        self.pid = pid
        self.peer = f"pid {pid}" if pid is not None else "another client"
        self.export: Export | None = None
        self._clients = clients
        self._loop = loop
        self._check = RequestRules(flags=0, size=0, extended=False, structured=True, contexts=False)
        self._in_flight: dict[Future[Any], Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = loop.create_future()

    # -- nbdkit's threads ------------------------------------------------------------------

    @property
    def info(self) -> ExportInfo:
        """What its export is."""
        assert self.export is not None, "nbdkit asks after open"
        return self.export.info

    def open(self, name: str) -> None:
        """Take a place at the export. Raises NegotiationError."""
        asyncio.run_coroutine_threadsafe(self._open(name), self._loop).result()

    def request(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        payload: memoryview | None = None,
    ) -> Any:
        """Serve a request (NBD_CMD_*, NBD_CMD_FLAG_*), and return what it found: the data of a
        READ, the extents of a BLOCK_STATUS, else None. Raises RequestFailed.
        """
        answer: Future[Any] = Future()
        request = (flags, command, 0, offset, length, payload)
        self._loop.call_soon_threadsafe(self._serve, request, answer)
        return answer.result()

    def leave(self) -> None:
        """It has gone; its requests have ended. Its place is free when this returns."""
        done: Future[None] = Future()
        self._loop.call_soon_threadsafe(self._leave, done)
        done.result()

    # -- the loop's thread -----------------------------------------------------------------

    async def _open(self, name: str) -> None:
        clients = self._clients
        export = clients.find_export(name, False)
        if export.releases_reads:
            raise NegotiationError(
                NBD_REP_ERR_POLICY,
                f"{name}: nbdkit tells nobody when a reply has left, so nothing can be released "
                "by being read; leave out +once, and release by TRIM",
            )
        deadline = self._loop.time() + PLACE_TIMEOUT_S
        while isinstance(export, GuestExport) and export.shared:
            here = [client for client in clients.of(export) if isinstance(client, PluginClient)]
            if len(here) < export.shared or self._loop.time() >= deadline:
                break
            await asyncio.wait(
                {client._left for client in here},
                timeout=deadline - self._loop.time(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        info, _ = clients.catalog_for(self).open(name)
        self.export = export
        self._check = RequestRules(
            flags=info.flags,
            size=info.size,
            extended=False,
            structured=True,
            contexts=BASE_ALLOCATION in info.contexts,
            block_minimum=info.block_minimum,
            can_write=info.can_write,
        )
        clients.add(self)
        clients.began(self)
        logger.info("%s: connected to %s", self.peer, info.name)

    def _leave(self, done: Future[None]) -> None:
        assert not self._in_flight, "nbdkit closes when every callback has returned"
        self._clients.lost(self, set())
        self.abort()
        done.set_result(None)

    def _serve(self, request: Request, answer: Future[Any]) -> None:
        export = self.export
        assert export is not None, "nbdkit serves requests after open"
        refused = self._check.check(request)
        if refused is not None:
            answer.set_exception(RequestFailed(*refused))
            return
        flags, command, _, offset, length, payload = request
        try:
            if command == NBD_CMD_CACHE:
                answer.set_result(None)
                return
            if command == NBD_CMD_READ:
                data = export.read_now(offset, length)
                if data is not None:
                    answer.set_result(data)
                    return
            elif not flags & NBD_CMD_FLAG_FUA and (
                (
                    command == NBD_CMD_WRITE
                    and payload is not None
                    and export.write_now(offset, payload)
                )
                or (command == NBD_CMD_TRIM and export.trim_now(offset, length))
            ):
                answer.set_result(None)
                return
        except Exception as error:
            self._fail(request, answer, error)
            return
        self._in_flight[answer] = request
        task = self._loop.create_task(self._serve_later(export, request, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_later(self, export: Export, request: Request, answer: Future[Any]) -> None:
        flags, command, _, offset, length, _ = request
        try:
            result: Any = None
            if command == NBD_CMD_READ:
                result = await export.read(offset, length)
            elif command == NBD_CMD_BLOCK_STATUS:
                one = flags & NBD_CMD_FLAG_REQ_ONE != 0
                result = _places(
                    offset, (await export.status([BASE_ALLOCATION], offset, length, one=one))[0]
                )
            else:
                await change(export, request)
        except Exception as error:
            if self._in_flight.pop(answer, None) is not None:
                self._fail(request, answer, error)
            return
        if self._in_flight.pop(answer, None) is not None:
            answer.set_result(result)

    def _fail(self, request: Request, answer: Future[Any], error: Exception) -> None:
        if not isinstance(error, OSError):
            logger.error("%s: request %s failed", self.peer, request[1:5], exc_info=error)
            error = OSError(errno.EIO, "internal error")
        assert self.export is not None, "it has failed there"
        number = error_number(request, error, is_guest=self.export.is_guest)
        answer.set_exception(RequestFailed(number, error.strerror or str(error)))

    def fail_pending(self, error: OSError) -> None:
        """Answer what waits with ``error``; but for WRITEs, whose memory is not ours."""
        for answer, request in list(self._in_flight.items()):
            if request[1] != NBD_CMD_WRITE:
                del self._in_flight[answer]
                self._fail(request, answer, error)

    def finish(self, error: OSError) -> None:
        """The export is gone. nbdkit ends no connection: what comes from now on fails."""
        self.fail_pending(error)

    def peer_has_gone(self) -> bool:
        """nbdkit tells that by ``leave`` alone."""
        return False

    def drop(self, why: str) -> None:
        """Not for us to do: connections are nbdkit's."""

    def abort(self) -> None:
        """Nobody waits any more for this client to leave."""
        if not self._left.done():
            self._left.set_result(None)

    def close(self) -> None:
        """As ``abort``: nbdkit stops when its clients have left, or at once."""
        self.abort()

    async def drain(self) -> None:
        """Return when what is in flight has ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def closed(self) -> None:
        """Return when it has left."""
        await asyncio.shield(self._left)


def _places(offset: int, extents: list[Extent]) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of each, as nbdkit wants them."""
    places = []
    for length, flags in extents:
        places.append((offset, length, flags))
        offset += length
    return places
