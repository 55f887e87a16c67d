"""``fleecenbd session``, ``disk`` and ``status``: the control socket from the command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Annotated, Any

import typer

from fleecenbd.cli import logs, values
from fleecenbd.cli.backup_commands import add_backup
from fleecenbd.cli.begin_options import (
    CbwTimeout,
    ClusterSize,
    OnCbwError,
    TempLimit,
    begin_body,
)
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_options import (
    FreezeCommand,
    HookTimeout,
    IdleTtl,
    ThawCommand,
    Ttl,
)
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.pull_commands import add_pull
from fleecenbd.cli.temp_choice import temp_fields
from fleecenbd.cli.temp_options import (
    Temp,
    TempDir,
    TempOverwrite,
    TempPrealloc,
    TempReserve,
)
from fleecenbd.cli.values import DiskSpec
from fleecenbd.engine.recording import MODES, USE_OR_NEW

WATCH_INTERVAL_S = 1.0

Control = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="PATH",
        envvar="FLEECENBD_CONTROL",
        show_default=False,
        show_envvar=True,
        help="The server's control socket. Default: that of a server on the default socket.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer, as JSON.")]
SessionName = Annotated[str, typer.Argument(metavar="SESSION", show_default=False)]
DiskName = Annotated[str, typer.Argument(metavar="DISK", show_default=False)]

session_app = typer.Typer(help="Begin, look at, change and finish sessions while guests run.")
disk_app = typer.Typer(help="Disks of a running server.")


def add_commands(app: typer.Typer) -> None:
    """Make them commands of ``fleecenbd``."""
    app.add_typer(session_app, name="session")
    app.add_typer(disk_app, name="disk")
    app.command("status", cls=StrictCommand)(status)
    add_pull(app)
    add_backup(app)
    # Only here: their modules take options from this one.
    from fleecenbd.cli.event_commands import add_events
    from fleecenbd.cli.job_commands import job_app

    app.add_typer(job_app, name="job")
    add_events(app)


def call(control: str | None, method: str, *words: str, **options: Any) -> Any:
    # Only here: it takes longer to import than most calls take.
    from fleecenbd.cli.control_client import call_server

    return call_server(control, lambda client: client.call(method, *words, **options))


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, ensure_ascii=False, indent=2))


@session_app.command("begin", cls=StrictCommand)
def begin(
    name: SessionName,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="DISK", show_default=False, help="One of its disks. Default: all."),
    ] = None,
    on_cbw_error: OnCbwError = None,
    cbw_timeout: CbwTimeout = None,
    temp_limit: TempLimit = None,
    temp_reserve: TempReserve = None,
    cluster_size: ClusterSize = None,
    temp: Temp = None,
    temp_dir: TempDir = None,
    temp_prealloc: TempPrealloc = False,
    temp_overwrite: TempOverwrite = False,
    bitmap: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="A recording bitmap of each disk: what the exports read, and what becomes of it, "
            "is told by --bitmap-mode. --json says, for each disk, what was really done.",
        ),
    ] = None,
    bitmap_mode: Annotated[
        str | None,
        typer.Option(
            metavar="use|new|use-or-new|keep",
            show_default=False,
            help="use: read what has changed, and record anew; new: read everything, and record "
            "anew; use-or-new: the first where that can be, else the second; keep: read what has "
            "changed, and record on. Default: use-or-new.",
        ),
    ] = None,
    read_once: Annotated[
        bool,
        typer.Option(
            "--read-once",
            help="Release what was read as soon as it is handed to the socket, in whole clusters: "
            "for nbdcopy and others that send no TRIM. What is read twice is refused, so nothing "
            "may probe first, or retry. DISK@SESSION+once is the same, for one client.",
        ),
    ] = False,
    owner: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            show_default=False,
            help="A word of your own: asking again with it, and with the same options, gets the "
            "same session.",
        ),
    ] = None,
    ttl: Ttl = None,
    idle_ttl: IdleTtl = None,
    freeze_cmd: FreezeCommand = None,
    thaw_cmd: ThawCommand = None,
    hook_timeout: HookTimeout = None,
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Begin a session: from now on DISK@SESSION is the disk as it is at this moment.

    Prints the NBD URI of each fleecing export, one a line, and nothing else; warnings go to
    standard error.
    """
    values.check_name(name, "a session")
    for word in disk or []:
        values.check_name(word, "a disk")
    body: dict[str, Any] = {
        **begin_body(
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            temp_limit=temp_limit,
            temp_reserve=temp_reserve,
            cluster_size=cluster_size,
            temp=temp_fields(temp, temp_dir, preallocated=temp_prealloc, overwrite=temp_overwrite),
            ttl=ttl,
            idle_ttl=idle_ttl,
            freeze_cmd=freeze_cmd,
            thaw_cmd=thaw_cmd,
            hook_timeout=hook_timeout,
            read_once=read_once,
        ),
        "disks": disk or None,
        "owner": owner,
    }
    if bitmap is not None:
        body["bitmap"] = values.check_name(bitmap, "a bitmap")
        body["bitmap_mode"] = _bitmap_mode(bitmap_mode)
    elif bitmap_mode is not None:
        raise UsageError("--bitmap-mode cannot be given without --bitmap")
    answer = call(control, "PUT", "sessions", name, body=body)
    for warning in answer["warnings"]:
        logs.report(f"warning: {warning}")
    for one in answer["disks"]:
        if one["bitmap"] is not None and one["bitmap"]["reason"] is not None:
            logs.report(f"warning: {one['export']} is a full backup: {one['bitmap']['reason']}")
    if as_json:
        _print_json(answer)
        return
    for one in answer["disks"]:
        if one["uri"] is None:
            logs.report(f"warning: no URI leads to {one['export']}: its socket was handed over")
        else:
            print(one["uri"])


def _bitmap_mode(text: str | None) -> str:
    if text is None:
        return USE_OR_NEW
    if text not in MODES:
        raise UsageError(f"--bitmap-mode is one of {', '.join(MODES)}, not {text!r}")
    return text


@session_app.command("list", cls=StrictCommand)
def list_sessions(control: Control = None, as_json: AsJson = False) -> None:
    """All sessions that are not finished, and the last 20 that are."""
    answer = call(control, "GET", "sessions")
    if as_json:
        _print_json(answer)
        return
    from fleecenbd.cli import tables

    tables.show(tables.session_table(answer["sessions"]))


@session_app.command("show", cls=StrictCommand)
def show(name: SessionName, control: Control = None, as_json: AsJson = False) -> None:
    """Everything about one session."""
    values.check_name(name, "a session")
    answer = call(control, "GET", "sessions", name)
    if as_json:
        _print_json(answer)
        return
    from fleecenbd.cli import tables

    tables.show(*tables.session_details(answer))


@session_app.command("set", cls=StrictCommand)
def set_session(
    name: SessionName,
    temp_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE|none",
            show_default=False,
            help="Most that one disk's temp image may hold from now on. Below what it holds "
            "it is full: the next copy does what --on-cbw-error says.",
        ),
    ],
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Change a session that goes on: more room before its temp images are full."""
    values.check_name(name, "a session")
    limit = values.parse_size_or_none(temp_limit, "--temp-limit", None)
    answer = call(control, "PATCH", "sessions", name, body={"temp_limit": limit})
    if as_json:
        _print_json(answer)


@session_app.command("finish", cls=StrictCommand)
def finish(
    name: SessionName,
    failed: Annotated[
        bool, typer.Option("--failed", help="The backup is not safe, or was given up.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="As a success, though somebody reads from it, or a backup is at work."
        ),
    ] = False,
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Finish a session: its exports go, and its temp images with them.

    As a success it is refused while somebody reads from it: what has changed would be forgotten.
    """
    from fleecenbd.cli.control_client import ControlClient, call_server
    from fleecenbd.cli.ending import check_idle

    values.check_name(name, "a session")
    if failed and force:
        raise UsageError("--force is for a success: with --failed nothing is lost")
    result = "failed" if failed else "success"

    async def work(client: ControlClient) -> Any:
        if not (failed or force):
            await check_idle(client, name)
        return await client.call("DELETE", "sessions", name, result=result)

    answer = call_server(control, work)
    if as_json:
        _print_json(answer)
    if answer["result"] != result:
        logs.report(f"warning: session {name} counts as failed: {answer['reason']}")


@disk_app.command("list", cls=StrictCommand)
def list_disks(control: Control = None, as_json: AsJson = False) -> None:
    """The disks that are served."""
    answer = call(control, "GET", "disks")
    if as_json:
        _print_json(answer)
        return
    from fleecenbd.cli import tables

    tables.show(tables.disk_table(answer["disks"]))


@disk_app.command("add", cls=StrictCommand)
def add_disk(
    disk: Annotated[
        str,
        typer.Argument(metavar="[NAME=]IMAGE", show_default=False, help="As for fleecenbd serve."),
    ],
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Serve one more disk. Prints the NBD URI of its guest export."""
    spec = values.parse_disk(disk)
    answer = call(control, "POST", "disks", spec.name, body={"image": _absolute(spec)})
    if as_json:
        _print_json(answer)
        return
    for uri in answer["uris"][:1]:
        print(uri)


def _absolute(spec: DiskSpec) -> str:
    """The path as the server understands it, whose folder is another."""
    if spec.kind == "nbd":
        return spec.path
    prefix = "raw:" if spec.raw else "qcow2:" if spec.kind == "qcow2" else ""
    return prefix + os.path.abspath(spec.path)


@disk_app.command("remove", cls=StrictCommand)
def remove_disk(name: DiskName, control: Control = None) -> None:
    """Serve a disk no more. Refused while a guest or a session needs it."""
    values.check_name(name, "a disk")
    call(control, "DELETE", "disks", name)


def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")
    ] = False,
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Disks, sessions, and how far each backup is."""
    if watch and as_json:
        raise UsageError(
            "--watch cannot be given with --json; fleecenbd events --json tells what happens"
        )
    if watch:
        if not sys.stdout.isatty():
            raise UsageError("--watch needs a terminal; leave it out, or use --json")
        _watch(control)
        return
    answer = call(control, "GET", "status")
    if as_json:
        _print_json(answer)
        return
    from fleecenbd.cli import tables

    tables.show(*tables.status_parts(answer))


def _watch(control: str | None) -> None:
    from rich.console import Group
    from rich.live import Live

    from fleecenbd.cli import tables
    from fleecenbd.cli.control_client import ControlClient, call_server

    async def work(client: ControlClient) -> None:
        console = tables.console()

        async def look() -> Group:
            answer = await client.call("GET", "status")
            brief = console.width < tables.BRIEF_BELOW
            return Group(*tables.status_parts(answer, brief=brief))

        with Live(await look(), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                live.update(await look(), refresh=True)

    try:
        call_server(control, work)
    except KeyboardInterrupt:
        sys.stdout.flush()
