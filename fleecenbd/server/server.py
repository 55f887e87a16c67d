"""The server: disks, sessions, listening sockets; and how it stops.

Stopping must not be felt by a guest beyond a pause: requests in flight end, images are synced,
and guest connections are *closed* without a reply to what else they sent. ESHUTDOWN is never sent
on a guest export: QEMU hands it to the guest as an I/O error, while it repeats all that a closed
connection left unanswered once it has reconnected. (docs/semantics.md, section 9)
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.session import MakeTemp, Session, SessionOptions, arm
from fleecenbd.nbd.constants import NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN
from fleecenbd.nbd.errors import NegotiationError, shown_name
from fleecenbd.server import client_sockets
from fleecenbd.server.clients import Clients
from fleecenbd.server.connection import Connection
from fleecenbd.server.exports import Export, FleecingExport, GuestExport
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.limits import ServerLimits
from fleecenbd.server.listeners import Listeners

__all__ = ["Server", "ServerLimits"]

logger = logging.getLogger(__name__)

STOP_DEADLINE_S = 10.0
"""Seconds that requests in flight have to end when the server stops."""
CLOSE_DEADLINE_S = 1.0
"""Seconds after that for the last replies to leave, and again for images to be closed."""
FINISHED_MAX = 20
"""Finished sessions that are remembered, for their reason."""
LISTED_MAX = 20
"""Export names in the message that refuses the empty name."""


class Server:
    """Serves disks and sessions over the sockets it is given.

    Must be called on the running loop's thread, whatever loop runs there. ``shared``: connections
    that a guest export admits, 0 for any number. ``default_export``: what the empty name means;
    None: it is refused, with the list of names. ``guest_records``: where it is noted which guests
    are connected, for the next server.
    """

    def __init__(
        self,
        *,
        limits: ServerLimits | None = None,
        default_export: str | None = None,
        shared: int = 1,
        read_only: bool = False,
        guest_records: GuestRecords | None = None,
    ) -> None:
        self.default_export = default_export
        self.disks: dict[str, Disk] = {}
        self.sessions: dict[str, Session] = {}
        self.clients = Clients(limits or ServerLimits(), self._find_export, self._list_exports)
        self._shared = shared
        self._read_only = read_only
        self._exports: dict[str, Export] = {}
        self._beginning: set[str] = set()
        """Names of sessions that are being armed."""
        self._finished: deque[tuple[frozenset[str], str]] = deque(maxlen=FINISHED_MAX)
        """Of each session: the names of its exports, and its result."""
        self._listeners = Listeners()
        self._accepting: set[asyncio.Task[object]] = set()
        self._stopping = False
        self._guest_records = guest_records
        if guest_records is not None and not read_only:
            self.clients.guest_came = self._guest_came
            self.clients.guest_left = self._guest_left

    def _guest_came(self, export: GuestExport, pid: int | None) -> None:
        assert self._guest_records is not None, "it is told only then"
        self._guest_records.came(export.disk.device.name, export.disk.size, pid)

    def _guest_left(self, export: GuestExport) -> None:
        # One that the server leaves may come back to the next server.
        if not self._stopping:
            assert self._guest_records is not None, "it is told only then"
            self._guest_records.left(export.disk.device.name)

    # -- disks and sessions ----------------------------------------------------------------

    def add_disk(self, disk: Disk) -> None:
        """Serve a disk. Raises OSError(EEXIST) if its name is taken."""
        if disk.name in self.disks:
            raise OSError(errno.EEXIST, f"there is a disk called {disk.name} already")
        self.disks[disk.name] = disk
        # Readers of what nobody writes are in nobody's way.
        shared = 0 if self._read_only else self._shared
        self._exports[disk.name] = GuestExport(disk, read_only=self._read_only, shared=shared)

    async def begin(
        self,
        name: str,
        disks: Sequence[str] | None,
        options: SessionOptions,
        make_temp: MakeTemp,
    ) -> Session:
        """Begin a session over the disks of these names (None: all). Raises OSError."""
        if name in self.sessions or name in self._beginning:
            raise OSError(errno.EEXIST, f"there is a session called {name} already")
        names = list(self.disks) if disks is None else list(disks)
        for disk_name in names:
            if disk_name not in self.disks:
                raise OSError(errno.ENOENT, f"there is no disk called {disk_name}")
        self._beginning.add(name)
        try:
            session = await arm(
                name, [self.disks[disk] for disk in names], options, make_temp, clock=time.time
            )
        finally:
            self._beginning.discard(name)
        if self._stopping:
            session.finish(failed=True)
            raise OSError(errno.ESHUTDOWN, f"session {name} cannot begin: the server is stopping")
        self.sessions[name] = session
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(session.armed_at))
        for fleece in session.fleeces:
            export = FleecingExport(
                fleece,
                description=f"{fleece.disk.name} as of {moment}, session {name} {session.id}",
            )
            self._exports[fleece.name] = export
            fleece.state.on_dead.append(partial(self._fleece_died, fleece, export))
        logger.info(
            "session %s %s: begun over %s; guests were held for %.1f ms",
            name,
            session.id,
            ", ".join(names),
            session.pause_s * 1000,
        )
        return session

    def finish(self, name: str, *, failed: bool = False) -> Session:
        """End a session: its exports go, its requests get ESHUTDOWN. Raises OSError(ENOENT)."""
        session = self.sessions.pop(name, None)
        if session is None:
            raise OSError(errno.ENOENT, f"there is no session called {name}")
        session.finish(failed=failed)
        result = "failed" if session.failed else "success"
        names = frozenset(fleece.name for fleece in session.fleeces)
        self._finished.append((names, f"session {name} is finished ({result})"))
        for fleece in session.fleeces:
            export = self._exports.pop(fleece.name)
            # A fleece that had broken told its clients so then; now they lose their export.
            self._end_clients(fleece, export)
        logger.info("session %s %s: finished", name, session.id)
        return session

    def _fleece_died(self, fleece: Fleece, export: FleecingExport) -> None:
        if fleece.finished:
            return  # ``finish`` closes the connections
        logger.error(
            "session of %s broke: %s. Its guest goes on; its backup must be begun anew",
            fleece.name,
            fleece.broken,
        )
        export.info = replace(export.info, description=f"{export.info.description}, broken")
        for connection in self.clients.of(export):
            connection.fail_pending(fleece.state.death())

    def _end_clients(self, fleece: Fleece, export: Export) -> None:
        for connection in self.clients.of(export):
            connection.finish(fleece.state.death())

    # -- exports ---------------------------------------------------------------------------

    def _find_export(self, name: str, backup_only: bool) -> Export:
        if name == "":
            if self.default_export is None:
                raise NegotiationError(NBD_REP_ERR_POLICY, self._no_default(backup_only))
            name = self.default_export
        export = self._exports.get(name)
        if export is None:
            for finished, reason in reversed(self._finished):
                if name in finished:
                    raise NegotiationError(NBD_REP_ERR_UNKNOWN, f"{shown_name(name)}: {reason}")
            raise NegotiationError(
                NBD_REP_ERR_UNKNOWN, f"there is no export called {shown_name(name)}"
            )
        if backup_only and export.is_guest:
            raise NegotiationError(
                NBD_REP_ERR_POLICY,
                f"{shown_name(name)} is a guest's disk; this listener serves backups only",
            )
        return export

    def _list_exports(self, backup_only: bool) -> list[tuple[str, str]]:
        return [
            (name, export.info.description)
            for name, export in self._exports.items()
            if not (backup_only and export.is_guest)
        ]

    def _no_default(self, backup_only: bool) -> str:
        names = [name for name, _ in self._list_exports(backup_only)]
        shown = ", ".join(names[:LISTED_MAX]) + (", …" if len(names) > LISTED_MAX else "")
        return f"name an export: {shown or 'there is none yet'}"

    # -- listening -------------------------------------------------------------------------

    def listen(self, sock: socket.socket, *, backup_only: bool = False) -> None:
        """Accept clients on a bound, listening socket, which is the server's from now on."""
        self._listeners.add(sock, partial(self._arrived, backup_only=backup_only))

    def _arrived(self, sock: socket.socket, *, backup_only: bool) -> None:
        if not self.clients.admit():
            logger.error(
                "a connection was refused: all %d places are taken",
                self.clients.limits.clients_max,
            )
            sock.close()
            return
        connection = self._prepare(sock, backup_only=backup_only)
        if connection is not None:
            task = asyncio.get_running_loop().create_task(
                self._connect(connection, sock), name="accept"
            )
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    def _prepare(self, sock: socket.socket, *, backup_only: bool) -> Connection | None:
        """Set the socket's options, and take the connection's place; None: it failed already."""
        try:
            peer, pid = client_sockets.prepare(sock, self.clients.limits)
        except OSError as error:
            logger.info("a connection failed before it began: %s", error.strerror)
            sock.close()
            return None
        connection = Connection(self.clients, peer, backup_only=backup_only, pid=pid)
        self.clients.add(connection)
        return connection

    async def _connect(self, connection: Connection, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:
            connection.connection_lost(error)
            sock.close()

    async def serve_connected(self, sock: socket.socket, *, backup_only: bool = False) -> None:
        """Serve one client on a connected socket; returns when it has gone."""
        connection = self._prepare(sock, backup_only=backup_only)
        if connection is not None:
            await self._connect(connection, sock)
            await connection.closed()

    # -- stopping --------------------------------------------------------------------------

    async def stop(self, *, deadline_s: float = STOP_DEADLINE_S) -> bool:
        """Stop: take no client and no request, let those in flight end, sync, close.

        Sessions end. Images are closed when their last call has ended. Returns after
        ``deadline_s`` at the latest, plus the time that syncing takes (bounded by the same);
        False if an image could not be synced.
        """
        self._stop_listening()
        connections = list(self.clients.connections)
        # Backups first: a guest must not wait for a session that nobody will read any more.
        for name in list(self.sessions):
            self.finish(name, failed=True)
        drains = [connection.drain() for connection in connections]
        await _within(deadline_s, [*drains, self.clients.wait_leftovers()])
        synced: set[str] = set()
        if not self._read_only:
            await _within(deadline_s, [self._sync(disk, synced) for disk in self.disks.values()])
            for disk in self.disks.values():
                if disk.name not in synced:
                    logger.error(
                        "%s is not synced: what its guest wrote last may be lost with the machine",
                        disk.device.name,
                    )
        for connection in connections:
            connection.close()
        await _within(CLOSE_DEADLINE_S, [connection.closed() for connection in connections])
        self.abort()
        # A hung call keeps its image open; the process's end lets go of it.
        closes = [disk.device.wait_closed() for disk in self.disks.values()]
        if self._guest_records is not None:
            closes.append(self._guest_records.settle())
        await _within(CLOSE_DEADLINE_S, closes)
        return self._read_only or len(synced) == len(self.disks)

    def abort(self) -> None:
        """Stop at once: close every connection and image; calls in flight go on."""
        self._stop_listening()
        for connection in list(self.clients.connections):
            connection.abort()
        for name in list(self.sessions):
            self.finish(name, failed=True)
        for disk in self.disks.values():
            disk.device.close()

    async def _sync(self, disk: Disk, synced: set[str]) -> None:
        try:
            await disk.flush()
            synced.add(disk.name)
        except OSError as error:
            logger.error("%s could not be synced: %s", disk.device.name, error.strerror)

    def _stop_listening(self) -> None:
        self._stopping = True
        self._listeners.close()


async def _within(deadline_s: float, waits: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of these, ``deadline_s`` at most; what is left then is given up.

    Nothing is undone by that: these only wait, and calls on devices go on.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    if not tasks:
        return
    try:
        await asyncio.wait(tasks, timeout=deadline_s)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("stopping: %r", result)
