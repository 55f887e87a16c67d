"""``fleecenbd serve``: its options as they are typed, into what the server needs to know."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from fleecenbd.cli import logs, values
from fleecenbd.cli.endpoints import DEFAULT_PORT
from fleecenbd.cli.handed import Handed, starting_client, take_activated, take_standard_input
from fleecenbd.cli.images import open_disks
from fleecenbd.cli.options import (
    ServeOptions,
    check_default_export,
    check_pidfile_is_no_socket,
    choose_addresses,
    choose_session_options,
    refuse_empty,
    refuse_together,
)
from fleecenbd.cli.pidfile import check_pidfile
from fleecenbd.cli.places import guests_directory, state_directory
from fleecenbd.cli.process import keep_buffers_on_the_heap
from fleecenbd.cli.runner import run_server
from fleecenbd.engine.session import SessionOptions
from fleecenbd.engine.state import BREAK_GUEST_WRITE, BREAK_SNAPSHOT

SOCKETS = "Where clients connect"
SESSION = "A session from the start"
DISKS = "Disks and exports"
PROCESS = "The process"


HELP = """
Serve disks, and point-in-time images of them, over NBD.

A disk is served to its guest under its name. With --begin, it is also served under \
DISK@SESSION as it was at that moment, for a backup to read and to TRIM.

Stop it with SIGTERM or Ctrl-C: what guests have been promised is on the disk, and sessions end.
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


def serve(
    disk: Annotated[
        list[str],
        typer.Argument(
            metavar="DISK",
            show_default=False,
            help="[NAME=]IMAGE: a raw file or a block device; NAME, the export's name, is the "
            "file's name up to its last dot by default. A file that is a container inside "
            "(qcow2, VMDK, VDI, LUKS) is refused unless it is written raw:PATH.",
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
            "DISK@SESSION is the disk as it was then.",
        ),
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=SESSION,
            show_default=False,
            help="Where temp images are kept. Default: fleecenbd in $XDG_STATE_HOME or "
            "~/.local/state; /var/lib/fleecenbd for root.",
        ),
    ] = None,
    temp_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=SESSION,
            show_default=False,
            help="Most that one disk's temp image may hold. Default: no limit.",
        ),
    ] = None,
    cluster_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=SESSION,
            show_default=False,
            help="Unit of copying, a power of two. Default: 4k, more for disks past 256 GiB.",
        ),
    ] = None,
    on_cbw_error: Annotated[
        OnCbwError | None,
        typer.Option(
            rich_help_panel=SESSION,
            show_default=False,
            help="When old data cannot be kept: give up the session, or fail the guest's write. "
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
    default_export: Annotated[
        str | None,
        typer.Option(
            "-e",
            "--default-export",
            metavar="NAME",
            rich_help_panel=DISKS,
            show_default=False,
            help="The export that the empty name means. Default: the empty name is refused; but "
            "with --single or socket activation (libnbd's \\[ ]), over one disk and a session, it "
            "means the fleecing export. Over several disks it is refused there, too, and the log "
            "says so.",
        ),
    ] = None,
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
            help="Neither lock the images nor look whether others (QEMU) have locked them.",
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
    """Check the options, and run the server to its end; the exit status. Raises CommandError."""
    quiet = single or run is not None
    level = log_level.value if log_level is not None else "warning" if quiet else "info"
    logs.set_up(level, as_json=json_log)
    activated = take_activated(os.environ)
    starter = starting_client(activated) if activated is not None else None
    if starter is not None and log_level is None:
        logs.set_up("warning", as_json=json_log)
    refuse_empty(
        {
            "--unix": unix,
            "--ip": ip,
            "--backup-unix": backup_unix,
            "--state-dir": state_dir,
            "--pidfile": pidfile,
        }
    )
    session_given = {
        "--temp-limit": temp_limit is not None,
        "--cluster-size": cluster_size is not None,
        "--on-cbw-error": on_cbw_error is not None,
        "--cbw-timeout": cbw_timeout is not None,
    }
    if begin is None:
        refuse_together(session_given, "without --begin")
    else:
        values.check_name(begin, "a session")
    backup_given = {
        "--backup-unix": backup_unix is not None,
        "--backup-port": backup_port is not None,
    }
    sockets_given = {
        **backup_given,
        "--unix": unix is not None,
        "--ip": ip is not None,
        "--port": port is not None,
        "--socket-mode": socket_mode is not None,
        "--socket-group": socket_group is not None,
        "--run": run is not None,
    }
    addresses = None
    if activated is not None:
        why = "under socket activation (LISTEN_FDS is set): the sockets are there already"
        refuse_together({**sockets_given, "--single": single}, why)
    elif single:
        refuse_together(sockets_given, "with --single: the client is there already")
    else:
        if begin is None:
            refuse_together(backup_given, "without --begin: there are no fleecing exports to show")
        addresses = choose_addresses(
            unix=unix,
            ip=ip,
            port=port,
            backup_unix=backup_unix,
            backup_port=backup_port,
            socket_mode=socket_mode,
            socket_group=socket_group,
            is_private=run is not None,
        )
        check_pidfile_is_no_socket(pidfile, addresses)
    own_client = single or starter is not None or run is not None
    options = ServeOptions(
        disks=values.parse_disks(disk),
        addresses=addresses,
        state_directory=state_directory(state_dir) if begin is not None else None,
        guests_directory=None if own_client else guests_directory(state_dir),
        session=begin,
        session_options=choose_session_options(
            temp_limit=temp_limit,
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error.value if on_cbw_error is not None else None,
            cbw_timeout=cbw_timeout,
        ),
        default_export=default_export,
        read_only=read_only,
        force_share=force_share,
        shared=values.parse_count(shared, "--shared"),
        pidfile=Path(pidfile) if pidfile is not None else None,
        command=run,
    )
    check_default_export(options)
    if options.pidfile is not None:
        check_pidfile(options.pidfile, options.disks)
    client = take_standard_input() if single else None
    return _run(options, Handed(activated, client, starter))


def _run(options: ServeOptions, handed: Handed) -> int:
    keep_buffers_on_the_heap()
    disks = open_disks(options.disks, read_only=options.read_only, force_share=options.force_share)
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(run_server(options, disks, handed))
    finally:
        loop.close()  # waits for nothing: a hung device's call ends with the process
