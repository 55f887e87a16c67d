"""The server: disks, sessions, listening sockets."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.session import Guests, MakeTemp, Session, SessionOptions, arm
from fleecenbd.engine.store import MEMORY
from fleecenbd.nbd.errors import shown_name
from fleecenbd.server import client_sockets, events
from fleecenbd.server.catalog import Exports
from fleecenbd.server.clients import Client, Clients
from fleecenbd.server.connection import Connection
from fleecenbd.server.ending import STOP_DEADLINE_S, stop_server
from fleecenbd.server.exports import RELEASES_READS, Export, FleecingExport, GuestExport
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.limits import ServerLimits
from fleecenbd.server.listeners import Listeners
from fleecenbd.server.polling import Poll, Turns, polling_pays

if TYPE_CHECKING:
    from fleecenbd.server.state.store import FileStore

__all__ = ["Server", "ServerLimits"]

logger = logging.getLogger(__name__)


class Server:
    """Serves disks and sessions over the sockets it is given.

    Must be called on the running loop's thread, whatever loop runs there. ``shared``: connections
    that a guest export admits, 0 for any number. ``default_export``: what the empty name means;
    None: it is refused, with the list of names. ``guest_records``: where it is noted which guests
    are connected, for the next server. ``store``: where bitmaps and sessions last; None: they end
    with the server, as they do with ``end_sessions``.
    """

    def __init__(
        self,
        *,
        limits: ServerLimits | None = None,
        default_export: str | None = None,
        shared: int = 1,
        read_only: bool = False,
        guest_records: GuestRecords | None = None,
        store: FileStore | None = None,
        end_sessions: bool = False,
    ) -> None:
        self.disks: dict[str, Disk] = {}
        self.sessions: dict[str, Session] = {}
        self.exports = Exports(default_export)
        self.clients = Clients(limits or ServerLimits(), self.exports.find, self.exports.listed)
        self.store = store
        self.end_sessions = end_sessions
        self._shared = shared
        self.read_only = read_only
        self._beginning: dict[str, list[str]] = {}
        """Sessions that are being armed, and their disks."""
        self.events = events.Events()
        self.finishing: list[Callable[[Session, bool], None]] = []
        """Called with each session that ends, and whether it failed, while all is there still."""
        self._listeners = Listeners()
        self._turns = Turns()
        self._polls = self.clients.limits.poll_s > 0 and polling_pays()
        self._accepting: set[asyncio.Task[object]] = set()
        self._freeing: set[asyncio.Task[None]] = set()
        self.stopping = False
        self._guest_records = guest_records
        self.clients.came = partial(self._tell_client, events.CLIENT_CAME)
        self.clients.went = partial(self._tell_client, events.CLIENT_WENT)
        if guest_records is not None and not read_only:
            self.clients.guest_came = self._guest_came
            self.clients.guest_left = self._guest_left

    def _tell_client(self, kind: str, client: Client) -> None:
        export = client.export
        if export is not None:
            self.events.tell(kind, export=export.info.name, client=client.peer)

    def _guest_came(self, export: GuestExport, pid: int | None) -> None:
        assert self._guest_records is not None, "it is told only then"
        self._guest_records.came(export.disk.device.name, export.disk.size, pid)

    def _guest_left(self, export: GuestExport) -> None:
        # One that the server leaves may come back to the next server.
        if not self.stopping:
            assert self._guest_records is not None, "it is told only then"
            self._guest_records.left(export.disk.device.name)

    # -- disks and sessions ----------------------------------------------------------------

    def add_disk(self, disk: Disk) -> None:
        """Serve a disk. Raises OSError: EEXIST if its name is taken."""
        if disk.name in self.disks:
            raise OSError(errno.EEXIST, f"there is a disk called {disk.name} already")
        if self.stopping:
            raise OSError(errno.ESHUTDOWN, f"disk {disk.name} cannot come: the server is stopping")
        if self.store is not None:
            self.store.add_disk(disk)
        self.disks[disk.name] = disk
        # Readers of what nobody writes are in nobody's way.
        shared = 0 if self.read_only else self._shared
        self.exports[disk.name] = GuestExport(disk, read_only=self.read_only, shared=shared)
        self.events.tell(events.DISK_ADDED, disk=disk.name, image=disk.device.name)

    async def remove_disk(self, name: str) -> None:
        """Serve a disk no more; sync and close its image.

        Raises OSError: ENOENT; EBUSY while a client or a session needs it, and then nothing has
        changed; any other where it is served no more, but was not synced.
        """
        disk, export = self.disk(name), self.exports[name]
        for session, disks in [*self._disks_of_sessions().items(), *self._beginning.items()]:
            if name in disks:
                raise OSError(
                    errno.EBUSY, f"disk {name} is in session {session}; finish that first"
                )
        for client in self.clients_of(name):
            if not client.peer_has_gone():
                raise OSError(
                    errno.EBUSY, f"disk {name} is in use by {client.peer}; end that guest first"
                )
            client.drop("its client has gone")
        leftovers = self.clients.predecessors(export)
        del self.disks[name], self.exports[name]
        if self.store is not None:
            self.store.remove_disk(name)
        self.events.tell(events.DISK_REMOVED, disk=name)
        try:
            async with asyncio.timeout(STOP_DEADLINE_S):
                if leftovers:
                    await asyncio.wait(leftovers)
                if not self.read_only and disk.lost is None:
                    await disk.flush()
                disk.device.close()
                await disk.device.wait_closed()
        except TimeoutError:
            raise OSError(
                errno.EIO, "served no more, but its image hangs, and is not synced or closed", name
            ) from None
        finally:
            disk.device.close()
        logger.info("disk %s: removed (%s)", name, "lost" if disk.lost else "synced, closed")

    def disk(self, name: str) -> Disk:
        """The disk of this name. Raises OSError(ENOENT)."""
        disk = self.disks.get(name)
        if disk is None:
            raise OSError(errno.ENOENT, f"there is no disk called {shown_name(name)}")
        return disk

    def session(self, name: str) -> Session:
        """The session of this name that is not finished. Raises OSError(ENOENT)."""
        session = self.sessions.get(name)
        if session is None:
            raise OSError(errno.ENOENT, f"there is no session called {shown_name(name)}")
        return session

    def clients_of(self, export: str) -> list[Client]:
        """Who is connected to the export of this name, oldest first."""
        found = self.exports.get(export)
        return [] if found is None else self.clients.of(found)

    def _disks_of_sessions(self) -> dict[str, list[str]]:
        return {
            name: [fleece.disk.name for fleece in session.fleeces]
            for name, session in self.sessions.items()
        }

    async def begin(
        self,
        name: str,
        disks: Sequence[str] | None,
        options: SessionOptions,
        make_temp: MakeTemp,
        *,
        bitmap: BitmapRequest | None = None,
        owner: str | None = None,
        guests: Guests | None = None,
    ) -> Session:
        """Begin a session over the disks of these names (None: all). Raises OSError.

        ``make_temp``: who makes the temp images: the store, where there is one. ``bitmap``,
        ``owner``, ``guests``: as ``arm`` takes them.
        """
        if name in self.sessions or name in self._beginning:
            raise OSError(errno.EEXIST, f"there is a session called {name} already")
        names = list(self.disks) if disks is None else list(disks)
        if not names:
            raise OSError(errno.EINVAL, f"session {name} would be over no disk; name one")
        if len(set(names)) < len(names):
            raise OSError(errno.EINVAL, f"session {name}: a disk is named twice; name it once")
        chosen = [self.disk(disk) for disk in names]
        self._beginning[name] = names
        try:
            session = await arm(
                name,
                chosen,
                options,
                make_temp,
                clock=time.time,
                bitmap=bitmap,
                store=MEMORY if self.store is None else self.store,
                owner=owner,
                guests=guests,
            )
        finally:
            del self._beginning[name]
        if self.stopping:
            self._finish(session, failed=True)
            raise OSError(errno.ESHUTDOWN, f"session {name} cannot begin: the server is stopping")
        self._install(session)
        logger.info(
            "session %s %s: begun over %s; guests were held for %.1f ms",
            name,
            session.id,
            ", ".join(names),
            session.pause_s * 1000,
        )
        self.events.tell(events.SESSION_BEGUN, session=name, id=session.id, disks=names)
        return session

    def _install(self, session: Session) -> None:
        """Offer the fleecing exports of a session."""
        self.sessions[session.name] = session
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(session.armed_at))
        for fleece in session.fleeces:
            text = f"{fleece.disk.name} as of {moment}, session {session.name} {session.id}"
            if session.options.read_once:
                text += RELEASES_READS
            export = FleecingExport(
                fleece,
                description=text if fleece.broken is None else f"{text}, broken",
                releases_reads=session.options.read_once,
            )
            self.exports[fleece.name] = export
            fleece.state.on_dead.append(partial(self._fleece_died, fleece, export))

    def use(self, store: FileStore) -> None:
        """From now on bitmaps and sessions last. Before the first client is let in."""
        self.store = store
        for disk in self.disks.values():
            store.add_disk(disk)

    def adopt(self, session: Session) -> None:
        """A session of the last server goes on. Before the first client is let in."""
        self._install(session)
        if session.state == "active":
            disks = ", ".join(fleece.disk.name for fleece in session.fleeces)
            logger.info("session %s %s: goes on over %s", session.name, session.id, disks)

    def _finish(self, session: Session, *, failed: bool) -> None:
        if self.store is not None:
            self.store.before_end(session, failed=failed)
        session.finish(failed=failed)
        if self.store is not None:
            self.store.end(session)

    def finish(self, name: str, *, failed: bool = False) -> Session:
        """End a session: its exports go, its requests get ESHUTDOWN. Raises OSError(ENOENT)."""
        session = self.session(name)
        for call in self.finishing:
            call(session, failed or session.state == "broken")
        del self.sessions[name]
        self._finish(session, failed=failed)
        result = "failed" if session.failed else "success"
        names = [fleece.name for fleece in session.fleeces]
        self.exports.session_is_gone(names, f"session {name} is finished ({result})")
        for fleece in session.fleeces:
            export = self.exports.pop(fleece.name)
            # A fleece that had broken told its clients so then; now they lose their export.
            self._end_clients(fleece, export)
        logger.info("session %s %s: finished (%s)", name, session.id, result)
        about = {"id": session.id, "disks": [fleece.disk.name for fleece in session.fleeces]}
        self.events.tell(events.SESSION_FINISHED, session=name, **about, result=result)
        return session

    def _fleece_died(self, fleece: Fleece, export: FleecingExport) -> None:
        if fleece.finished:
            return  # ``finish`` closes the connections
        logger.error(
            "session of %s broke: %s. Its guest goes on; its backup must be begun anew",
            fleece.name,
            fleece.broken,
        )
        disk, _, session = fleece.name.partition("@")
        self.events.tell(events.SESSION_BROKEN, session=session, disk=disk, reason=fleece.broken)
        export.info = replace(export.info, description=f"{export.info.description}, broken")
        for connection in self.clients.of(export):
            connection.fail_pending(fleece.state.death())
        task = asyncio.get_running_loop().create_task(fleece.wait_freed())
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    def _end_clients(self, fleece: Fleece, export: Export) -> None:
        for connection in self.clients.of(export):
            connection.finish(fleece.state.death())

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
        if self._polls:
            connection.poll = Poll(sock, self._turns, self.clients.limits.poll_s)
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
        """Stop: take no client and no request, let those in flight end, sync, save, close.

        Sessions stay where there is a store to keep them, unless ``end_sessions``. Images are
        closed when their last call has ended. Returns after ``deadline_s`` at the latest, plus the
        time that syncing and saving take (each bounded by the same); False if an image could not
        be synced.
        """
        return await stop_server(self, deadline_s=deadline_s)

    def abort(self) -> None:
        """Stop at once: close every connection and image; calls in flight go on."""
        self.stop_listening()
        for connection in list(self.clients.connections):
            connection.abort()
        if self.store is None:
            self.finish_all()
        else:
            self.store.close()
        for disk in self.disks.values():
            disk.device.close()

    def finish_all(self) -> None:
        """The server ends, and every session with it."""
        for name in list(self.sessions):
            self.finish(name, failed=True)

    def stop_listening(self) -> None:
        """Let nobody in any more, and begin nothing."""
        self.stopping = True
        self._listeners.close()
        self.events.end()

    async def records_settled(self) -> None:
        """Return when it is noted which guests are connected."""
        if self._guest_records is not None:
            await self._guest_records.settle()
