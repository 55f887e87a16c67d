"""A job looked at until it has ended: its state becomes the events of a pull, for the same bar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fleecenbd.client import events
from fleecenbd.client.events import Event

if TYPE_CHECKING:
    from fleecenbd.cli.control_client import ControlClient

INTERVAL_S = 0.5
"""Seconds between two looks."""


async def watch(client: ControlClient, job_id: str, tell: Callable[[Event], None]) -> Any:
    """The job once it has ended. Raises CommandError where the server has gone."""
    told = _Told(tell)
    while True:
        job = await client.call("GET", "jobs", job_id)
        told.look(job)
        if job["ended_at"] is not None:
            return job
        await asyncio.sleep(INTERVAL_S)


def outcome(job: Mapping[str, Any]) -> str | None:
    """Why a job that has ended is none to rely on; None: it is complete."""
    if job["state"] == "complete":
        return None
    text = f"job {job['id']} {'was' if job['state'] == 'cancelled' else 'has'} {job['state']}"
    if job["error"] not in (None, job["state"]):
        text += f": {job['error']}"
    if job["kept"] is not None and job["result"] is None:
        text += f"; {job['kept']} keeps what is durable, for --resume"
    return text


class _Told:
    """What has been told of a job so far."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._has_started = False
        self._note: str | None = None

    def look(self, job: Mapping[str, Any]) -> None:
        """Tell what is new."""
        progress = job["progress"]
        if progress is not None and not self._has_started:
            self._has_started = True
            self._tell(_start(job, progress))
        if job["note"] not in (None, self._note):
            self._note = job["note"]
            self._tell(events.Note(job["note"]))
        if progress is not None:
            self._tell(_progress(job, progress))
        if job["state"] == "complete":
            self._tell(done_of(job))
        elif job["ended_at"] is not None:
            self._tell(events.Failed(job["error"] or job["state"], job["kept"]))


def _start(job: Mapping[str, Any], progress: Mapping[str, Any]) -> events.Start:
    return events.Start(
        source=f"{job['disk']}@{job['session']}",
        target=job["target"],
        session_id=job["session_id"],
        size=progress["size"],
        to_copy=progress["to_copy"],
        resumed=progress["resumed"],
    )


def _progress(job: Mapping[str, Any], progress: Mapping[str, Any]) -> events.Progress:
    return events.Progress(
        durable=progress["durable"],
        read=progress["read"],
        to_copy=progress["to_copy"],
        released=progress["released"],
        rate=progress["speed"],
        eta_s=progress["eta"],
        temp_bytes=progress["temp"],
        elapsed_s=progress["elapsed"],
        paused=job["state"] == "paused",
    )


def done_of(job: Mapping[str, Any]) -> events.Done:
    """What a job has come to that is complete."""
    checksum, progress = job["checksum"], job["progress"]
    return events.Done(
        durable=0 if progress is None else progress["durable"],
        released=0 if progress is None else progress["released"],
        read=0 if progress is None else progress["read"],
        elapsed_s=0.0 if progress is None else progress["elapsed"],
        checksum=None if checksum is None else events.Checksum(**checksum),
        verified=job["verified"],
    )
