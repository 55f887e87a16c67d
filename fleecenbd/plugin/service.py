"""The life of the engine inside nbdkit.

    get_ready    images are opened and locked, temp images made, the session armed: whatever can
                 fail does so while the user's terminal is there. No thread, no loop is left.
    after_fork   the loop's thread starts, for threads do not outlive the fork
    ...          nbdkit serves
    cleanup      no callback will come any more: the session ends, images are synced, locks are
                 let go, the thread ends

Between get_ready and after_fork no guest can write to the disks, so that the session holds what
it would hold had it been armed last. (Who shares them by force-share is never seen by a session.)
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from fleecenbd.cli import logs
from fleecenbd.cli.errors import CommandError, reason
from fleecenbd.cli.images import open_disks
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.process import keep_buffers_on_the_heap
from fleecenbd.cli.runner import guest_records
from fleecenbd.cli.temp_directory import TempDirectory
from fleecenbd.engine.disk import Disk
from fleecenbd.plugin.client import PluginClient
from fleecenbd.plugin.words import Log
from fleecenbd.server.exports import GuestExport
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.server import Server
from fleecenbd.server.size_watch import SizeWatch
from fleecenbd.server.temp_watch import TempWatch
from fleecenbd.storage.device import Device

logger = logging.getLogger(__name__)

THREADS_TIMEOUT_S = 2.0
"""Seconds that devices' threads have to end at cleanup."""
LEFT_DELAY_S = 5.0
"""Seconds after which a guest's going is believed: when nbdkit stops, guests go first."""

Result = TypeVar("Result")


class Service:
    """Disks and perhaps a session, for nbdkit's threads."""

    def __init__(self, options: ServeOptions, log: Log) -> None:
        self._options = options
        self._log = log
        self._server: Server | None = None
        self._records: GuestRecords | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._library = ctypes.CDLL(None)
        self._library.nbdkit_peer_pid.restype = ctypes.c_int64

    # -- nbdkit's main thread --------------------------------------------------------------

    def get_ready(self) -> None:
        """Open, check, lock and arm. Raises CommandError."""
        options = self._options
        disks = open_disks(
            options.disks, read_only=options.read_only, force_share=options.force_share
        )
        self._records = guest_records(options, disks)
        self._server = Server(
            default_export=options.empty_name,
            read_only=options.read_only,
            guest_records=self._records,
        )
        for disk in disks:
            self._server.add_disk(disk)
        if options.session is not None:
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(self._begin(self._server, options.session))
            finally:
                loop.close()

    async def _begin(self, server: Server, session: str) -> None:
        directory = self._options.state_directory
        assert directory is not None, "a session needs a state directory"
        temp = TempDirectory(directory, session)

        async def make(disk: Disk, cluster_size: int, session_id: str) -> Device:
            return temp.create(disk.name, disk.size, cluster_size)

        try:
            await server.begin(session, None, self._options.session_options, make)
        except OSError as error:
            raise CommandError(f"cannot begin session {session}: {reason(error)}") from error

    def after_fork(self) -> None:
        """Start the thread that the engine lives in."""
        keep_buffers_on_the_heap()
        self._log.start()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(logs.loop_exception)
        self._believe_guests_later(self._loop)
        self._watches = (SizeWatch(self._running), TempWatch(self._running))
        for watch in self._watches:
            self._loop.call_soon(watch.start)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleecenbd")
        self._thread.start()

    def _believe_guests_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget a guest that has left, but not one that nbdkit has left, on its way down."""
        clients = self._running.clients
        forget = clients.guest_left

        def forget_now(export: GuestExport) -> None:
            if not clients.of(export):
                forget(export)

        def forget_later(export: GuestExport) -> None:
            loop.call_later(LEFT_DELAY_S, forget_now, export)

        clients.guest_left = forget_later

    def cleanup(self) -> None:
        """Stop: nbdkit lets nobody call us any more. May end the process, with status 1."""
        loop, thread = self._loop, self._thread
        assert loop is not None, "nbdkit calls this after after_fork only"
        assert thread is not None, "nbdkit calls this after after_fork only"
        for watch in self._watches:
            loop.call_soon_threadsafe(watch.stop)
        stopped = asyncio.run_coroutine_threadsafe(self._running.stop(), loop).result()
        if self._records is not None:
            self._records.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        self._log.stop()
        hanging = _join_others(THREADS_TIMEOUT_S)
        if hanging:
            logger.error("not waiting for calls that hang: %s", ", ".join(hanging))
        if hanging or not stopped:
            # nbdkit asks nobody how it went. And a thread that hangs would outlive the
            # interpreter, whose code nbdkit unloads.
            os._exit(1)

    # -- nbdkit's other threads ------------------------------------------------------------

    @property
    def _running(self) -> Server:
        assert self._server is not None, "nbdkit calls get_ready first"
        return self._server

    def default_export(self) -> str:
        """The export that the empty name means; "": none."""
        return self._running.exports.default or ""

    def list_exports(self) -> Sequence[tuple[str, str]]:
        """(name, description) of every export."""
        return self._in_the_loop(partial(self._running.clients.list_exports, False))

    def open(self, name: str) -> PluginClient:
        """A client at the export of this name. Raises NegotiationError."""
        loop = self._loop
        assert loop is not None, "nbdkit lets clients in after after_fork"
        peer = int(self._library.nbdkit_peer_pid())
        make = partial(PluginClient, self._running.clients, loop, pid=peer if peer > 0 else None)
        client = self._in_the_loop(make)
        client.open(name)
        return client

    def _in_the_loop(self, call: Callable[[], Result]) -> Result:
        answer: Future[Result] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        assert self._loop is not None, "nbdkit lets clients in after after_fork"
        self._loop.call_soon_threadsafe(run)
        return answer.result()


def _join_others(timeout_s: float) -> list[str]:
    """Wait for the threads that Python has started; the names of those that do not end."""
    end = time.monotonic() + timeout_s
    others = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread()
        and not isinstance(thread, threading._DummyThread)
    ]
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    return [thread.name for thread in others if thread.is_alive()]
