"""What happens, told to whoever listens: sessions, clients, temp images.

A listener that does not keep up loses events, is told how many, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, TypeAlias

Event: TypeAlias = dict[str, Any]
"""``event`` (what), ``time`` (seconds since the epoch), and what it is about."""

SESSION_BEGUN = "session-begun"
SESSION_FINISHED = "session-finished"
SESSION_BROKEN = "session-broken"
CLIENT_CAME = "client-came"
CLIENT_WENT = "client-went"
DISK_ADDED = "disk-added"
DISK_REMOVED = "disk-removed"
DISK_RESIZED = "disk-resized"
DISK_LOST = "disk-lost"
DISK_AWAY = "disk-away"
DISK_BACK = "disk-back"
TEMP_LOW = "temp-low"
TEMP_FULL = "temp-full"
TEMP_THROTTLED = "temp-throttled"
HOOK_FAILED = "hook-failed"
BITMAP_LOST = "bitmap-lost"
JOB_STARTED = "job-started"
JOB_PAUSED = "job-paused"
JOB_RESUMED = "job-resumed"
JOB_ENDED = "job-ended"
EVENTS_LOST = "events-lost"

KINDS = (
    SESSION_BEGUN,
    SESSION_FINISHED,
    SESSION_BROKEN,
    CLIENT_CAME,
    CLIENT_WENT,
    DISK_ADDED,
    DISK_REMOVED,
    DISK_RESIZED,
    DISK_LOST,
    DISK_AWAY,
    DISK_BACK,
    TEMP_LOW,
    TEMP_FULL,
    TEMP_THROTTLED,
    HOOK_FAILED,
    BITMAP_LOST,
    JOB_STARTED,
    JOB_PAUSED,
    JOB_RESUMED,
    JOB_ENDED,
    EVENTS_LOST,
)

WAITING_MAX = 1000
"""Events that wait for one listener."""


class Listener:
    """Events from the moment of ``Events.listen`` on."""

    def __init__(self) -> None:
        self._waiting: deque[Event] = deque()
        self._lost = 0
        self._ended = False
        self._news = asyncio.Event()

    async def next(self) -> Event | None:
        """The next event; None: there will be no more."""
        while not self._waiting:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        event = self._waiting.popleft()
        if self._lost:
            self._waiting.appendleft(event)
            lost, self._lost = self._lost, 0
            return {"event": EVENTS_LOST, "time": time.time(), "count": lost}
        return event

    def put(self, event: Event) -> None:
        """Never waits: the oldest one goes where there are too many."""
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()


class Events:
    """The hub of one server."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._ended = False

    def listen(self) -> Listener:
        """A listener, which gets everything from now on; ``forget`` it in the end."""
        listener = Listener()
        if self._ended:
            listener.end()
        self._listeners.add(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def tell(self, kind: str, **about: Any) -> None:
        """Something has happened. Cheap where nobody listens."""
        assert kind in KINDS, f"docs/control.md lists all kinds, and not {kind}"
        if self._listeners:
            event = {"event": kind, "time": time.time(), **about}
            for listener in self._listeners:
                listener.put(event)

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        for listener in self._listeners:
            listener.end()
