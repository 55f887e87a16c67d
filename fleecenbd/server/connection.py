"""One client's connection: bytes in, requests served, replies out.

    data_received ──▶ Handshake ──▶ RequestDecoder ──▶ _serve ──▶ replies
                                                         │ cannot be answered now
                                                         └──▶ a task (_perform) ──▶ reply

A request that needs no waiting is served by plain calls in the pass that decoded it, and all
replies of a pass leave together. Only what must wait becomes a task. Replies leave in any order.

Back-pressure, both ways: while the socket does not take what we send, or the client's requests in
flight reach a limit, no request is decoded and the socket is not read. Bytes of a request count
from the moment it is let in until its reply has been handed to the transport.

Ends
    DISC                  read no more, let requests end, send their replies, close
    the client vanishes   requests in flight go on to their end (a guest's write is never left
                          half done); their replies are dropped
    ``drain``             the server stops: as DISC, with a deadline; a guest connection is closed
                          with no reply to the rest
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from fleecenbd.nbd.catalog import Negotiated, ReplyMode
from fleecenbd.nbd.constants import (
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_EIO,
)
from fleecenbd.nbd.errors import ProtocolError
from fleecenbd.nbd.handshake import Handshake
from fleecenbd.nbd.replies import Buffer
from fleecenbd.nbd.transmission import (
    ExtendedReplies,
    Request,
    RequestDecoder,
    SimpleReplies,
    StructuredReplies,
)
from fleecenbd.server.exports import Export
from fleecenbd.server.limits import Budget, ServerLimits
from fleecenbd.server.requests import failure, perform

if TYPE_CHECKING:
    from fleecenbd.server.clients import Clients

logger = logging.getLogger(__name__)

_REPLIES: dict[ReplyMode, type[SimpleReplies] | type[StructuredReplies]] = {
    ReplyMode.SIMPLE: SimpleReplies,
    ReplyMode.STRUCTURED: StructuredReplies,
    ReplyMode.EXTENDED: ExtendedReplies,
}


class _Pending:
    """A request in flight in a task. Once ``answered``, what its task ends with is dropped."""

    __slots__ = ("answered", "cost", "request")

    def __init__(self, request: Request, cost: int) -> None:
        self.request = request
        self.cost = cost
        self.answered = False


class Connection(asyncio.Protocol):
    """The protocol object of one client. Everything runs on the loop's thread."""

    def __init__(self, clients: Clients, peer: str, *, backup_only: bool) -> None:
        self.peer = peer
        """Who it is, for messages: ``pid 123``, or an address."""
        self.backup_only = backup_only
        self.export: Export | None = None
        self.lost = asyncio.get_running_loop().create_future()
        """Set when the transport has closed."""
        self.handshaking = True
        self._clients = clients
        self._limits: ServerLimits = clients.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # connection_made
        self._linger_timer: asyncio.TimerHandle | None = None
        self._handshake = Handshake(clients.catalog_for(self))
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._decoder = RequestDecoder()
        self._replies: SimpleReplies | StructuredReplies = SimpleReplies()
        self._check: Callable[[Request], tuple[int, str] | None] = lambda request: None
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._budget = Budget(0)

        self._tasks: dict[asyncio.Task[None], _Pending] = {}
        self._bytes = 0
        self._unsent: list[tuple[list[Buffer], int]] = []
        self._write_paused = False
        self._read_paused = False
        self._ending = False
        """No further request is read: DISC, a broken protocol, a vanished client, or drain."""
        self._waits_for_predecessor = False
        self._pass_queued = False

    # -- life ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._ending:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=self._limits.send_high_water)
        self._handshake_timer = self._loop.call_later(
            self._limits.handshake_timeout_s, self._handshake_is_late
        )
        self._transport.write(self._handshake.greeting())

    def connection_lost(self, error: Exception | None) -> None:
        self._ending = True
        self._end_handshake()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._budget.forget(self._room)
        for pending in self._tasks.values():
            pending.answered = True
        self._give_unsent()
        self._clients.lost(self, list(self._tasks))
        if not self.lost.done():
            self.lost.set_result(None)

    def eof_received(self) -> bool:
        """Half a connection is none: what is in flight ends, its replies go nowhere."""
        return False

    def drop(self, why: str) -> None:
        """Close at once, with replies unsent."""
        logger.info("%s: dropped: %s", self.peer, why)
        self.abort()

    async def drain(self) -> None:
        """Read no more requests; return when those in flight have ended and are answered.

        The caller has a deadline, and closes the connection after it.
        """
        self._ending = True
        if self._transport is None:
            return
        self._pause_reading()
        if self.handshaking:
            self._handshake.shutting_down = True
            self._close_when_done()
            return
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        self._close_when_done()

    def abort(self) -> None:
        """Close with no more replies; what is in flight goes on."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    @property
    def in_flight(self) -> int:
        """Requests in flight in tasks."""
        return len(self._tasks)

    # -- handshake -------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.handshaking:
            self._negotiate(data)
        else:
            self._decoder.feed(data)
            self._serve()

    def _negotiate(self, data: bytes) -> None:
        if self._ending:
            return
        try:
            answer = self._handshake.receive_data(data)
        except ProtocolError as error:
            self.drop(f"no NBD handshake: {error}")
            return
        if answer:
            self._transport.write(answer)
        if self._handshake.ended:
            self._ending = True
            self._end_handshake()
            self._close()
        elif self._handshake.negotiated is not None:
            self._end_handshake()
            self._begin(self._handshake.negotiated)

    def _begin(self, negotiated: Negotiated) -> None:
        self.export = cast(Export, negotiated.export)
        self._decoder = RequestDecoder(extended=negotiated.reply_mode is ReplyMode.EXTENDED)
        self._replies = _REPLIES[negotiated.reply_mode]()
        self._check = negotiated.request_rules().check
        self._contexts = negotiated.contexts
        self._budget = self._clients.budget_for(self.export)
        logger.info("%s: connected to %s", self.peer, self.export.info.name)
        if self._handshake.leftover:
            self._decoder.feed(self._handshake.leftover)
        predecessor = self._clients.predecessors(self.export)
        if predecessor:
            # Requests of a connection that broke off may still be changing the disk. What this
            # client sends is not served before they have ended: it may be the same guest, which
            # sends them again, and an old one that came in late would undo a new one.
            self._waits_for_predecessor = True
            waiter = self._loop.create_task(self._follow(predecessor), name=f"{self.peer} follows")
            self._clients.own(waiter)
        self._serve()

    async def _follow(self, predecessor: set[asyncio.Task[None]]) -> None:
        await asyncio.wait(predecessor)
        self._waits_for_predecessor = False
        self._serve()

    def _end_handshake(self) -> None:
        self.handshaking = False
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def _handshake_is_late(self) -> None:
        self.drop(f"no handshake within {self._limits.handshake_timeout_s:g} s")

    # -- requests --------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve what has been received, until something must be waited for."""
        if self._ending or self._waits_for_predecessor:
            if self._waits_for_predecessor and not self._ending:
                self._pause_reading()
            return
        export = self._export()
        replies = self._replies
        limits = self._limits
        out: list[Buffer] = []
        size = 0
        total = 0
        waits = False
        try:
            while not self._write_paused:
                if total >= limits.pass_bytes_max:
                    self._serve_later()
                    waits = True
                    break
                if self._tasks and (
                    len(self._tasks) >= limits.requests_max or self._bytes >= limits.bytes_max
                ):
                    waits = True
                    break
                if not self._budget.has_room():
                    self._budget.call_when_room(self._room)
                    waits = True
                    break
                request = self._decoder.next_request()
                if request is None:
                    break
                flags, command, cookie, offset, length, payload = request
                refused = self._check(request)
                if refused is not None:
                    out.append(
                        replies.error(cookie, offset, *refused, is_read=command == NBD_CMD_READ)
                    )
                    continue
                try:
                    if command == NBD_CMD_READ:
                        data = export.read_now(offset, length)
                        if data is not None:
                            out += replies.read(
                                cookie, offset, data, dont_fragment=flags & NBD_CMD_FLAG_DF != 0
                            )
                            size += length
                            if size >= limits.send_high_water:
                                total += size
                                size = 0
                                self._send(out)
                                out = []
                            continue
                    elif command == NBD_CMD_WRITE:
                        assert payload is not None, "the decoder hands out whole requests"
                        if not flags & NBD_CMD_FLAG_FUA and export.write_now(offset, payload):
                            out.append(replies.done(cookie, offset))
                            total += length
                            continue
                    elif command == NBD_CMD_TRIM:
                        if not flags & NBD_CMD_FLAG_FUA and export.trim_now(offset, length):
                            out.append(replies.done(cookie, offset))
                            continue
                    elif command == NBD_CMD_CACHE:
                        out.append(replies.done(cookie, offset))
                        continue
                    elif command == NBD_CMD_DISC:
                        self._ending = True
                        break
                except OSError as error:
                    out.append(self._failure(request, error))
                    continue
                self._start(request)
        except ProtocolError as error:
            if out:
                self._send(out)
            self.drop(f"broken protocol: {error}")
            return
        if out:
            self._send(out)
        if self._ending:
            self._close_when_done()
        elif waits or self._write_paused:
            self._pause_reading()
        else:
            self._resume_reading()

    def _export(self) -> Export:
        assert self.export is not None, "requests come after the handshake"
        return self.export

    def _serve_later(self) -> None:
        if not self._pass_queued:
            self._pass_queued = True
            self._loop.call_soon(self._next_pass)

    def _next_pass(self) -> None:
        self._pass_queued = False
        self._serve()

    def _room(self) -> None:
        """The budget has room again. Not served here: the caller is in the middle of a step."""
        self._serve_later()

    def _start(self, request: Request) -> None:
        """Serve the request in a task of its own."""
        command, length = request[1], request[4]
        cost = length if command in (NBD_CMD_READ, NBD_CMD_WRITE) else 0
        self._bytes += cost
        self._budget.take(cost)
        pending = _Pending(request, cost)
        task = self._loop.create_task(self._run(pending))
        self._tasks[task] = pending
        task.add_done_callback(self._ended)

    async def _run(self, pending: _Pending) -> None:
        """Perform the request and queue its reply, in the step in which it was performed."""
        try:
            reply = await perform(self._export(), self._replies, self._contexts, pending.request)
        except OSError as error:
            reply = [self._failure(pending.request, error)]
        except Exception:
            logger.exception("%s: request %s failed", self.peer, pending.request[1:5])
            _, _, cookie, offset, _, _ = pending.request
            reply = [self._replies.error(cookie, offset, NBD_EIO, "internal error")]
        self._answer(pending, reply)

    def _failure(self, request: Request, error: OSError) -> bytes:
        return failure(self._replies, request, error, is_guest=self._export().is_guest)

    def _answer(self, pending: _Pending, reply: list[Buffer]) -> None:
        cost, pending.cost = pending.cost, 0
        if pending.answered:
            self._give(cost)
            return
        pending.answered = True
        if self._write_paused:
            self._unsent.append((reply, cost))
        else:
            self._send(reply)
            self._give(cost)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if self._ending:
            self._close_when_done()
        elif self._read_paused and not self._write_paused:
            self._serve_later()

    def fail_pending(self, error: OSError) -> None:
        """Answer every request in flight with ``error`` now; what their tasks find is dropped."""
        for pending in list(self._tasks.values()):
            if not pending.answered:
                # The bytes stay charged until the task ends: it still holds them.
                reply = self._failure(pending.request, error)
                pending.answered = True
                self._unsent.append(([reply], 0))
        if not self._write_paused:
            self._send_unsent()

    def finish(self, error: OSError) -> None:
        """The export is gone: answer what is in flight with ``error``, and close."""
        self._ending = True
        self.fail_pending(error)
        self._close()

    # -- sending ---------------------------------------------------------------------------

    def _send(self, buffers: list[Buffer]) -> None:
        if len(buffers) == 1:
            self._transport.write(buffers[0])
        else:
            self._transport.writelines(buffers)

    def _send_unsent(self) -> None:
        unsent = self._unsent
        count = 0
        while count < len(unsent) and not self._write_paused:
            reply, cost = unsent[count]
            count += 1
            self._send(reply)
            self._give(cost)
        del unsent[:count]

    def _give_unsent(self) -> None:
        for _, cost in self._unsent:
            self._give(cost)
        self._unsent.clear()

    def _give(self, cost: int) -> None:
        if cost:
            self._bytes -= cost
            self._budget.give(cost)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._send_unsent()
        if self._write_paused:
            return
        if self._ending:
            self._close_when_done()
        else:
            self._serve()

    def _close_when_done(self) -> None:
        """Close once every request has ended and every reply has been handed on."""
        if not self._tasks and not self._unsent:
            self._close()

    def _close(self) -> None:
        """Close once the transport has sent what it was handed; not for ever."""
        if self._linger_timer is None and not self.lost.done():
            self._transport.close()
            self._linger_timer = self._loop.call_later(self._limits.linger_s, self.abort)

    def _pause_reading(self) -> None:
        if not self._read_paused and not self._transport.is_closing():
            self._read_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._read_paused and not self._transport.is_closing():
            self._read_paused = False
            self._transport.resume_reading()
