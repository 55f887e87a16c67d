"""The server's end of the control socket: where it is, and what it needs of the command line."""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from fleecenbd.cli.endpoints import PRIVATE, Endpoint
from fleecenbd.cli.errors import CommandError, reason
from fleecenbd.cli.handed import Handed
from fleecenbd.cli.images import check_all_different, open_disks, open_other
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.places import default_control
from fleecenbd.cli.temp_directory import TempDirectory
from fleecenbd.cli.values import DiskSpec, parse_disk
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import MakeTemp
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.listeners import Listeners
from fleecenbd.server.server import Server
from fleecenbd.server.sockets import listen_tcp, listen_unix
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage.pool import ThreadPool

if TYPE_CHECKING:
    from fleecenbd.server.control_socket import ControlSocket
    from fleecenbd.server.jobs import Jobs
    from fleecenbd.server.sessions import Sessions

logger = logging.getLogger(__name__)


EARLY_MAX = 64
"""Clients that may wait for the imports."""


class ServerPlaces:
    """Where a server's images, temp images and clients are (server.sessions.Places)."""

    def __init__(
        self,
        server: Server,
        options: ServeOptions,
        endpoints: Sequence[Endpoint],
        records: GuestRecords | None,
    ) -> None:
        self._server = server
        self._options = options
        self._endpoints = endpoints
        self._records = records
        self.temp = options.temp
        self.temp_reserve = options.temp_reserve
        self._pool = ThreadPool("images", "disks to come", size_max=4)

    def make_temp(self, session: str, place: TempPlace) -> MakeTemp:
        """Temp images in the state directory, or where the place says."""
        if self._server.store is not None:
            return self._server.store.temps.maker(session, place)
        directory = self._options.state_directory
        if directory is None:
            raise OSError(
                errno.EINVAL,
                "the server has no place for temp images; start it with --state-dir",
            )
        return TempDirectory(directory, session, place, self._server.disks.values).make

    async def open_disk(self, name: str, image: str) -> Disk:
        """As the command line does, in a thread: its disk may hang."""
        disks = list(self._server.disks.values())
        try:
            served = [parse_disk(f"{disk.name}={disk.device.name}") for disk in disks]
            spec = self._options.disk_options.of(parse_disk(f"{name}={image}"))
            await self._pool.run(check_all_different, [*served, spec])
            if spec.kind == "nbd":
                await self._pool.run(self._check_elsewhere, spec)
            if spec.kind == "raw":
                disk = await self._pool.run(self._open, spec)
            else:
                disk = await open_other(
                    spec,
                    read_only=self._options.read_only,
                    force_share=self._options.force_share,
                )
        except CommandError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        try:
            await self._pool.run(self._check_record, disk)
        except BaseException:
            disk.device.close()
            raise
        return disk

    def _check_elsewhere(self, spec: DiskSpec) -> None:
        from fleecenbd.storage.nbd_places import leads_to_socket

        if leads_to_socket(spec.path, [endpoint.socket for endpoint in self._endpoints]):
            raise CommandError(f"cannot open disk {spec.name}: {spec.path} is this very server")

    def _open(self, spec: DiskSpec) -> Disk:
        options = self._options
        (disk,) = open_disks([spec], read_only=options.read_only, force_share=options.force_share)
        return disk

    def _check_record(self, disk: Disk) -> None:
        if self._records is not None:
            self._records.check(
                disk.name, disk.device.name, disk.size, writable=not self._options.read_only
            )

    def uris(self, export: str) -> list[str]:
        """Those of the listeners that show it, the Unix socket's first."""
        is_guest = "@" not in export
        return [
            endpoint.uri(export)
            for endpoint in self._endpoints
            if endpoint.is_known and not (is_guest and endpoint.backup_only)
        ]


class Control:
    """The control sockets of a server: opened with the others, at work when guests are served."""

    def __init__(self, options: ServeOptions, handed: Handed) -> None:
        self.path: str | None = None
        """Of the socket that was made, absolute."""
        self._options = options
        self._sockets = list(handed.controls)
        self._metrics: list[socket.socket] = []
        self._server: Server | None = None
        self._places: ServerPlaces | None = None
        self._sessions: Sessions | None = None
        self._jobs: Jobs | None = None
        self._listeners = Listeners()
        self._running: dict[bool, ControlSocket] = {}
        """For all calls, and for metrics only."""
        self._early: list[tuple[socket.socket, bool]] = []
        """Clients that came before it was imported."""
        self._importing: asyncio.Task[None] | None = None

    def open(self, endpoints: Sequence[Endpoint], files: ExitStack) -> None:
        """Bind and listen; ``files`` gets what removes the socket's file. Raises CommandError."""
        options = self._options
        path = options.control
        if path is not None:
            if options.control_is_default:
                unix = options.addresses.unix if options.addresses is not None else ""
                if unix == PRIVATE:
                    path = default_control(endpoints[0].unix or "")
            self._open_unix(path, files)
        if options.metrics is not None:
            try:
                self._metrics = listen_tcp(*options.metrics)
            except OSError as error:
                raise CommandError(f"cannot serve metrics on {reason(error)}") from error

    def _open_unix(self, path: str, files: ExitStack) -> None:
        try:
            listener = listen_unix(path)
        except OSError as error:
            if self._options.control_is_default and error.errno == errno.ENAMETOOLONG:
                logger.warning(
                    "there is no control socket: the path of the Unix socket is too long for one "
                    "beside it; give a shorter one with --control"
                )
                return
            raise CommandError(f"cannot listen for control on {reason(error, path)}") from error
        files.callback(listener.remove)
        self._sockets.append(listener.socket)
        self.path = os.path.abspath(path)

    def start(self, server: Server, places: ServerPlaces) -> None:
        """Let clients in. What is behind is imported when the first one comes, in a thread, so
        that a server nobody controls starts as if it could not be controlled; or now, where a
        session has a time to live."""
        self._server, self._places = server, places
        for sock in self._sockets:
            self._listeners.add(sock, partial(self._arrived, metrics_only=False))
        for sock in self._metrics:
            self._listeners.add(sock, partial(self._arrived, metrics_only=True))
        lives: list[Mapping[str, object]] = [
            {"ttl_s": self._options.ttl_s, "idle_ttl_s": self._options.idle_ttl_s}
        ]
        if server.store is not None:
            lives += server.store.extras.values()
        if any(life.get(name) is not None for life in lives for name in ("ttl_s", "idle_ttl_s")):
            self._make()

    def _arrived(self, sock: socket.socket, *, metrics_only: bool) -> None:
        if self._running:
            self._running[metrics_only].arrive(sock)
        elif len(self._early) >= EARLY_MAX:
            sock.close()
        else:
            self._early.append((sock, metrics_only))
            if self._importing is None:
                self._importing = asyncio.get_running_loop().create_task(
                    self._import(), name="control"
                )

    async def _import(self) -> None:
        pool = ThreadPool("control", "import", size_max=1)
        try:
            for module in ("fleecenbd.server.control_socket", "fleecenbd.server.views"):
                await pool.run(importlib.import_module, module)
            self._make()
        except Exception as error:
            logger.error("the control socket does not work", exc_info=error)
            for sock, _ in self._early:
                sock.close()
            self._early.clear()
            self._importing = None
            return
        finally:
            pool.close()
        early, self._early = self._early, []
        for sock, metrics_only in early:
            self._running[metrics_only].arrive(sock)

    def _make(self) -> None:
        from fleecenbd.server.asks import Ask, ask_of
        from fleecenbd.server.control_socket import ControlSocket
        from fleecenbd.server.jobs import Jobs
        from fleecenbd.server.sessions import Sessions

        server, places, options = self._server, self._places, self._options
        assert server is not None, "it was started"
        assert places is not None, "it was started"
        sessions = self._sessions = Sessions(server, places)
        jobs = self._jobs = Jobs(server, sessions, places)
        # What --begin asked for. The hooks are for guests that are connected: not for it.
        begun = Ask(
            options=options.session_options,
            temp=options.temp,
            ttl_s=options.ttl_s,
            idle_ttl_s=options.idle_ttl_s,
        )
        for session in server.sessions.values():
            extra = server.store.extras.get(session.name) if server.store is not None else None
            sessions.adopt(session, begun if extra is None else ask_of(session, extra))
        for metrics_only in (False, True):
            self._running[metrics_only] = ControlSocket(
                server, sessions, jobs, places, options.hooks, metrics_only=metrics_only
            )

    def tell(self) -> None:
        """Where it is, in the log."""
        if self.path is not None:
            logger.info("control socket: %s", self.path)
        for sock in self._metrics:
            logger.info("metrics: http://%s:%d/metrics", *sock.getsockname()[:2])

    async def close(self) -> None:
        """Begin no more sessions, thaw what is frozen, end jobs, and let nobody in any more."""
        self._listeners.close()
        for sock in (*self._sockets, *self._metrics):
            sock.close()
        for sock, _ in self._early:
            sock.close()
        if self._importing is not None and not self._importing.done():
            self._importing.cancel()
        if self._sessions is not None and self._jobs is not None:
            # At the same time: a guest that is frozen waits for no job, and no job for a hook.
            await asyncio.gather(self._sessions.close(), self._jobs.close())
        for running in self._running.values():
            await running.close()
