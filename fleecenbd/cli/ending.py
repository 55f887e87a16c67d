"""Is a session still at work? If so, a success would forget changes that no backup has."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fleecenbd.cli.backup_owner import is_alive, is_backup
from fleecenbd.cli.backup_sessions import GOING_INTERVAL_S, GOING_LOOKS
from fleecenbd.cli.control_client import ControlClient
from fleecenbd.cli.errors import CommandError


async def check_idle(client: ControlClient, name: str) -> None:
    """Raises CommandError where somebody is at work in the session, and goes on for a second."""
    for look in range(GOING_LOOKS):
        if look:
            # The server may see a client's end a moment later than whoever waited for that.
            await asyncio.sleep(GOING_INTERVAL_S)
        shown = await client.call("GET", "sessions", name)
        if shown["state"] != "active":
            return
        at_work = _at_work(shown, await client.call("GET", "jobs"))
        if at_work is None:
            return
    raise CommandError(
        f"session {name} is not finished: {at_work}. Wait for it; or finish it with --failed, and "
        "no change is forgotten; or with --force, if you know that the backup is whole"
    )


def _at_work(shown: Mapping[str, Any], jobs: Mapping[str, Any]) -> str | None:
    for job in jobs["jobs"]:
        if job["session_id"] == shown["id"] and job["ended_at"] is None:
            return f"job {job['id']} backs up {job['disk']} from it"
    if is_backup(shown["owner"]) and is_alive(shown["owner"]):
        return "a fleecenbd backup is at work in it"
    for disk in shown["disks"]:
        if disk["clients"]:
            return f"{disk['export']} is being read by {', '.join(disk['clients'])}"
    return None
