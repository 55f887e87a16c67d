"""Watches how full temp images are, and says so while there is time to do something.

Looks once a second: nothing is added to what a guest waits for, and how much room their file
systems have left is asked in the temp images' own threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.room import LOW
from fleecenbd.server.events import TEMP_FULL, TEMP_LOW, TEMP_THROTTLED
from fleecenbd.server.server import Server

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
ENOUGH = 0.7
"""Share of the limit in use below which it is not low any more, and may be told again."""
NOT_FULL = 0.9
"""The same of what was full: under break-guest-write guests may try, and fail, all the time."""


class TempWatch:
    """The temp images of one server that have a limit, or whose file systems have a reserve."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._low: WeakKeyDictionary[Fleece, bool] = WeakKeyDictionary()
        self._hits: WeakKeyDictionary[Fleece, int] = WeakKeyDictionary()
        self._full: WeakKeyDictionary[Fleece, bool] = WeakKeyDictionary()
        self._throttled: WeakKeyDictionary[Fleece, bool] = WeakKeyDictionary()
        self._looks: dict[Fleece, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on, until ``stop``."""
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._look_again)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self) -> None:
        self.start()  # first: what fails below is told, and looked at again
        self.look()

    def look(self) -> None:
        """Tell what has changed since the last look."""
        for session in self._server.sessions.values():
            for fleece in session.fleeces:
                self._look_at(session.name, fleece)
                state = fleece.state
                if state.room.is_asked and not state.dead and fleece not in self._looks:
                    self._ask(fleece)

    def _ask(self, fleece: Fleece) -> None:
        """For the next look. A file system that hangs is not asked again meanwhile."""
        look = asyncio.get_running_loop().create_task(fleece.state.room.look())
        self._looks[fleece] = look
        look.add_done_callback(lambda _: self._looks.pop(fleece))

    def _look_at(self, session: str, fleece: Fleece) -> None:
        state = fleece.state
        clusters = state.room.limit()
        if clusters is None:
            return
        used, limit = fleece.stats.temp_clusters << state.shift, clusters << state.shift
        about = {"session": session, "disk": fleece.disk.name, "used": used, "limit": limit}
        hits, before = fleece.stats.limit_hits, self._hits.get(fleece, 0)
        # Without a hit: what is held was more than a new limit, say.
        is_full = hits > before or (not state.dead and 0 < limit <= used)
        if is_full:
            self._hits[fleece] = hits
            self._low[fleece] = True
            self._tell_full(fleece, about)
        elif state.dead:
            return
        elif used and used >= LOW * limit and not self._low.get(fleece, False):
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
        if not is_full and used < NOT_FULL * limit:
            self._full[fleece] = False
        if state.throttles and not state.dead:
            self._look_at_delay(fleece, about)

    def _tell_full(self, fleece: Fleece, about: Mapping[str, object]) -> None:
        if not self._full.get(fleece, False):
            self._full[fleece] = True
            logger.warning(
                "the temp image of %s is full: its limit is %d", fleece.name, about["limit"]
            )
            self._server.events.tell(TEMP_FULL, **about)

    def _look_at_delay(self, fleece: Fleece, about: Mapping[str, object]) -> None:
        delay_s = fleece.state.room.delay_s()
        is_throttled = delay_s > 0
        if is_throttled == self._throttled.get(fleece, False):
            return
        self._throttled[fleece] = is_throttled
        if is_throttled:
            logger.warning(
                "%s: guest writes that copy old data wait %.0f ms now, and longer as its temp "
                "image fills up: its backup should hurry",
                fleece.name,
                delay_s * 1000,
            )
        else:
            logger.info("%s: guest writes do not wait for room any more", fleece.name)
        self._server.events.tell(TEMP_THROTTLED, **about, delay=delay_s)
