"""The freeze and thaw commands of one session's arming (engine.session.Guests).

    temp images and bitmaps made ▶ freeze ▶ guests held, session armed, guests go on ▶ thaw

So a guest's file systems are at rest for as long as the moment takes, and the freeze command: not
for what has to be made, nor for what has to be cleaned up, on a disk that may hang.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fleecenbd.server.asks import Ask
from fleecenbd.server.events import HOOK_FAILED, Events
from fleecenbd.server.hooks import run_hook

logger = logging.getLogger(__name__)


class GuestHooks:
    """Freezes and thaws for one session."""

    def __init__(self, events: Events, session: str, disks: Sequence[str], ask: Ask) -> None:
        self._events = events
        self._session = session
        self._disks = " ".join(disks)
        self._ask = ask
        self._thawing: asyncio.Task[None] | None = None

    async def freeze(self) -> None:
        """Run the freeze command, if there is one. Raises OSError."""
        if self._ask.freeze is not None:
            await self._run("freeze", self._ask.freeze)

    def thaw(self) -> None:
        """Start the thaw command, if there is one; ``thawed`` waits for it."""
        if self._ask.thaw is not None:
            self._thawing = asyncio.get_running_loop().create_task(
                self._run("thaw", self._ask.thaw), name=f"thaw for {self._session}"
            )

    async def thawed(self) -> list[str]:
        """Return once the thaw command has ended, if it was started: the warnings.

        Not to be cancelled: a guest that stays frozen is worse than a wait.
        """
        if self._thawing is None:
            return []
        cancelled: asyncio.CancelledError | None = None
        while not self._thawing.done():
            try:
                await asyncio.wait({self._thawing})
            except asyncio.CancelledError as error:
                cancelled = error
        failure = self._thawing.exception()
        warnings = []
        if failure is not None:
            text = failure.strerror if isinstance(failure, OSError) else repr(failure)
            logger.error("%s; the guest may still be frozen", text)
            warnings = [f"{text}; the guest may still be frozen"]
        if cancelled is not None:
            raise cancelled
        return warnings

    async def _run(self, which: str, command: str) -> None:
        environment = {
            "FLEECENBD_HOOK": which,
            "FLEECENBD_SESSION": self._session,
            "FLEECENBD_DISKS": self._disks,
        }
        what = f"session {self._session}: the {which} command"
        try:
            await run_hook(
                what, command, timeout_s=self._ask.hook_timeout_s, environment=environment
            )
        except OSError as error:
            about = {"session": self._session, "disks": self._disks.split()}
            self._events.tell(HOOK_FAILED, **about, hook=which, reason=error.strerror)
            raise
