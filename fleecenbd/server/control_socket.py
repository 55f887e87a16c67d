"""The control socket: connections let in, kept few, and handed to HTTP once somebody needs it.

The modules behind it are imported when the first client comes, in a thread: a server that nobody
controls never pays for them, and no guest waits for them.

A connection that does nothing can lose its place to a new one, the oldest first; one that works
on a call cannot. So whoever opens a thousand keeps nobody out, and takes no more than
``CONNECTIONS_MAX`` descriptors.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fleecenbd.server.hooks import Hooks
from fleecenbd.server.jobs import Jobs
from fleecenbd.server.listeners import Listeners
from fleecenbd.server.places import Places
from fleecenbd.server.server import Server
from fleecenbd.server.sessions import Sessions
from fleecenbd.storage.pool import ThreadPool

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
FIRST_CALL_TIMEOUT_S = 15.0
"""Seconds that a new connection has to ask for something."""
CLOSE_TIMEOUT_S = 2.0
CHANGING = ("PUT", "POST", "DELETE")
"""Methods whose calls are worth a line in the log."""


@dataclass(eq=False)
class _Connection:
    peer: str
    transport: asyncio.BaseTransport | None = None
    calls: int = 0
    """In progress."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    def abort(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.transport is not None:
            self.transport.abort()  # type: ignore[attr-defined]


class ControlSocket:
    """One listening socket, for all calls or (``metrics_only``) for /metrics."""

    def __init__(
        self,
        server: Server,
        sessions: Sessions,
        jobs: Jobs,
        places: Places,
        hooks: Hooks,
        *,
        metrics_only: bool = False,
    ) -> None:
        self._server = server
        self._sessions = sessions
        self._jobs = jobs
        self._places = places
        self._hooks = hooks
        self._metrics_only = metrics_only
        self._listeners = Listeners()
        self._connections: dict[_Connection, None] = {}
        self._arrived: list[tuple[_Connection, socket.socket]] = []
        """Until HTTP is there."""
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._preparing: asyncio.Task[None] | None = None
        self._closed = False

    def listen(self, sock: socket.socket) -> None:
        """Let clients in on a bound, listening socket, which is ours from now on."""
        self._listeners.add(sock, self.arrive)

    @property
    def connections(self) -> int:
        """Connections now."""
        self._forget_closed()
        return len(self._connections)

    # -- arrival ---------------------------------------------------------------------------

    def arrive(self, sock: socket.socket) -> None:
        """A client has connected."""
        sock.setblocking(False)
        self._forget_closed()
        if len(self._connections) >= CONNECTIONS_MAX and not self._drop_idle():
            logger.warning("a control connection was refused: %d are at work", CONNECTIONS_MAX)
            sock.close()
            return
        connection = _Connection(_peer(sock))
        logger.debug("control: %s connected", connection.peer)
        self._connections[connection] = None
        if self._runner is None:
            self._arrived.append((connection, sock))
            if self._preparing is None:
                self._preparing = self._spawn(self._prepare(), "control")
        else:
            self._spawn(self._connect(connection, sock), "control connection")

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _prepare(self) -> None:
        """Import HTTP, in a thread, and connect those who wait for it."""
        pool = ThreadPool("control", "import", size_max=1)
        try:
            application = await pool.run(
                importlib.import_module, "fleecenbd.server.control.application"
            )
            calls = importlib.import_module("fleecenbd.server.control.calls")
            self._runner = await application.make_runner(
                calls.Calls(self._sessions, self._jobs, self._places, self._hooks),
                self._server.events,
                self._call,
                metrics_only=self._metrics_only,
            )
        except Exception as error:
            logger.error("the control socket does not work", exc_info=error)
            self._preparing = None
            for connection, sock in self._arrived:
                self._connections.pop(connection, None)
                sock.close()
            self._arrived.clear()
            return
        finally:
            pool.close()
        arrived, self._arrived = self._arrived, []
        for connection, sock in arrived:
            await self._connect(connection, sock)

    async def _connect(self, connection: _Connection, sock: socket.socket) -> None:
        if connection not in self._connections or self._closed:  # its place was needed
            sock.close()
            return
        assert self._runner is not None, "it was prepared"
        factory = self._runner.server
        assert factory is not None, "the runner is set up"
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(factory, sock)
        except OSError as error:
            logger.info("a control connection failed before it began: %s", error.strerror)
            self._connections.pop(connection, None)
            sock.close()
            return
        connection.transport = transport
        connection.timer = loop.call_later(FIRST_CALL_TIMEOUT_S, self._is_late, connection)

    def _is_late(self, connection: _Connection) -> None:
        connection.timer = None
        if not connection.calls:
            connection.abort()

    def _drop_idle(self) -> bool:
        for connection in self._connections:
            if not connection.calls:
                del self._connections[connection]
                connection.abort()
                return True
        return False

    def _forget_closed(self) -> None:
        gone = [
            connection
            for connection in self._connections
            if connection.transport is not None and connection.transport.is_closing()
        ]
        for connection in gone:
            connection.abort()
            del self._connections[connection]

    # -- calls -----------------------------------------------------------------------------

    def _call(self, transport: object, what: str, status: int) -> None:
        """A call has begun (status 0) or ended."""
        for connection in self._connections:
            if connection.transport is transport:
                break
        else:
            return
        if status == 0:
            connection.calls += 1
            if connection.timer is not None:
                connection.timer.cancel()
                connection.timer = None
            return
        connection.calls -= 1
        level = logging.INFO if what.startswith(CHANGING) else logging.DEBUG
        logger.log(level, "control: %s: %s: %d", connection.peer, what, status)

    # -- end -------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let nobody in any more, and close every connection."""
        self._closed = True
        self._listeners.close()
        for connection, sock in self._arrived:
            self._connections.pop(connection, None)
            sock.close()
        self._arrived.clear()
        if self._runner is not None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._runner.cleanup()
            except TimeoutError:
                logger.warning("control connections are cut off")
        for connection in self._connections:
            connection.abort()
        self._connections.clear()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)


def _peer(sock: socket.socket) -> str:
    """Who it is: process and user of a Unix socket's other end, else its address."""
    try:
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, user, group = struct.unpack("iII", credentials)
            return f"pid {pid}, uid {user}, gid {group}"
        host, port, *_ = sock.getpeername()
        return f"{host}:{port}"
    except OSError:
        return "a client that has gone"
