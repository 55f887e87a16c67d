"""Watches how full temp images are, and says so while there is time to do something.

Looks once a second while there is a session: nothing is added to what a guest waits for.
"""

from __future__ import annotations

import asyncio
import logging
from weakref import WeakKeyDictionary

from fleecenbd.engine.fleece import Fleece
from fleecenbd.server.events import TEMP_FULL, TEMP_LOW
from fleecenbd.server.server import Server

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
LOW = 0.8
"""Share of the limit in use from which on it is low."""
ENOUGH = 0.7
"""Below this it is not low any more, and may be told again."""


class TempWatch:
    """The temp images of one server that have a limit."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._low: WeakKeyDictionary[Fleece, bool] = WeakKeyDictionary()
        self._hits: WeakKeyDictionary[Fleece, int] = WeakKeyDictionary()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A session has begun."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._look_again)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self) -> None:
        self._timer = None
        if self._server.sessions:
            self.look()
            self.start()

    def look(self) -> None:
        """Tell what has changed since the last look."""
        for session in self._server.sessions.values():
            for fleece in session.fleeces:
                limit = fleece.state.temp_limit
                if limit is not None:
                    self._look_at(session.name, fleece, limit)

    def _look_at(self, session: str, fleece: Fleece, limit: int) -> None:
        used = fleece.stats.temp_clusters << fleece.state.shift
        about = {"session": session, "disk": fleece.disk.name, "used": used, "limit": limit}
        hits = fleece.stats.limit_hits
        if hits > self._hits.get(fleece, 0):
            self._hits[fleece] = hits
            self._low[fleece] = True
            logger.warning("the temp image of %s is full: its limit is %d", fleece.name, limit)
            self._server.events.tell(TEMP_FULL, **about)
        elif used >= LOW * limit and not self._low.get(fleece, False):
            self._low[fleece] = True
            logger.warning(
                "the temp image of %s holds %d of %d bytes: its backup should release, or end",
                fleece.name,
                used,
                limit,
            )
            self._server.events.tell(TEMP_LOW, **about)
        elif used < ENOUGH * limit:
            self._low[fleece] = False
