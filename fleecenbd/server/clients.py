"""The clients of a server: who is connected, to what, and what they may still take.

Places: a guest export admits ``shared`` connections; fleecing exports together leave
``guest_places`` free. When all places are taken, a new connection takes that of the oldest one
which is still in its handshake, so that half-open connections cannot keep a guest out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from fleecenbd.nbd.catalog import ExportInfo
from fleecenbd.nbd.constants import NBD_REP_ERR_POLICY
from fleecenbd.nbd.errors import NegotiationError
from fleecenbd.server.exports import Export, GuestExport
from fleecenbd.server.limits import Budget, ServerLimits

logger = logging.getLogger(__name__)

FindExport = Callable[[str, bool], Export]
"""(name, only fleecing exports) to the export; raises NegotiationError."""
ListExports = Callable[[bool], Sequence[tuple[str, str]]]


class Client(Protocol):
    """Who may be connected: a Connection, or whoever else's requests are served here."""

    @property
    def peer(self) -> str:
        """Who it is, for messages: ``pid 123``, or an address."""

    @property
    def pid(self) -> int | None:
        """Its process; None if that is not known, as over TCP."""

    @property
    def backup_only(self) -> bool:
        """Whether it is shown fleecing exports only."""

    @property
    def handshaking(self) -> bool:
        """Whether its handshake is not over yet."""

    @property
    def export(self) -> Export | None:
        """Where it has a place; None during the handshake."""

    def peer_has_gone(self) -> bool:
        """Whether the client is known to have closed its end."""

    def drop(self, why: str) -> None:
        """End at once, with replies unsent, where the connection is ours to end."""

    def abort(self) -> None:
        """End with no more replies; what is in flight goes on."""

    def fail_pending(self, error: OSError) -> None:
        """Answer every request in flight with ``error`` now."""

    def finish(self, error: OSError) -> None:
        """The export is gone: answer what is in flight with ``error``, and end."""

    async def drain(self) -> None:
        """Take no more requests; return when those in flight have ended and are answered."""

    def close(self) -> None:
        """End when the last replies have left."""

    async def closed(self) -> None:
        """Return when it has ended."""


class ClientCatalog:
    """What one client is offered (nbd.catalog.Catalog)."""

    def __init__(self, clients: Clients, connection: Client) -> None:
        self._clients = clients
        self._connection = connection

    def list(self) -> Sequence[tuple[str, str]]:
        """Name and description of each export."""
        return self._clients.list_exports(self._connection.backup_only)

    def info(self, name: str) -> ExportInfo:
        """What the export is; takes no place."""
        return self._find(name).info

    def open(self, name: str) -> tuple[ExportInfo, object]:
        """Take a place at the export, or NBD_REP_ERR_POLICY with the reason."""
        export = self._find(name)
        try:
            self._clients.take_place(export)
        except NegotiationError as error:
            self._log(error)
            raise
        return export.info, export

    def _find(self, name: str) -> Export:
        try:
            return self._clients.find_export(name, self._connection.backup_only)
        except NegotiationError as error:
            self._log(error)
            raise

    def _log(self, error: NegotiationError) -> None:
        """Clients seldom show the text that they are sent."""
        logger.info("%s: refused: %s", self._connection.peer, error.text)


class Clients:
    """All connections of a server."""

    def __init__(
        self, limits: ServerLimits, find_export: FindExport, list_exports: ListExports
    ) -> None:
        self.limits = limits
        self.find_export = find_export
        self.list_exports = list_exports
        self.connections: dict[Client, None] = {}
        self.came: Callable[[Client], None] = lambda client: None
        """Called with each client whose handshake has ended with an export."""
        self.went: Callable[[Client], None] = lambda client: None
        """Called with each of these that has gone."""
        self.guest_came: Callable[[GuestExport, int | None], None] = lambda export, pid: None
        """Called with each client of a guest export that comes, and its process if known."""
        self.guest_left: Callable[[GuestExport], None] = lambda export: None
        """Called when the last client of a guest export has left."""
        self._guest_budget = Budget(limits.bytes_max_all)
        self._fleecing_budget = Budget(limits.bytes_max_all)
        self._leftovers: dict[Export, set[asyncio.Task[None]]] = {}

    def catalog_for(self, connection: Client) -> ClientCatalog:
        """The catalog that the connection's handshake asks."""
        return ClientCatalog(self, connection)

    def budget_for(self, export: Export) -> Budget:
        """The budget that connections to this kind of export share."""
        return self._guest_budget if export.is_guest else self._fleecing_budget

    def of(self, export: Export) -> list[Client]:
        """The connections to an export, whichever way they took into it, oldest first."""
        return [
            connection
            for connection in self.connections
            if connection.export is not None and connection.export.main is export
        ]

    # -- places ----------------------------------------------------------------------------

    def admit(self) -> bool:
        """Is there a place for one more connection? May drop a half-open one for it."""
        if len(self.connections) < self.limits.clients_max:
            return True
        for connection in self.connections:
            if connection.handshaking:
                connection.drop("its place was needed: too many connections are half open")
                return True
        return False

    def add(self, connection: Client) -> None:
        self.connections[connection] = None

    def take_place(self, export: Export) -> None:
        """Raise NegotiationError where the export, or the server, has no place left."""
        if isinstance(export, GuestExport):
            for connection in self.of(export):
                # Its requests in flight are this client's predecessors; what else it sent must
                # not be served after this client's.
                if connection.peer_has_gone():
                    connection.drop("its client has gone")
            here = self.of(export)
            if export.shared and len(here) >= export.shared:
                raise NegotiationError(
                    NBD_REP_ERR_POLICY,
                    f"{export.info.name} is in use by {here[0].peer}; a second client would "
                    "corrupt its file systems (serve --shared N admits more); a backup reads the "
                    "export of a session",
                )
            return
        fleecing = sum(
            connection.export is not None and not connection.export.is_guest
            for connection in self.connections
        )
        if fleecing >= self.limits.clients_max - self.limits.guest_places:
            raise NegotiationError(
                NBD_REP_ERR_POLICY,
                f"{fleecing} backup clients are connected already, and the other places are "
                "kept for guests",
            )

    def began(self, connection: Client) -> None:
        """The connection's handshake has ended with an export."""
        self.came(connection)
        export = connection.export
        if isinstance(export, GuestExport):
            self.guest_came(export, connection.pid)

    # -- ends ------------------------------------------------------------------------------

    def lost(self, connection: Client, in_flight: set[asyncio.Task[None]]) -> None:
        """A connection is no more, with these requests still on their way."""
        self.connections.pop(connection, None)
        export = connection.export
        if export is None:
            return
        logger.info("%s: gone from %s", connection.peer, export.info.name)
        self.went(connection)
        if isinstance(export, GuestExport) and not self.of(export):
            self.guest_left(export)
        if export.is_guest and in_flight:
            leftovers = self._leftovers.setdefault(export, set())
            for task in in_flight:
                leftovers.add(task)
                task.add_done_callback(leftovers.discard)

    def predecessors(self, export: Export) -> set[asyncio.Task[None]]:
        """Requests to a guest export whose connections have closed before they ended."""
        return set(self._leftovers.get(export, ()))

    async def wait_leftovers(self) -> None:
        """Return when every request of a closed connection has ended."""
        while tasks := {task for tasks in self._leftovers.values() for task in tasks}:
            await asyncio.wait(tasks)
