"""One client's connection, from its first byte to its last.

    data_received ──▶ Handshake, then ──▶ Transmission ──▶ Channel

Ends
    DISC                  read no more, let requests end, send their replies, close
    the client vanishes   its place is free at once; requests in flight go on to their end (a
                          guest's write is never left half done), and nobody sees their replies
    ``finish``            the export is gone: every request in flight fails, then as DISC
    ``drain``, ``close``  the server stops: as DISC, with a deadline; a guest gets no reply to
                          what it sent besides
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from fleecenbd.nbd.errors import ProtocolError
from fleecenbd.nbd.handshake import Handshake
from fleecenbd.server.channel import Channel
from fleecenbd.server.exports import Export
from fleecenbd.server.polling import Poll
from fleecenbd.server.transmission import Transmission

if TYPE_CHECKING:
    from fleecenbd.server.clients import Clients

logger = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """The protocol object of one client. Everything runs on the loop's thread."""

    def __init__(
        self, clients: Clients, peer: str, *, backup_only: bool, pid: int | None = None
    ) -> None:
        self.peer = peer
        """Who it is, for messages: ``pid 123``, or an address."""
        self.pid = pid
        """Its process; None if that is not known, as over TCP."""
        self.backup_only = backup_only
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set when the transport has closed."""
        self.handshaking = True
        self.channel: Channel | None = None
        """None until the transport is there."""
        self.transmission: Transmission | None = None
        """None until the handshake is over."""
        self.poll: Poll | None = None
        """Looks at the socket beside the transport; None where that does not pay."""
        self._clients = clients
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._handshake = Handshake(clients.catalog_for(self))
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._gone = False

    @property
    def export(self) -> Export | None:
        """Where it has a place; None during the handshake."""
        return None if self.transmission is None else self.transmission.export

    @property
    def in_flight(self) -> int:
        """Requests that wait for something."""
        return len(self.transmission.tasks) if self.transmission else 0

    # -- what the transport says -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._gone:
            self._transport.abort()
            return
        limits = self._clients.limits
        self.channel = Channel(
            self._transport, send_high_water=limits.send_high_water, linger_s=limits.linger_s
        )
        self._handshake_timer = self._loop.call_later(
            limits.handshake_timeout_s, self._handshake_is_late
        )
        self._transport.write(self._handshake.greeting())

    def data_received(self, data: bytes) -> None:
        transmission = self.transmission
        if transmission is not None:
            transmission.receive_data(data)
            if self.poll is not None and self.poll.pass_ended(transmission.pass_requests):
                # Once the replies of this pass have left, which uvloop sends at its end.
                self._loop.call_soon(self._look_again)
        elif self.handshaking:
            self._negotiate(data)

    def _look_again(self) -> None:
        """Look for the next request before the loop sleeps (polling.py)."""
        transmission = self.transmission
        if transmission is not None and self.poll is not None and transmission.is_idle:
            data = self.poll.look()
            if data:
                self.data_received(data)

    def pause_writing(self) -> None:
        assert self.channel is not None, "something was written"
        self.channel.send_paused = True

    def resume_writing(self) -> None:
        channel = self.channel
        assert channel is not None, "something was written"
        channel.resume_sending()
        if channel.send_paused:
            return
        if self.transmission is not None:
            self.transmission.resume()
        else:
            channel.resume_reading()

    def eof_received(self) -> bool:
        """Half a connection is none: what is in flight ends, its replies go nowhere."""
        self.abort()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()
        if not self.lost.done():
            self.lost.set_result(None)

    # -- handshake -------------------------------------------------------------------------

    def _negotiate(self, data: bytes) -> None:
        assert self._transport is not None, "data came from it"
        assert self.channel is not None, "it has a transport"
        try:
            answer = self._handshake.receive_data(data)
        except ProtocolError as error:
            self.drop(f"no NBD handshake: {error}")
            return
        if answer:
            self._transport.write(answer)
            if self.channel.send_paused:
                self.channel.pause_reading()
        if self._handshake.ended:
            self._end_handshake()
            self.channel.close()
        elif self._handshake.negotiated is not None:
            self._end_handshake()
            self._begin(self.channel)

    def _begin(self, channel: Channel) -> None:
        negotiated = self._handshake.negotiated
        assert negotiated is not None, "the handshake is over"
        export = cast(Export, negotiated.export)
        # Requests of a connection that broke off may still be changing the disk. What this client
        # sends is not served before they have ended: it may be the same guest, which sends them
        # again, and an old one that came in late would undo a new one.
        predecessors = self._clients.predecessors(export)
        transmission = Transmission(
            negotiated,
            channel,
            peer=self.peer,
            limits=self._clients.limits,
            budget=self._clients.budget_for(export),
            drop=self.drop,
        )
        self.transmission = transmission
        logger.info("%s: connected to %s", self.peer, export.info.name)
        self._clients.began(self)
        if predecessors:
            transmission.follow(predecessors)
        transmission.receive_data(self._handshake.leftover)

    def _end_handshake(self) -> None:
        self.handshaking = False
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def _handshake_is_late(self) -> None:
        self.drop(f"no handshake within {self._clients.limits.handshake_timeout_s:g} s")

    # -- ends ------------------------------------------------------------------------------

    def drop(self, why: str) -> None:
        """Close at once, with replies unsent."""
        logger.info("%s: dropped: %s", self.peer, why)
        self.abort()

    def abort(self) -> None:
        """Close with no more replies; what is in flight goes on."""
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def fail_pending(self, error: OSError) -> None:
        """Answer every request in flight with ``error`` now."""
        if self.transmission is not None:
            self.transmission.fail_pending(error)

    def finish(self, error: OSError) -> None:
        """The export is gone: answer what is in flight with ``error``, and close."""
        if self.transmission is not None:
            self.transmission.finish(error)

    async def drain(self) -> None:
        """Read no more requests; return when those in flight have ended and are answered.

        ``close`` is the caller's to call, and so is a deadline.
        """
        if self.transmission is None:
            self.abort()
        else:
            await self.transmission.drain()

    def close(self) -> None:
        """Close when the last replies have left. What is still in flight gets none."""
        if self.transmission is None:
            self.abort()
        else:
            self.transmission.close()

    async def closed(self) -> None:
        """Return when the transport has closed."""
        await asyncio.shield(self.lost)

    def peer_has_gone(self) -> bool:
        """Has the client closed its end, seen or not yet seen by the transport?"""
        return self.channel is not None and self.channel.peer_has_gone()

    def _leave(self) -> None:
        """The client has gone, or is to go: its place is free from this step on."""
        if self._gone:
            return
        self._gone = True
        self._end_handshake()
        tasks = self.transmission.leave() if self.transmission is not None else set()
        if self.channel is not None:
            self.channel.discard()
        self._clients.lost(self, tasks)
