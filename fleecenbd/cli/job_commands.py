"""``fleecenbd job``: backups that the server makes itself."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any

import typer

from fleecenbd.cli import logs, values
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_commands import AsJson, Control, DiskName, SessionName, call
from fleecenbd.cli.errors import CommandError, UsageError
from fleecenbd.cli.pull_commands import (
    SAFE,
    ChecksumOption,
    Connections,
    ProgressFd,
    ProgressOption,
    RateOption,
    Requests,
    Verify,
    speed_and_safety,
    view_of,
)
from fleecenbd.cli.target_words import check_target

job_app = typer.Typer(help="Backups that the server makes itself, with nobody connected.")

JobId = Annotated[
    str, typer.Argument(metavar="JOB", show_default=False, help="As job start prints it.")
]
_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")


def absolute_target(target: str) -> str:
    """The target as the server understands it, whose folder is another. Raises UsageError."""
    check_target(target)
    if _URI.match(target):
        return target
    match = re.match(r"raw:|qcow2:", target)
    prefix = match[0] if match else ""
    path = target.removeprefix(prefix)
    return prefix + os.path.abspath(path)


def job_id(text: str) -> tuple[str, str]:
    """The words of a call about it. Raises UsageError."""
    return "jobs", values.check_name(text, "a job")


def _show(answer: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))


@job_app.command("start", cls=StrictCommand)
def start(
    session: SessionName,
    disk: DiskName,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            show_default=False,
            help="A file or block device of the server's machine, qcow2:PATH, or an NBD URI.",
        ),
    ],
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="Finish the session: as failed if this job fails or is cancelled, as success "
            "once each of its disks has a job that is complete.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", rich_help_panel=SAFE, help="Write over what is there."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=SAFE,
            help="Go on with a job, or a pull, that has not ended; in the same session.",
        ),
    ] = False,
    no_trim: Annotated[
        bool, typer.Option("--no-trim", rich_help_panel=SAFE, help="Release nothing.")
    ] = False,
    read_once: Annotated[
        bool,
        typer.Option(
            "--read-once",
            rich_help_panel=SAFE,
            help="Release by reading, before it is durable; it cannot be resumed then.",
        ),
    ] = False,
    journal: Annotated[
        str | None,
        typer.Option(
            "--journal",
            metavar="FILE",
            rich_help_panel=SAFE,
            show_default=False,
            help="Where it is noted what is durable, as for fleecenbd pull.",
        ),
    ] = None,
    bitmap: Annotated[
        str | None,
        typer.Option(
            "--bitmap",
            metavar="NAME",
            show_default=False,
            help="Copy only what is dirty in this bitmap of the session.",
        ),
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress the clusters of a qcow2: target.")
    ] = False,
    connections: Connections = None,
    requests: Requests = None,
    rate: RateOption = None,
    retries: Annotated[
        str,
        typer.Option(
            "--retries",
            metavar="N",
            rich_help_panel=SAFE,
            help="How often in a row a connection that was dropped is made anew.",
        ),
    ] = "5",
    verify: Verify = False,
    checksum: ChecksumOption = None,
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Back up a disk of a session, by the server itself: prints the job's id, and returns.

    Guests' writes wait for the local temp image, never for the target. It goes on when you go;
    job wait looks at it, and job cancel ends it.
    """
    values.check_name(session, "a session")
    values.check_name(disk, "a disk")
    if bitmap is not None:
        values.check_name(bitmap, "a bitmap")
    chosen = speed_and_safety(
        connections=connections,
        requests=requests,
        rate=rate,
        retries=retries,
        verify=verify,
        checksum=checksum,
    )
    body = {
        **chosen,
        "session": session,
        "disk": disk,
        "target": absolute_target(target),
        "finish": finish,
        "force": force,
        "resume": resume,
        "trim": not no_trim,
        "read_once": read_once,
        "journal": None if journal is None else os.path.abspath(journal),
        "bitmap": bitmap,
        "compress": compress,
    }
    answer = call(control, "POST", "jobs", body=body)
    _show(answer, as_json)
    if not as_json:
        print(answer["id"])


@job_app.command("list", cls=StrictCommand)
def list_jobs(control: Control = None, as_json: AsJson = False) -> None:
    """All jobs that run, and the last 20 that have ended."""
    answer = call(control, "GET", "jobs")
    _show(answer, as_json)
    if not as_json:
        from fleecenbd.cli import job_tables, tables

        tables.show(job_tables.job_table(answer["jobs"]))


@job_app.command("show", cls=StrictCommand)
def show(job: JobId, control: Control = None, as_json: AsJson = False) -> None:
    """Everything about one job."""
    answer = call(control, "GET", *job_id(job))
    _show(answer, as_json)
    if not as_json:
        from fleecenbd.cli import job_tables, tables

        tables.show(job_tables.job_details(answer))


@job_app.command("wait", cls=StrictCommand)
def wait(
    job: JobId,
    progress: ProgressOption = "auto",
    progress_fd: ProgressFd = None,
    control: Control = None,
) -> None:
    """Show how far it is until it has ended; fail if it does. Ctrl-C ends the looking only."""
    job_id(job)
    # Only here: other commands need no bar.
    from fleecenbd.cli.control_client import ControlClient, call_server
    from fleecenbd.cli.job_watching import outcome, watch

    view = view_of(progress, progress_fd)

    async def work(client: ControlClient) -> Any:
        with view:
            return await watch(client, job, view)

    error = outcome(call_server(control, work))
    if error is not None:
        raise CommandError(error)


@job_app.command("pause", cls=StrictCommand)
def pause(job: JobId, control: Control = None, as_json: AsJson = False) -> None:
    """Read nothing more; what was read already still becomes durable."""
    _show(call(control, "POST", *job_id(job), "pause"), as_json)


@job_app.command("resume", cls=StrictCommand)
def resume(job: JobId, control: Control = None, as_json: AsJson = False) -> None:
    """Go on with a job that is paused."""
    _show(call(control, "POST", *job_id(job), "resume"), as_json)


@job_app.command("rate", cls=StrictCommand)
def rate(
    job: JobId,
    size: Annotated[
        str,
        typer.Argument(
            metavar="SIZE|none", show_default=False, help="Bytes a second, as in 100M; or none."
        ),
    ],
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Limit what it reads."""
    words = job_id(job)
    count = None
    if size != "none":
        count = values.parse_size(size, "SIZE")
        if not count:
            raise UsageError("0 bytes a second would never end; job pause holds it")
    _show(call(control, "POST", *words, "rate", body={"rate": count}), as_json)


@job_app.command("cancel", cls=StrictCommand)
def cancel(job: JobId, control: Control = None, as_json: AsJson = False) -> None:
    """End it, and return when it has ended. What is durable is kept for --resume."""
    answer = call(control, "POST", *job_id(job), "cancel")
    _show(answer, as_json)
    if answer["state"] != "cancelled":
        logs.report(f"warning: job {job} had ended before: {answer['state']}")
