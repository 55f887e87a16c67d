"""The failed requests of a connection, in the log: clients seldom show the text they are sent."""

from __future__ import annotations

import errno
import logging

from fleecenbd.nbd.transmission import Request
from fleecenbd.nbd.validation import COMMAND_NAMES

logger = logging.getLogger(__name__)

FAILURES_LOGGED = 5
"""Failed requests of one connection that are logged above the level debug."""


class FailureLog:
    """Tells the first failures of one connection, and that there may be more."""

    def __init__(self, peer: str, export: str) -> None:
        self._peer = peer
        self._export = export
        self._count = 0

    def tell(self, request: Request, number: int | None, text: str) -> None:
        """A request failed with an errno, for the reason ``text``."""
        self._count += 1
        quiet = self._count > FAILURES_LOGGED or number == errno.ENOTSUP
        level = logging.DEBUG if quiet else logging.WARNING
        if not logger.isEnabledFor(level):
            return
        command = request[1]
        known = command < len(COMMAND_NAMES)
        logger.log(
            level,
            "%s: %s of %d bytes at %d of %s failed: %s%s",
            self._peer,
            COMMAND_NAMES[command] if known else f"command {command}",
            request[4],
            request[3],
            self._export,
            text,
            " (further ones are not logged)" if self._count == FAILURES_LOGGED else "",
        )
