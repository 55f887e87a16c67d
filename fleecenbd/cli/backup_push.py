"""A disk of a session copied by the server itself: a job, looked at until it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

from fleecenbd.cli import logs
from fleecenbd.cli.backup_copy import PullAsk, PullDisk, has_begun
from fleecenbd.cli.backup_sessions import to_its_end
from fleecenbd.cli.backup_view import BackupView
from fleecenbd.cli.backup_work import Work
from fleecenbd.cli.control_client import ControlClient
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.job_commands import absolute_target
from fleecenbd.cli.job_watching import done_of, outcome, watch
from fleecenbd.client.events import Done, Event, Start
from fleecenbd.client.options import PullOptions, find_places


class PushDisk(PullDisk):
    """backup_work.CopyDisk. Guests' writes wait for the local temp image, never for the target;
    nor for this process, which only looks on."""

    def __init__(self, ask: PullAsk, view: BackupView, client: ControlClient) -> None:
        super().__init__(ask, view)
        self._client = client

    async def __call__(self, work: Work) -> Done:
        # The server's folder is another, and so may be its state directory.
        options = self.options(work)
        body = _body(work, options)
        with self._view.of(work) as show:

            def told(event: Event) -> None:
                if isinstance(event, Start):
                    work.has_started = True
                show(event)

            call = self._client.call("POST", "jobs", body=body)
            job = await to_its_end(call, self._cancel)
            if self._view.says_much:
                logs.report(f"{work.disk}: the server's job {job['id']}")
            try:
                job = await watch(self._client, job["id"], told)
            except asyncio.CancelledError as interrupted:
                job = await self._cancelled(job, interrupted)
        error = outcome(job)
        if error is not None:
            raise CommandError(error)
        return done_of(job)

    async def _cancelled(self, job: Any, interrupted: asyncio.CancelledError) -> Any:
        """The job, complete all the same; else ``interrupted`` is raised once it has ended."""
        try:
            job = await to_its_end(self._cancel(job))
        except CommandError as error:
            logs.report(f"job {job['id']} could not be cancelled: {error}")
            raise interrupted from None
        if job["state"] != "complete":
            raise interrupted
        return job

    async def _cancel(self, job: Any) -> Any:
        """End it; as it is once it has ended. What it has left is the session's, and goes with
        that, or stays for ``--resume``."""
        return await self._client.call("POST", "jobs", job["id"], "cancel")


def _body(work: Work, options: PullOptions) -> dict[str, Any]:
    """Of ``POST /v1/jobs``."""
    backing = options.backing
    is_file = work.destination.staged is not None
    return {
        "session": work.session,
        "disk": work.disk,
        "target": absolute_target(options.target),
        "force": options.force,
        "resume": work.is_resumed and has_begun(options, work.session_id),
        "keep": options.keep,
        "trim": options.trim,
        "read_once": options.read_once,
        "verify": options.verify,
        "compress": options.compress,
        "checksum": options.checksum,
        "bitmap": options.bitmap,
        "backing": None if backing is None else backing.path,
        "backing_format": None if backing is None else backing.format,
        "rate": None if options.rate is None else int(options.rate),
        "connections": options.connections,
        "requests": options.requests,
        "retries": options.retries,
        "journal": None if is_file else find_places(options).journal,
    }
