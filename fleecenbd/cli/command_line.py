"""The command line as typer has it: help, version, and what is wrong with the words typed.

Imported only where it is needed: that takes longer than a server to start (words.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, cast

import typer

from fleecenbd import __version__
from fleecenbd.cli.bitmap_commands import bitmap_app
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_commands import add_commands
from fleecenbd.cli.control_options import (
    ControlPath,
    EndSessions,
    ForgetMissing,
    FreezeCommand,
    HookTimeout,
    IdleTtl,
    MetricsAddress,
    ThawCommand,
    TrustOffline,
    Ttl,
)
from fleecenbd.cli.endpoints import DEFAULT_PORT
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.serve import serve
from fleecenbd.cli.serve_options import (
    DISKS,
    SESSION,
    CacheMode,
    DefaultExport,
    Discard,
    FirstClusterSize,
    FirstTempLimit,
)
from fleecenbd.cli.temp_options import (
    Temp,
    TempDir,
    TempOverwrite,
    TempPrealloc,
    TempReserve,
)
from fleecenbd.cli.usage import usage_text
from fleecenbd.cli.words import ServeWords
from fleecenbd.engine.session import SessionOptions
from fleecenbd.engine.state import BREAK_GUEST_WRITE, BREAK_SNAPSHOT, THROTTLE

app = typer.Typer(
    name="fleecenbd",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What the parser raises for wrong usage. The class has no public name of its own in all
# versions of typer; the base of a public one has been it in all.
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])

SOCKETS = "Where clients connect"
PROCESS = "The process"

HELP = """
Serve disks, and point-in-time images of them, over NBD.

A disk is served to its guest under its name. With --begin, it is also served under \
DISK@SESSION as it was at that moment, for a backup to read and to TRIM.

Stop it with SIGTERM or Ctrl-C: what guests have been promised is on the disk. Sessions go on when \
it is started again, and so they do after kill -9; with --run, --single, or a client that starts \
the server for itself, they end with it.
"""

EXAMPLES = """
[bold]Examples[/]

fleecenbd serve vm.raw

fleecenbd serve vda=/dev/vg/vm1 vdb=data.raw -U /run/vm.sock --begin nightly

fleecenbd serve vm.raw --begin nightly --run 'nbdcopy "$uri" backup.raw'

nbdcopy -- \\[ fleecenbd serve vm.raw --begin nightly ] backup.raw
"""


class LogLevel(StrEnum):
    """--log-level."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class OnCbwError(StrEnum):
    """--on-cbw-error."""

    break_snapshot = BREAK_SNAPSHOT
    break_guest_write = BREAK_GUEST_WRITE
    throttle = THROTTLE


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fleecenbd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """An NBD server that fleeces: live disks, and point-in-time images of them."""


@app.command("serve", cls=StrictCommand, help=HELP, epilog=EXAMPLES)
def _serve(
    disk: Annotated[
        list[str],
        typer.Argument(
            metavar="DISK",
            show_default=False,
            help="[NAME=]IMAGE: a raw file, a block device, qcow2:PATH or an NBD URI; NAME, the "
            "export's name, is the file's name up to its last dot by default. A file that is a "
            "container inside (qcow2, VMDK, VDI, LUKS) is refused unless it is written raw:PATH.",
        ),
    ],
    unix: Annotated[
        str | None,
        typer.Option(
            "-U",
            "--unix",
            metavar="PATH",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="Unix socket for all exports; '-' for a private one. "
            "Default: fleecenbd.sock in $XDG_RUNTIME_DIR, or in /run for root; "
            "a private one with --run.",
        ),
    ] = None,
    socket_mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="Permissions of Unix sockets, in octal. Default: 600; 660 with --socket-group.",
        ),
    ] = None,
    socket_group: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="Group of Unix sockets, such as the one that QEMU runs as.",
        ),
    ] = None,
    ip: Annotated[
        str | None,
        typer.Option(
            "-i",
            "--ip",
            metavar="ADDR",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="Listen on TCP too, at this address. Default: 127.0.0.1, "
            "and ::1 where there is IPv6.",
        ),
    ] = None,
    port: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--port",
            metavar="N",
            rich_help_panel=SOCKETS,
            show_default=False,
            help=f"Listen on TCP too, at this port of 127.0.0.1 (or --ip's address); 0 for any. "
            f"Default: {DEFAULT_PORT} with --ip.",
        ),
    ] = None,
    backup_unix: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="Unix socket that shows fleecing exports only: no way to a guest's disk.",
        ),
    ] = None,
    backup_port: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            rich_help_panel=SOCKETS,
            show_default=False,
            help="TCP port that shows fleecing exports only.",
        ),
    ] = None,
    single: Annotated[
        bool,
        typer.Option(
            "-s",
            "--single",
            rich_help_panel=SOCKETS,
            help="Serve one client, whose socket is standard input; end when it has gone.",
        ),
    ] = False,
    begin: Annotated[
        str | None,
        typer.Option(
            metavar="SESSION",
            rich_help_panel=SESSION,
            show_default=False,
            help="Begin a session over all disks before the first client is let in: "
            "DISK@SESSION is the disk as it was then. One of this name that the last server left "
            "goes on.",
        ),
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=SESSION,
            show_default=False,
            help="Where temp images and bitmaps are kept, so that a server started again goes on "
            "with them; one server's alone. Default: a folder of its own for each socket, below "
            "fleecenbd in $XDG_STATE_HOME or ~/.local/state; below /var/lib/fleecenbd for root.",
        ),
    ] = None,
    temp_limit: FirstTempLimit = None,
    cluster_size: FirstClusterSize = None,
    on_cbw_error: Annotated[
        OnCbwError | None,
        typer.Option(
            rich_help_panel=SESSION,
            show_default=False,
            help="When old data cannot be kept: give up the session, or fail the guest's write; "
            "throttle gives it up, too, but delays writes that copy before, as space runs out. "
            f"Default: {BREAK_SNAPSHOT}.",
        ),
    ] = None,
    cbw_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            rich_help_panel=SESSION,
            show_default=False,
            help="How long a guest's write may wait for old data to be kept; 0: for ever. "
            f"Default: {SessionOptions.cbw_timeout_s:g}.",
        ),
    ] = None,
    ttl: Ttl = None,
    idle_ttl: IdleTtl = None,
    control: ControlPath = None,
    metrics: MetricsAddress = None,
    freeze_cmd: FreezeCommand = None,
    thaw_cmd: ThawCommand = None,
    hook_timeout: HookTimeout = None,
    end_sessions: EndSessions = False,
    trust_offline: TrustOffline = None,
    forget_missing: ForgetMissing = False,
    temp_reserve: TempReserve = None,
    temp: Temp = None,
    temp_dir: TempDir = None,
    temp_prealloc: TempPrealloc = False,
    temp_overwrite: TempOverwrite = False,
    default_export: DefaultExport = None,
    cache: CacheMode = None,
    discard: Discard = None,
    read_only: Annotated[
        bool,
        typer.Option("-r", "--read-only", rich_help_panel=DISKS, help="Nobody may write."),
    ] = False,
    shared: Annotated[
        str,
        typer.Option(
            metavar="N",
            rich_help_panel=DISKS,
            help="Connections that each guest's disk admits at a time; 0 for any number. A client "
            "that may open several does: nbdcopy up to 4 (with -C 2, two).",
        ),
    ] = "1",
    force_share: Annotated[
        bool,
        typer.Option(
            "--force-share",
            rich_help_panel=DISKS,
            help="Neither lock the images nor look whether others (QEMU) have locked them. "
            "Of qcow2 disks this is about raw files below them: the rest QEMU locks itself.",
        ),
    ] = False,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="COMMAND",
            rich_help_panel=PROCESS,
            show_default=False,
            help="Run this by sh, with $uri, $unixsocket and $port set; end with it, and with "
            "its exit status. $uri is the fleecing export's where there is one.",
        ),
    ] = None,
    pidfile: Annotated[
        str | None,
        typer.Option(
            "-P",
            "--pidfile",
            metavar="FILE",
            rich_help_panel=PROCESS,
            show_default=False,
            help="Write the process id there, once clients can connect.",
        ),
    ] = None,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(
            rich_help_panel=PROCESS,
            show_default=False,
            help="The least that is worth a line on standard error. Default: info; warning "
            "where another program started the server for itself, or --run.",
        ),
    ] = None,
    json_log: Annotated[
        bool,
        typer.Option("--json-log", rich_help_panel=PROCESS, help="Log JSON, one object a line."),
    ] = False,
) -> int:
    return serve(
        ServeWords(
            disk=tuple(disk),
            unix=unix,
            socket_mode=socket_mode,
            socket_group=socket_group,
            ip=ip,
            port=port,
            backup_unix=backup_unix,
            backup_port=backup_port,
            single=single,
            begin=begin,
            state_dir=state_dir,
            temp_limit=temp_limit,
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error.value if on_cbw_error is not None else None,
            cbw_timeout=cbw_timeout,
            ttl=ttl,
            idle_ttl=idle_ttl,
            control=control,
            metrics=metrics,
            freeze_cmd=freeze_cmd,
            thaw_cmd=thaw_cmd,
            hook_timeout=hook_timeout,
            end_sessions=end_sessions,
            trust_offline=trust_offline,
            forget_missing=forget_missing,
            temp_reserve=temp_reserve,
            temp=temp,
            temp_dir=temp_dir,
            temp_prealloc=temp_prealloc,
            temp_overwrite=temp_overwrite,
            default_export=default_export,
            cache=cache.value if cache is not None else None,
            discard=tuple(discard or ()),
            read_only=read_only,
            shared=shared,
            force_share=force_share,
            run=run,
            pidfile=pidfile,
            log_level=log_level.value if log_level is not None else None,
            json_log=json_log,
        )
    )


add_commands(app)
app.add_typer(bitmap_app, name="bitmap")


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit status. Raises UsageError, and what ``serve`` raises."""
    try:
        command = typer.main.get_command(app)
        status = command.main(list(arguments), prog_name="fleecenbd", standalone_mode=False)
    except _USAGE_ERROR as error:
        raise UsageError(usage_text(error)) from None
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0
