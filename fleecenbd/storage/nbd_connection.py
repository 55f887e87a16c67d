"""One libnbd handle on the running loop: connected, asked many things at once, and gone.

libnbd never reads or writes but when it is told that its socket is ready, or when it is given a
command. So the loop watches the socket, and all else is plain calls:

    issue ──▶ aio_pread … ──▶ in flight ──▶ readable ──▶ aio_notify_read ──▶ reaped: a future
                                 │
                                 └── the connection is gone ──▶ unanswered, handed back

A command is ended by ``aio_command_completed`` and not by a completion callback: only there libnbd
looks whether a READ was answered in full.

What the loop watches is a duplicate of libnbd's socket, since libnbd closes its own in the middle
of a call, and the number may be another file's before the loop hears of it.
"""

from __future__ import annotations

import asyncio
import errno
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

from fleecenbd.storage.libnbd import nbd
from fleecenbd.storage.nbd_errors import (
    ServerTexts,
    lost_text,
    reply_error,
    unsent_error,
)
from fleecenbd.storage.nbd_handshake import connected_handle, duplicate_socket, facts_of, keep_alive

GOODBYE_TIMEOUT_S = 2.0
"""Seconds that a server has to hang up after NBD_CMD_DISC."""
REQUESTS_MAX = 64
"""Requests in flight on one connection."""
BYTES_MAX = 16 << 20
"""Bytes of payload in flight on one connection; one request is always let in, however long."""
REPLIES_PER_TURN = 16
"""Replies that are taken in before others on the loop have their turn."""

Send: TypeAlias = Callable[[Any], int]
"""Starts a command of a libnbd handle, and hands back its cookie."""


class NbdRequest:
    """A call that is waited for."""

    __slots__ = ("changes", "future", "length", "lost", "send")

    def __init__(
        self, send: Send, length: int, changes: bool, future: asyncio.Future[None]
    ) -> None:
        self.send = send
        """Hands it to a libnbd handle: to another one, when no reply came."""
        self.length = length
        """Bytes of payload."""
        self.changes = changes
        """Whether the disk is another one afterwards."""
        self.future = future
        self.lost = 0
        """How often a connection was lost under it."""


class NbdConnection:
    """Made by ``connect``. ``issue`` while there ``has_room``; ``on_reply`` is called when there
    is more of it, ``on_lost`` once, with what was not answered."""

    def __init__(
        self,
        uri: str,
        handle: Any,
        texts: ServerTexts | None,
        on_reply: Callable[[], None],
        on_lost: Callable[[NbdConnection, list[NbdRequest], OSError], None],
    ) -> None:
        self.facts = facts_of(handle, uri)
        self.bytes = 0
        """Bytes of payload in flight."""
        self._uri = uri
        self._handle = handle
        self._texts = texts
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        self._requests: dict[int, NbdRequest] = {}
        """In flight, by libnbd's cookie. Keeps what they read into or write from alive."""
        self._direction = 0
        self._closed = self._loop.create_future()
        self._socket = duplicate_socket(handle)
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        keep_alive(self._socket)
        self._look()

    @classmethod
    async def connect(
        cls,
        uri: str,
        contexts: Iterable[str],
        *,
        on_reply: Callable[[], None],
        on_lost: Callable[[NbdConnection, list[NbdRequest], OSError], None],
        keeps_texts: bool = False,
    ) -> NbdConnection:
        """Connect to an NBD URI, and select those meta contexts that the server has.

        ``keeps_texts``: error replies carry the server's own text, which costs much: debugging
        stays on. Raises OSError: NbdRefused if trying again would not help.
        """
        texts = ServerTexts()
        handle = await connected_handle(uri, contexts, texts)
        if not keeps_texts:
            handle.set_debug(False)
        texts.take()
        return cls(uri, handle, texts if keeps_texts else None, on_reply, on_lost)

    def has_room(self, length: int) -> bool:
        """Whether a request with so many bytes of payload may be sent now."""
        count = len(self._requests)
        return not count or (count < REQUESTS_MAX and self.bytes + length <= BYTES_MAX)

    def issue(self, request: NbdRequest) -> None:
        """Send. What libnbd refuses to send has failed as if the server had."""
        try:
            cookie = request.send(self._handle)
        except nbd.Error as error:
            if not self._look():
                self._lose([request], lost_text(error))
            elif not request.future.done():
                request.future.set_exception(unsent_error(error, self._uri))
            return
        self._requests[cookie] = request
        self.bytes += request.length
        if not self._look():
            self._lose([], "the connection broke")

    # -- the socket is ready -------------------------------------------------------------------

    def _on_readable(self) -> None:
        handle, ready, answered = self._handle, self._ready.poll, False
        if handle is None:
            return  # let go of since the loop has seen it
        for _ in range(REPLIES_PER_TURN):
            try:
                handle.aio_notify_read()
            except nbd.Error as error:
                self._lose([], lost_text(error))
                return
            # First: libnbd ends what is in flight on a connection that is closed, with an error.
            if not self._look():
                self._lose([], "the server hung up")
                return
            if handle.aio_in_flight() < len(self._requests):
                answered = True
                self._reap(handle)
                if self._handle is None:
                    return
            # Cheaper than to come back through the loop, where more is there already.
            if not self._requests or not ready(0):
                break
        if answered:
            self._on_reply()

    def _on_writable(self) -> None:
        handle = self._handle
        if handle is None:
            return
        if not handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
            self._look()  # a reply came first
            return
        try:
            handle.aio_notify_write()
        except nbd.Error as error:
            self._lose([], lost_text(error))
            return
        if not self._look():
            self._lose([], "the connection broke")

    def _look(self) -> bool:
        """Watch the socket for what libnbd waits for. False: the connection is gone."""
        direction: int = self._handle.aio_get_direction()
        if direction != self._direction:
            changed = direction ^ self._direction
            self._direction = direction
            loop, descriptor = self._loop, self._socket.fileno()
            if changed & nbd.AIO_DIRECTION_READ:
                if direction & nbd.AIO_DIRECTION_READ:
                    loop.add_reader(descriptor, self._on_readable)
                else:
                    loop.remove_reader(descriptor)
            if changed & nbd.AIO_DIRECTION_WRITE:
                if direction & nbd.AIO_DIRECTION_WRITE:
                    loop.add_writer(descriptor, self._on_writable)
                else:
                    loop.remove_writer(descriptor)
        return direction != 0

    # -- the end of a request ------------------------------------------------------------------

    def _reap(self, handle: Any) -> None:
        """End every request that was answered."""
        for _ in range(len(self._requests) - handle.aio_in_flight()):
            cookie = handle.aio_peek_command_completed()
            request = self._requests.pop(cookie)
            self.bytes -= request.length
            try:
                handle.aio_command_completed(cookie)
            except nbd.Error as error:
                if error.errnum == errno.ESHUTDOWN:
                    # Whoever stops will not answer the others either.
                    self._lose([request], self._server_text() or "the server is shutting down")
                    return
                if not request.future.done():
                    request.future.set_exception(reply_error(error, self._server_text(), self._uri))
            else:
                if not request.future.done():
                    request.future.set_result(None)

    def _server_text(self) -> str | None:
        return None if self._texts is None else self._texts.take()

    # -- the end of the connection -------------------------------------------------------------

    def _lose(self, unanswered: list[NbdRequest], why: str) -> None:
        """The server is gone, or of no more use: hand back what it has not answered."""
        handle = self._handle
        answered = len(unanswered)  # with "no", that is
        if handle.aio_get_direction() == 0:
            unanswered += self._unanswered(handle)
        else:
            unanswered += self._requests.values()
        self.left_changing = any(request.changes for request in unanswered[answered:])
        self._let_go()
        error = OSError(errno.ECONNRESET, why, self._uri)
        waiting = [request for request in unanswered if not request.future.done()]
        self._on_lost(self, waiting, error)

    def _unanswered(self, handle: Any) -> list[NbdRequest]:
        """Of a dead connection: what had its answer before it died has that."""
        found = []
        for cookie, request in self._requests.items():
            try:
                answered = handle.aio_command_completed(cookie)
            except nbd.Error:
                answered = False
            if not answered:
                found.append(request)
            elif not request.future.done():
                request.future.set_result(None)
        return found

    def _let_go(self) -> None:
        descriptor = self._socket.fileno()
        self._loop.remove_reader(descriptor)
        self._loop.remove_writer(descriptor)
        # The last reference: libnbd closes its socket, and lets go of buffers.
        self._handle = None
        self._requests = {}
        self.bytes = 0
        self._socket.close()
        if not self._closed.done():
            self._closed.set_result(None)

    def abandon(self) -> list[NbdRequest]:
        """Hang up, without a word. Hands back what was not answered."""
        unanswered = [request for request in self._requests.values() if not request.future.done()]
        if self._handle is not None:
            self.left_changing = self.is_changing
            self._let_go()
        return unanswered

    @property
    def is_changing(self) -> bool:
        """Whether anything in flight changes the disk."""
        return any(request.changes for request in self._requests.values())

    async def close(self) -> list[NbdRequest]:
        """Say goodbye, if nothing is in flight, and hang up. As ``abandon``."""
        handle = self._handle
        if handle is not None and not self._requests:
            self._on_lost = _ignore
            try:
                handle.aio_disconnect()
            except nbd.Error:
                pass
            else:
                if self._look():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                            await self._closed
        return self.abandon()


def _ignore(_connection: NbdConnection, _requests: list[NbdRequest], _error: OSError) -> None:
    """It was going to be closed anyway."""
