"""A job as the server knows it: what its child has said, and what there is to see of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fleecenbd.engine.session import Session
from fleecenbd.server import job_events
from fleecenbd.server.job_asks import JobAsk
from fleecenbd.server.job_process import JobProcess
from fleecenbd.server.views import ChecksumView, JobProgressView, JobView

RUNNING, PAUSED = "running", "paused"
COMPLETE, FAILED, CANCELLED = "complete", "failed", "cancelled"
"""States: the first two as long as its child lives, and until its end is written down."""


@dataclass(eq=False)
class Job:
    """A job that has not ended. ``server.jobs`` alone changes it."""

    id: str
    ask: JobAsk
    session: Session
    rate: int | None
    """The limit, in bytes per second."""
    started_at: float
    process: JobProcess = field(init=False)
    task: asyncio.Task[None] = field(init=False)
    is_paused: bool = False
    child_ended: bool = False
    ending: asyncio.Task[bool] | None = None
    """Ends the child."""
    why_ending: str | None = None
    wrong: str | None = None
    """Why it must fail, whatever the child says."""
    start: job_events.Start | None = None
    progress: job_events.Progress | None = None
    note: str | None = None
    done: job_events.Done | None = None
    failed: job_events.Failed | None = None
    result: str | None = None
    """What the session was finished as with it."""

    @property
    def name(self) -> str:
        """For the log."""
        return f"job {self.id} ({self.ask.export})"

    def hear(self, event: job_events.JobEvent) -> None:
        """Note what the child says."""
        if isinstance(event, job_events.Start):
            self.start = event
            if event.session_id != self.session.id:
                self.wrong = (
                    f"another server answers where this one should: session {event.session_id}, "
                    f"and not {self.session.id}"
                )
        elif isinstance(event, job_events.Progress):
            self.progress = event
        elif isinstance(event, job_events.Note):
            self.note = event.text
        elif isinstance(event, job_events.Done):
            self.done = event
        else:
            self.failed = event

    def why_failed(self, status: int) -> str | None:
        """Why it is not complete, now that its child has ended with this status; None: it is.

        "done" is said when the target has its name: whatever came then cannot change it.
        """
        if self.wrong is not None:
            return self.wrong
        if self.done is not None:
            return None
        if self.why_ending is not None:
            return self.why_ending
        if self.failed is not None:
            return self.failed.error
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        words = self.process.last_words.removeprefix("fleecenbd: ")
        return f"its process {how}" + (f": {words}" if words else "")

    def view(
        self, state: str | None = None, error: str | None = None, ended_at: float | None = None
    ) -> JobView:
        """What there is to see; ``state``: the one that it ended in."""
        ask, done = self.ask, self.done
        checksum = None if done is None else done.checksum
        return JobView(
            id=self.id,
            session=ask.session,
            session_id=self.session.id,
            disk=ask.disk,
            target=ask.target,
            state=state or (PAUSED if self.is_paused else RUNNING),
            error=error,
            note=self.note,
            kept=None if self.failed is None else self.failed.kept,
            finish=ask.finish,
            result=self.result,
            rate=self.rate,
            pid=None if ended_at is not None else self.process.pid,
            started_at=self.started_at,
            ended_at=ended_at,
            progress=self._progress_view(),
            checksum=None if checksum is None else ChecksumView(checksum.algorithm, checksum.root),
            verified=done is not None and done.verified,
        )

    def _progress_view(self) -> JobProgressView | None:
        start, progress, done = self.start, self.progress, self.done
        if start is None:
            return None
        now = done or progress
        return JobProgressView(
            size=start.size,
            to_copy=start.to_copy if progress is None else progress.to_copy,
            resumed=start.resumed,
            durable=start.resumed if now is None else now.durable,
            read=0 if now is None else now.read,
            released=0 if now is None else now.released,
            speed=0.0 if progress is None else progress.rate,
            eta=None if progress is None or done is not None else progress.eta_s,
            temp=None if progress is None else progress.temp_bytes,
            elapsed=0.0 if now is None else now.elapsed_s,
        )
