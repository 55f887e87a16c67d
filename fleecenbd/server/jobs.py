"""Backups that the server makes itself: each a child process that runs ``fleecenbd pull``.

    POST ▶ check ▶ child ──NBD over our own socket──▶ fleecing export      (a client as any other)
                     └──▶ target

So nothing of a target, neither its file system nor its server nor libnbd, is ever touched by this
process: a target that is slow or hangs stalls the child and nothing else. A guest's write waits
for the local temp image, as it does for any backup, and never for a target.

    running ◀─▶ paused ──▶ complete, failed, cancelled

A job is in one of the first two as long as its child lives, and until what ended with it is
written down. One job at a time reads an export, and one at a time writes to a target.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.recording import NEW
from fleecenbd.engine.session import Session
from fleecenbd.nbd.errors import shown_name
from fleecenbd.server import events, job_events
from fleecenbd.server.job_asks import JobAsk
from fleecenbd.server.job_finishing import Finishing
from fleecenbd.server.job_process import KILLED_WAIT_S, JobProcess
from fleecenbd.server.job_record import CANCELLED, COMPLETE, FAILED, Job
from fleecenbd.server.places import Places
from fleecenbd.server.server import Server
from fleecenbd.server.sessions import Sessions
from fleecenbd.server.views import JobView

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-P", "-m", "fleecenbd", "pull")
"""What a child runs; -P: no module is taken from the working directory."""
ENDED_MAX = 20
"""Jobs that have ended and stay listed."""
RUNNING_MAX = 32
CANCEL_S = 15.0
"""Seconds that a job has to make durable what it has in hand, once it is cancelled."""
TERM_S = 5.0
"""Seconds from SIGTERM to SIGKILL."""
STOP_S = 1.0
"""Seconds that jobs have to end when the server stops: a guest may wait for the next server. A
pull that is killed is resumed as one that has ended is; what was in hand is read once more."""


class Jobs:
    """The jobs of a server."""

    def __init__(
        self,
        server: Server,
        sessions: Sessions,
        places: Places,
        *,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.ended: deque[JobView] = deque(maxlen=ENDED_MAX)
        """The last ones, oldest first."""
        self.results = {COMPLETE: 0, FAILED: 0, CANCELLED: 0}
        """Jobs that have ended since the start, counted."""
        self._durable_bytes = 0
        """Made durable by jobs that have ended."""
        self._server = server
        self._sessions = sessions
        self._places = places
        self._program = tuple(program)
        self._jobs: dict[str, Job] = {}
        self._finishing = Finishing(sessions)
        self._closed = False
        server.finishing.append(self._finishing.session_ends)

    # -- start -----------------------------------------------------------------------------

    def start(self, ask: JobAsk) -> JobView:
        """Start a job. Raises OSError, and then nothing has started: EINVAL for what makes no
        sense, ENOENT for a session or a disk that is not there, EBUSY, EADDRNOTAVAIL where no URI
        leads to the export, ESHUTDOWN."""
        ask.check()
        session, uri = self._check_possible(ask)
        job = Job(
            # Not a number that the next server gives to another one.
            id=random_uuid()[:8],
            ask=ask,
            session=session,
            rate=ask.rate,
            started_at=time.time(),
        )
        job.process = JobProcess(job.name, lambda line: self._heard(job, line))
        self._jobs[job.id] = job
        self._finishing.job_starts(session, finish=ask.finish)
        command = [*self._program, *ask.arguments(uri, session.id)]
        job.task = asyncio.get_running_loop().create_task(self._run(job, command), name=job.name)
        logger.info("%s: begun, to %s", job.name, ask.target)
        self._tell(events.JOB_STARTED, job)
        return job.view()

    def _check_possible(self, ask: JobAsk) -> tuple[Session, str]:
        if self._closed or self._server.stopping:
            raise OSError(errno.ESHUTDOWN, "no job can begin: the server is stopping")
        session = self._server.session(ask.session)
        fleece = next((one for one in session.fleeces if one.disk.name == ask.disk), None)
        if fleece is None:
            disks = ", ".join(one.disk.name for one in session.fleeces)
            raise OSError(
                errno.ENOENT,
                f"disk {shown_name(ask.disk)} is not in session {ask.session}, which is over "
                f"{disks}",
            )
        if fleece.broken is not None:
            raise OSError(
                errno.EBUSY,
                f"{ask.export} cannot be backed up: its session broke: {fleece.broken}; "
                "finish it, and begin another",
            )
        _check_bitmap(ask, fleece)
        for job in self._jobs.values():
            if job.ask.export == ask.export:
                raise OSError(
                    errno.EBUSY, f"job {job.id} backs up {ask.export} already, to {job.ask.target}"
                )
            if job.ask.place == ask.place:
                raise OSError(
                    errno.EBUSY, f"job {job.id} writes to {ask.target} already: {job.ask.export}"
                )
        if len(self._jobs) >= RUNNING_MAX:
            raise OSError(errno.EBUSY, f"{RUNNING_MAX} jobs are running already; wait for one")
        self._check_target(ask)
        uris = self._places.uris(ask.export)
        if not uris:
            raise OSError(
                errno.EADDRNOTAVAIL,
                f"a job cannot reach {ask.export}: no URI leads to it, since this server's socket "
                "was handed over; start it with --unix or --backup-unix, or pull from outside",
            )
        return session, uris[0]

    def _check_target(self, ask: JobAsk) -> None:
        """What can be told without touching it; the rest is the child's to look at."""
        for disk in self._server.disks.values():
            image = disk.device.name
            path = os.path.abspath(image.removeprefix("qcow2:"))
            own = {image, path, *self._places.uris(disk.name)}
            if ask.place in own:
                raise OSError(
                    errno.EINVAL,
                    f"target: {ask.target} is disk {disk.name}, which is served here; "
                    "its guest would lose it",
                )

    # -- the child -------------------------------------------------------------------------

    async def _run(self, job: Job, command: Sequence[str]) -> None:
        error: str | None
        try:
            error = job.why_failed(await job.process.run(command))
        except OSError as failure:
            error = f"{command[0]} cannot be started: {failure.strerror}"
        except asyncio.CancelledError:
            del self._jobs[job.id]  # the server ends at once
            raise
        job.child_ended = True
        if error is None:
            state = COMPLETE
        else:
            state = FAILED if job.why_ending is None or job.wrong is not None else CANCELLED
        try:
            if not self._closed and not self._server.stopping:
                job.result = self._finishing.job_ends(
                    job.session,
                    job.ask.disk,
                    complete=state == COMPLETE,
                    finish=job.ask.finish,
                    is_last=not any(
                        other.session is job.session and not other.child_ended
                        for other in self._jobs.values()
                    ),
                )
            if job.result is not None:
                await self._sessions.written()
        finally:
            self._end(job, state, error)

    def _heard(self, job: Job, line: bytes) -> None:
        try:
            event = job_events.decode(line)
        except ValueError as error:
            logger.warning("%s: a line of its output is no event: %s", job.name, error)
            return
        job.hear(event)
        if isinstance(event, job_events.Note):
            logger.info("%s: %s", job.name, event.text)
        if job.wrong is not None:
            self._end_child(job, job.wrong, command="cancel", gently_s=TERM_S, term_s=TERM_S)

    def _end(self, job: Job, state: str, error: str | None) -> None:
        """The one place where a job leaves ``running`` for good."""
        view = job.view(state, error, time.time())
        del self._jobs[job.id]
        self.ended.append(view)
        self.results[state] += 1
        self._durable_bytes += _made_durable(view)
        kept = "" if view.kept is None else f"; {view.kept} is kept"
        why = "" if error in (None, state) else f": {error}"
        level = logging.WARNING if state == FAILED else logging.INFO
        logger.log(level, "%s: %s%s%s", job.name, state, why, kept)
        self._tell(events.JOB_ENDED, job, state=state, error=error)

    def _tell(self, kind: str, job: Job, **about: object) -> None:
        ask = job.ask
        self._server.events.tell(
            kind, job=job.id, session=ask.session, disk=ask.disk, target=ask.target, **about
        )

    # -- while it runs ---------------------------------------------------------------------

    def pause(self, job_id: str) -> JobView:
        """Read nothing more. Raises OSError: ENOENT; EBUSY, EPIPE if it has ended or is ending;
        EAGAIN if it hangs."""
        return self._set_paused(self._listening(job_id), True)

    def resume(self, job_id: str) -> JobView:
        """Go on. Raises OSError as ``pause``."""
        return self._set_paused(self._listening(job_id), False)

    def _set_paused(self, job: Job, paused: bool) -> JobView:
        job.process.send("pause" if paused else "resume")
        if paused != job.is_paused:
            job.is_paused = paused
            self._tell(events.JOB_PAUSED if paused else events.JOB_RESUMED, job)
        return job.view()

    def set_rate(self, job_id: str, rate: int | None) -> JobView:
        """Bytes read per second; None: no limit. Raises OSError as ``pause``."""
        job = self._listening(job_id)
        job.process.send("rate", bytes_per_s=rate)
        job.rate = rate
        return job.view()

    async def cancel(self, job_id: str, *, keep: bool = False) -> JobView:
        """End it; as it is then. What is durable is kept for ``resume`` where the job was asked
        for so, and with ``keep`` in any case.

        Raises OSError: ENOENT, EBUSY if it has ended otherwise, EIO if its process cannot be
        killed. Cancelling this ends the waiting only.
        """
        if (view := self._ended(job_id)) is not None and view.state == CANCELLED:
            return view
        job = self._running(job_id)
        if keep:
            with suppress(OSError):  # it has ended, or hangs, and is ended otherwise: that keeps
                job.process.send("keep")
        ending = self._end_child(
            job, "cancelled", command="cancel", gently_s=CANCEL_S, term_s=TERM_S
        )
        await asyncio.wait({ending, job.task}, return_when=asyncio.FIRST_COMPLETED)
        if not job.task.done() and not ending.cancelled() and not ending.result():
            raise OSError(
                errno.EIO,
                f"{job.name} was killed and has not ended: its process {job.process.pid} hangs in "
                "a system call, on its target most likely",
            )
        await asyncio.wait({job.task})
        return self.find(job_id)

    def _end_child(
        self, job: Job, why: str, *, command: str | None, gently_s: float, term_s: float
    ) -> asyncio.Task[bool]:
        """End its child, unless that is under way already; True once it has ended."""
        if job.ending is None or job.ending.done():
            job.why_ending = job.why_ending or why
            job.ending = asyncio.get_running_loop().create_task(
                job.process.end(command, gently_s=gently_s, term_s=term_s),
                name=f"end of {job.name}",
            )
        return job.ending

    async def close(self) -> None:
        """The server stops: start no more, end those that run. What they made durable is kept."""
        self._closed = True
        jobs = list(self._jobs.values())
        why = "the server stopped; start it again with resume, in the same session"
        ends = []
        for job in jobs:
            if job.ending is not None:  # one that was cancelled has less time now
                job.ending.cancel()
                await asyncio.wait({job.ending})
            ends.append(self._end_child(job, why, command=None, gently_s=STOP_S, term_s=0.0))
        if jobs:
            tasks = [job.task for job in jobs]
            await asyncio.wait(ends, timeout=STOP_S + KILLED_WAIT_S)
            await asyncio.wait(tasks, timeout=STOP_S)
            for task in [*ends, *tasks]:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_S)

    # -- looking ---------------------------------------------------------------------------

    def _ended(self, job_id: str) -> JobView | None:
        return next((view for view in self.ended if view.id == job_id), None)

    def _running(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            view = self.find(job_id)
            raise OSError(errno.EBUSY, f"job {job_id} has ended ({view.state})")
        return job

    def _listening(self, job_id: str) -> Job:
        job = self._running(job_id)
        if job.why_ending is not None:
            raise OSError(errno.EBUSY, f"job {job_id} is ending: {job.why_ending}")
        return job

    def find(self, job_id: str) -> JobView:
        """The job of this id. Raises OSError(ENOENT)."""
        job = self._jobs.get(job_id)
        view = self._ended(job_id) if job is None else job.view()
        if view is None:
            raise OSError(
                errno.ENOENT,
                f"there is no job {shown_name(job_id)}; of those that have ended, the last "
                f"{ENDED_MAX} since the server's start stay listed",
            )
        return view

    def views(self) -> list[JobView]:
        """The last ones that have ended, then the others; oldest first."""
        return [*self.ended, *self.running_views()]

    def running_views(self) -> list[JobView]:
        """Those that have not ended, oldest first."""
        return [job.view() for job in self._jobs.values()]

    @property
    def durable_bytes(self) -> int:
        """Made durable by all jobs since the start."""
        return self._durable_bytes + sum(map(_made_durable, self.running_views()))


def _check_bitmap(ask: JobAsk, fleece: Fleece) -> None:
    """Raises OSError where the export has no such bitmap, or reads nothing but one."""
    own = fleece.own
    name = None if own is None or own.mode == NEW else own.name
    if ask.bitmap is not None and ask.bitmap != name:
        has = "none" if name is None else f"bitmap {name}"
        raise OSError(errno.EINVAL, f"{ask.export} has no bitmap {ask.bitmap}; it has {has}")
    if ask.bitmap is None and name is not None:
        raise OSError(
            errno.EINVAL,
            f"{ask.export} reads only what has changed: give bitmap {name}, and the rest of the "
            "target is left alone",
        )


def _made_durable(view: JobView) -> int:
    progress = view.progress
    return 0 if progress is None else max(0, progress.durable - progress.resumed)
