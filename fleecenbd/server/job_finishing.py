"""Sessions that are finished by the jobs that have read them.

A session with a job that asked for it is finished in the step in which its last running job ends:
as failed if one of those that asked had failed or was cancelled; as success once each of its disks
has a job that is complete. Until then it stays: the jobs of its other disks may not have been
asked for yet, and "success" forgets what has changed on all of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fleecenbd.engine.session import Session
from fleecenbd.server.sessions import Sessions

logger = logging.getLogger(__name__)


@dataclass
class _Results:
    """What the jobs of one session have come to so far."""

    wanted: bool = False
    """One of them asked for its end."""
    failed: bool = False
    complete: set[str] = field(default_factory=set)
    """Disks."""


class Finishing:
    """Of one server."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._results: dict[str, _Results] = {}
        """By the session's id; while it is not finished."""

    def job_starts(self, session: Session, *, finish: bool) -> None:
        """A job of the session starts; ``finish``: it asks for the session's end."""
        results = self._results.setdefault(session.id, _Results())
        results.wanted |= finish

    def job_ends(
        self, session: Session, disk: str, *, complete: bool, finish: bool, is_last: bool
    ) -> str | None:
        """A job has ended; ``is_last``: none of the session's runs any more.

        What the session is finished as: "success" or "failed"; None: it is not.
        """
        results = self._results.get(session.id)
        if results is None:
            return None  # it was finished while the job ran
        if complete:
            results.complete.add(disk)
        elif finish:
            results.failed = True
        if not results.wanted or not is_last:
            return None
        disks = {fleece.disk.name for fleece in session.fleeces}
        if not results.failed and not results.complete >= disks:
            return None
        try:
            return self._sessions.finish(session.name, failed=results.failed).result
        except OSError as error:
            logger.error("%s", error.strerror)
            return None

    def session_ends(self, session: Session, _failed: bool) -> None:
        """The session is finished, whoever asked for it."""
        self._results.pop(session.id, None)
