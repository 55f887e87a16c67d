"""Listening sockets: connections accepted a few at a time, and none while descriptors are short."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

ACCEPT_MAX = 16
"""Connections accepted in one go."""
ACCEPT_PAUSE_S = 0.5
"""Seconds without accepting, after the process or the system ran out of descriptors."""

Arrived = Callable[[socket.socket], None]
"""Called with each connected socket, which is then the callee's."""


class Listeners:
    """Accepts connections, on the loop's thread, until it is closed."""

    def __init__(self) -> None:
        self._sockets: dict[socket.socket, Arrived] = {}
        self._timers: set[asyncio.TimerHandle] = set()

    def add(self, sock: socket.socket, arrived: Arrived) -> None:
        """Accept on a bound, listening socket, which is ours from now on."""
        sock.setblocking(False)
        self._sockets[sock] = arrived
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def close(self) -> None:
        """Accept no more, and close the listening sockets."""
        loop = asyncio.get_running_loop()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())
            sock.close()
        self._sockets.clear()

    def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPT_MAX):
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # EMFILE and the like: the connection stays in the queue, and the loop must not
                # spin on it.
                logger.error("no connection can be accepted: %s", error.strerror)
                loop.remove_reader(listening.fileno())
                self._later(ACCEPT_PAUSE_S, listening)
                return
            self._sockets[listening](sock)
            if listening not in self._sockets:
                return  # the callee has closed us

    def _later(self, delay_s: float, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def resume() -> None:
            self._timers.discard(timer)
            if listening in self._sockets:
                loop.add_reader(listening.fileno(), self._accept, listening)

        timer = loop.call_later(delay_s, resume)
        self._timers.add(timer)
