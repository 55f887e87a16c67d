"""The transmission phase of one connection: requests in, served, replies out.

    receive_data ──▶ RequestDecoder ──▶ serve ──▶ replies
                                          │ cannot be answered now
                                          └──▶ a task (_run) ──▶ reply

A request that needs no waiting is served by plain calls in the pass that decoded it, and all
replies of a pass leave together. Only what must wait becomes a task. Replies leave in any order.

Back-pressure, both ways: while the socket does not take what we send, or the client's requests in
flight reach a limit, no request is decoded and the socket is not read. Bytes of a request count
from the moment it is let in until its reply has left (channel.py).

Every request that was let in gets one reply, or the connection closes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import cast

from fleecenbd.nbd.catalog import Negotiated, ReplyMode
from fleecenbd.nbd.constants import (
    FLEECENBD_CMD_FLAG_READ_ONCE,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
)
from fleecenbd.nbd.errors import ProtocolError
from fleecenbd.nbd.replies import Buffer
from fleecenbd.nbd.transmission import (
    Request,
    RequestDecoder,
)
from fleecenbd.server.channel import Channel
from fleecenbd.server.exports import Export
from fleecenbd.server.failures import FailureLog
from fleecenbd.server.limits import Budget, ServerLimits
from fleecenbd.server.requests import REPLIES, Pending, failure, perform

logger = logging.getLogger(__name__)


class Transmission:
    """Serves the requests of one client. ``drop(why)`` closes its connection at once."""

    def __init__(
        self,
        negotiated: Negotiated,
        channel: Channel,
        *,
        peer: str,
        limits: ServerLimits,
        budget: Budget,
        drop: Callable[[str], None],
    ) -> None:
        self.export = cast(Export, negotiated.export)
        self.ending = False
        """No further request is read: DISC, a broken protocol, a vanished client, a drain."""
        self._channel = channel
        channel.give = self._give
        self._peer = peer
        self._limits = limits
        self._budget = budget
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._pass_bytes_max = (
            limits.pass_bytes_max if self.export.is_guest else limits.backup_pass_bytes_max
        )
        self._decoder = RequestDecoder(
            extended=negotiated.reply_mode is ReplyMode.EXTENDED,
            keep_writes=negotiated.info.can_write,
        )
        self._replies = REPLIES[negotiated.reply_mode]()
        self._releases_reads = self.export.releases_reads
        self._check = negotiated.request_rules().check
        self._contexts = negotiated.contexts

        self._tasks: dict[asyncio.Task[None], Pending] = {}
        self._failed_early: dict[asyncio.Task[None], Pending] = {}
        """Answered by ``fail_pending``: they hold their memory, and nobody waits for them."""
        self._bytes = 0
        self._follower: asyncio.Task[None] | None = None
        """Waits for requests of others, which must end before anything is served here."""
        self._kept_open = False
        """Drained, and not yet to be closed."""
        self._pass_queued = False
        self.pass_requests = 0
        """Requests that the last pass took up."""
        self._failures = FailureLog(peer, self.export.info.name)

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The requests in flight that have not been answered."""
        return set(self._tasks)

    @property
    def received_bytes(self) -> int:
        """Bytes received that make no request yet, or one that was not let in."""
        return self._decoder.buffered

    @property
    def is_idle(self) -> bool:
        """Everything that came was answered, and taken: only the client can go on."""
        channel = self._channel
        return not (
            self._tasks
            or self.ending
            or self._pass_queued
            or channel.read_paused
            or channel.send_paused
        )

    # -- requests --------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """Bytes from the client."""
        if not self.ending:
            self._decoder.feed(data)
            if not self._pass_queued:
                # Else its turn comes with that pass, after the others.
                self.serve()

    def follow(self, predecessors: set[asyncio.Task[None]]) -> None:
        """Serve nothing before these requests of others have ended."""
        self._follower = self._loop.create_task(
            self._follow(predecessors), name=f"{self._peer} follows"
        )

    async def _follow(self, predecessors: set[asyncio.Task[None]]) -> None:
        await asyncio.wait(predecessors)
        self._follower = None
        self.serve()

    def serve(self) -> None:
        """Serve what has been received, until something must be waited for."""
        if self.ending:
            return
        channel = self._channel
        if self._follower is not None:
            channel.pause_reading()
            return
        export = self.export
        release_read = export.release_read
        replies = self._replies
        limits = self._limits
        next_request = self._decoder.next_request
        check = self._check
        has_room = self._budget.has_room
        releases_reads = self._releases_reads
        out: list[Buffer] = []
        size = 0
        total = 0
        waits = True
        try:
            for self.pass_requests in range(limits.pass_requests_max):
                if channel.send_paused:
                    break
                if total >= self._pass_bytes_max:
                    self._serve_later()
                    break
                if self._tasks and (
                    len(self._tasks) >= limits.requests_max or self._bytes >= limits.bytes_max
                ):
                    break
                if self._bytes >= limits.bytes_sure and not has_room():
                    self._budget.call_when_room(self._serve_later)
                    break
                request = next_request()
                if request is None:
                    waits = False
                    break
                flags, command, cookie, offset, length, payload = request
                refused = check(request)
                if refused is not None:
                    self._failures.tell(request, *refused)
                    out.append(
                        replies.error(cookie, offset, *refused, is_read=command == NBD_CMD_READ)
                    )
                    continue
                try:
                    if command == NBD_CMD_READ:
                        data = export.read_now(offset, length)
                        if data is not None:
                            reply = replies.read(
                                cookie, offset, data, dont_fragment=flags & NBD_CMD_FLAG_DF != 0
                            )
                            if releases_reads or flags & FLEECENBD_CMD_FLAG_READ_ONCE:
                                total += length
                                channel.answer(reply, 0, partial(release_read, offset, length))
                                continue
                            out += reply
                            size += length
                            if size >= limits.send_high_water:
                                total += size
                                size = 0
                                channel.send(out)
                                out = []
                            continue
                    elif command == NBD_CMD_WRITE:
                        assert payload is not None, "the decoder hands out whole requests"
                        if not flags & NBD_CMD_FLAG_FUA and export.write_now(offset, payload):
                            out.append(replies.done(cookie, offset))
                            total += max(length, limits.write_bytes_min)
                            continue
                    elif command == NBD_CMD_TRIM:
                        if not flags & NBD_CMD_FLAG_FUA and export.trim_now(offset, length):
                            out.append(replies.done(cookie, offset))
                            continue
                    elif command == NBD_CMD_FLUSH:
                        if export.flush_now():
                            out.append(replies.done(cookie, offset))
                            continue
                    elif command == NBD_CMD_CACHE:
                        out.append(replies.done(cookie, offset))
                        continue
                    elif command == NBD_CMD_DISC:
                        self.ending = True
                        break
                except OSError as error:
                    out.append(self._failure(request, error))
                    continue
                except Exception:
                    out.append(self._internal_error(request))
                    continue
                self._start(request)
            else:
                self._serve_later()
        except ProtocolError as error:
            if out:
                channel.send(out)
            self._break_off(error)
            return
        if out:
            channel.send(out)
        if self.ending:
            self._close_soon()
        elif waits or channel.send_paused:
            channel.pause_reading()
        else:
            channel.resume_reading()

    def _serve_later(self) -> None:
        """Serve in a pass of its own: others have their turn, and the caller ends its step."""
        if not self._pass_queued:
            self._pass_queued = True
            self._loop.call_soon(self._next_pass)

    def _next_pass(self) -> None:
        self._pass_queued = False
        self.serve()

    def _start(self, request: Request) -> None:
        """Serve the request in a task of its own."""
        command, length = request[1], request[4]
        cost = 0
        if command in (NBD_CMD_READ, NBD_CMD_WRITE):
            cost = length
        elif command == NBD_CMD_BLOCK_STATUS:
            cost = self._limits.status_bytes
        self._bytes += cost
        self._budget.take(cost)
        pending = Pending(request, cost)
        task = self._loop.create_task(self._run(pending))
        self._tasks[task] = pending
        task.add_done_callback(self._ended)

    async def _run(self, pending: Pending) -> None:
        """Perform the request and queue its reply, in the step in which it was performed."""
        request = pending.request
        left: Callable[[], None] | None = None
        try:
            reply = await perform(self.export, self._replies, self._contexts, request)
        except OSError as error:
            reply = [self._failure(request, error)]
        except Exception:
            reply = [self._internal_error(request)]
        else:
            flags, command, _, offset, length, _ = request
            if command == NBD_CMD_READ and (
                self._releases_reads or flags & FLEECENBD_CMD_FLAG_READ_ONCE
            ):
                left = partial(self.export.release_read, offset, length)
        if not pending.answered:
            pending.answered = True
            cost, pending.cost = pending.cost, 0
            self._channel.answer(reply, cost, left)

    def _ended(self, task: asyncio.Task[None]) -> None:
        pending = self._tasks.pop(task, None)
        if pending is None:
            self._budget.give(self._failed_early.pop(task).cost)
            return
        self._give(pending.cost)
        if not pending.answered:
            self._drop(f"request {pending.request[1:5]} was cut off")
        elif self.ending:
            self._close_when_done()
        elif self._channel.read_paused and not self._channel.send_paused:
            self._serve_later()

    def _give(self, cost: int) -> None:
        if cost:
            self._bytes -= cost
            self._budget.give(cost)

    def _failure(self, request: Request, error: OSError) -> bytes:
        self._failures.tell(request, error.errno, error.strerror or str(error))
        return failure(self._replies, request, error, is_guest=self.export.is_guest)

    def _internal_error(self, request: Request) -> bytes:
        """Our own fault, in an except clause: loud here, an error of that one request there."""
        logger.exception("%s: request %s failed", self._peer, request[1:5])
        return self._failure(request, OSError(errno.EIO, "internal error"))

    # -- ends ------------------------------------------------------------------------------

    def resume(self) -> None:
        """The client takes what it is sent again."""
        if self.ending:
            self._close_soon()
        else:
            self.serve()

    def fail_pending(self, error: OSError) -> None:
        """Answer every request in flight with ``error`` now; what their tasks find is dropped."""
        failed, self._tasks = self._tasks, {}
        self._failed_early.update(failed)
        for pending in failed.values():
            # Its bytes stay in the budget until the task has ended: it still holds them.
            self._bytes -= pending.cost
            if not pending.answered:
                pending.answered = True
                self._channel.answer([self._failure(pending.request, error)], 0)
        if self._channel.read_paused:
            self._serve_later()

    def finish(self, error: OSError) -> None:
        """The export is gone: answer what is in flight with ``error``, and close."""
        self.ending = True
        self.fail_pending(error)
        self._close_when_done()

    async def drain(self) -> None:
        """Read no more; return when the requests in flight have ended and been answered.

        ``close`` is the caller's to call.
        """
        if not self.ending:
            self.ending = True
            self._kept_open = True
            self._channel.pause_reading()
        while self._tasks:
            await asyncio.wait(self.tasks)

    def close(self) -> None:
        """Close when the last replies have left; what is still in flight gets none."""
        self.ending = True
        self._kept_open = False
        for pending in self._tasks.values():
            pending.answered = True
        self._channel.close()

    def _break_off(self, error: ProtocolError) -> None:
        logger.info("%s: dropped: broken protocol: %s", self._peer, error)
        self.ending = True
        self._loop.call_soon(self.close)

    def _close_soon(self) -> None:
        """Not in this call: closed inside ``resume_writing``, asyncio's own transport reports its
        loss twice."""
        self._loop.call_soon(self._close_when_done)

    def _close_when_done(self) -> None:
        """Close once every request has been answered and every reply has left."""
        if not self._tasks and not self._kept_open:
            self._channel.close()

    def leave(self) -> set[asyncio.Task[None]]:
        """The client has gone: nobody is answered any more. Returns what is still in flight."""
        self.ending = True
        self._budget.forget(self._serve_later)
        if self._follower is not None:
            self._follower.cancel()
        for pending in self._tasks.values():
            pending.answered = True
        return self.tasks
