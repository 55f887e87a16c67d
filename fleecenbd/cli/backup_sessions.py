"""The session of a backup: begun, finished as what it was, and found again after a kill."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from fleecenbd.cli import logs
from fleecenbd.cli.backup_owner import Owner, is_alive, is_backup
from fleecenbd.cli.control_client import ControlClient
from fleecenbd.cli.errors import CommandError

Result = TypeVar("Result")

GOING_LOOKS = 10
GOING_INTERVAL_S = 0.1
"""The server may see a killed client's connections end a moment later than its process did."""

SUCCESS = "success"
FAILED = "failed"


class BackupSession:
    """One name's session on one server, for one run."""

    def __init__(self, client: ControlClient, name: str) -> None:
        self.name = name
        self._client = client
        self._owner: Owner | None = None

    def close(self) -> None:
        """This run ends."""
        if self._owner is not None:
            self._owner.close()

    async def begin(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer. Raises CommandError.

        Cancelled, it waits for the answer all the same, and takes the session back.
        """
        if self._owner is None:
            self._owner = Owner()
        asked = {**body, "owner": self._owner.name}
        call = self._client.call("PUT", "sessions", self.name, body=asked)
        answer: dict[str, Any] = await to_its_end(call, self._take_back)
        return answer

    async def _take_back(self, answer: Any) -> None:
        await self.finish(answer["id"], FAILED)

    async def finish(self, session_id: str, result: str) -> str | None:
        """End the session if it is still there; what it counts as, None: it was gone already.

        Raises CommandError.
        """
        shown = await self._find()
        if shown is None or shown["id"] != session_id:
            return None
        answer = await self._client.call("DELETE", "sessions", self.name, result=result)
        return str(answer["result"])

    async def _find(self) -> dict[str, Any] | None:
        """The session of this name that is not finished."""
        listed = await self._client.call("GET", "sessions")
        for shown in listed["sessions"]:
            if shown["name"] == self.name and shown["state"] != "finished":
                return dict(shown)
        return None

    async def left(self, *, keep: bool) -> dict[str, Any] | None:
        """The session that a run which was killed has left; it is this run's from now on.

        ``keep``: what its jobs have made durable stays, to be gone on with.

        None: there is none. Raises CommandError where another run, or somebody else, has it.
        """
        shown = await self._find()
        if shown is None:
            return None
        owner = shown["owner"]
        if not is_backup(owner):
            raise CommandError(
                f"there is a session called {self.name}, and it is not of fleecenbd backup; "
                f"finish it (fleecenbd session finish {self.name}, and with --failed what it was "
                "for counts as not made), or take another name with --session"
            )
        if not is_alive(owner):
            await self._end_jobs(shown["id"], keep=keep)
        if is_alive(owner) or await self._has_clients(shown):
            raise CommandError(
                f"another backup is at work in session {self.name}; wait for it, or take another "
                "name with --session"
            )
        try:
            self._owner = Owner(owner)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise CommandError(f"another backup goes on with session {self.name}") from None
        return shown

    async def _end_jobs(self, session_id: str, *, keep: bool) -> None:
        """Those that a killed run has started go on without it."""
        listed = await self._client.call("GET", "jobs")
        for job in listed["jobs"]:
            if job["session_id"] == session_id and job["ended_at"] is None:
                await self._client.call("POST", "jobs", job["id"], "cancel", body={"keep": keep})

    async def _has_clients(self, shown: Mapping[str, Any] | None) -> bool:
        """Does somebody read from it, and go on reading?"""
        for _ in range(GOING_LOOKS):
            if shown is None or not any(disk["clients"] for disk in shown["disks"]):
                return False
            await asyncio.sleep(GOING_INTERVAL_S)
            shown = await self._find()
        return True

    def renew(self) -> None:
        """A session that was left has ended: the next one has an owner of its own."""
        self.close()
        self._owner = None


async def to_its_end(call: Awaitable[Result], undo: Any = None) -> Result:
    """The call's result. Cancelled, it waits for the call's end, undoes it, and is cancelled then;
    without ``undo`` the call counts, and being cancelled is forgotten.

    Cancelled once more, it ends at once.
    """
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise
        result = await task
        if undo is not None:
            await undo(result)
            raise
        current = asyncio.current_task()
        assert current is not None, "this is one"
        current.uncancel()
        return result


def tell_warnings(answer: Mapping[str, Any]) -> None:
    """What the server has to say about a session that has begun."""
    for warning in answer["warnings"]:
        logs.report(f"warning: {warning}")
