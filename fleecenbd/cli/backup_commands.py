"""``fleecenbd backup``: its options as they are typed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fleecenbd.cli import values
from fleecenbd.cli.begin_options import (
    CbwTimeout,
    ClusterSize,
    OnCbwError,
    TempLimit,
    begin_body,
)
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_options import FreezeCommand, HookTimeout, IdleTtl, ThawCommand, Ttl
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.pull_commands import (
    SAFE,
    ChecksumOption,
    Connections,
    ProgressFd,
    ProgressOption,
    RateOption,
    Requests,
    Retries,
    Verify,
    descriptor_of,
    progress_mode,
    speed_and_safety,
)
from fleecenbd.cli.temp_choice import temp_fields
from fleecenbd.cli.temp_options import (
    Temp,
    TempDir,
    TempOverwrite,
    TempPrealloc,
    TempReserve,
)

if TYPE_CHECKING:
    from fleecenbd.cli.backup_places import Places
    from fleecenbd.cli.backup_work import CopyDisk
    from fleecenbd.cli.control_client import ControlClient

CHAIN = "What is copied, and what it builds on"
SESSION_NAME = "backup"

HELP = """
Back up disks of a running server as of one moment: begin a session, pull, and finish it.

TARGET is a raw file (sparse), qcow2:PATH, a block device, or an NBD URI. With --all (or --disk) \
there is one FOLDER instead: each run makes a folder in it, named by its moment, with all disks.

A full backup with --bitmap NAME begins a chain; from then on --incremental NAME copies only what \
has changed, into a qcow2 file that builds on the backup before it: qemu-img info --backing-chain \
shows the chain, and qemu-img convert restores from it. Which backup that is, is told by the \
records that backups leave beside them (TARGET.backup.json, session.json), never by dates.

Whatever fails, Ctrl-C included: the session is finished as failed, no change is forgotten, what \
was half made goes, and the next run makes good for it.
"""

EXAMPLES = """
[bold]Examples[/]

fleecenbd backup --all /backup/vm --incremental chain --or-full

fleecenbd backup vda /backup/mon.raw --bitmap chain

fleecenbd backup vda qcow2:/backup/tue.qcow2 --incremental chain

fleecenbd backup vda /backup/vda.raw --incremental chain --in-place --or-full

fleecenbd backup vda a.raw vdb b.raw --verify --rate 100M
"""


def add_backup(app: typer.Typer) -> None:
    """Make it a command of ``fleecenbd``."""
    app.command("backup", cls=StrictCommand, help=HELP, epilog=EXAMPLES)(backup)


def backup(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="DISK TARGET... | FOLDER",
            show_default=False,
            help="Disks, each with its target; or, with --all or --disk, the folder.",
        ),
    ],
    all_disks: Annotated[
        bool, typer.Option("--all", help="All disks of the server, into a folder of FOLDER.")
    ] = False,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DISK",
            show_default=False,
            help="This one, and others, into a folder of FOLDER.",
        ),
    ] = None,
    session: Annotated[
        str, typer.Option(metavar="NAME", help="What the session is called.")
    ] = SESSION_NAME,
    bitmap: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=CHAIN,
            show_default=False,
            help="A full backup that begins a chain in this bitmap.",
        ),
    ] = None,
    incremental: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=CHAIN,
            show_default=False,
            help="Only what has changed, by this bitmap.",
        ),
    ] = None,
    or_full: Annotated[
        bool,
        typer.Option(
            "--or-full",
            rich_help_panel=CHAIN,
            help="With --incremental: a full backup where there is no chain to go on with, as on "
            "the first night.",
        ),
    ] = False,
    onto: Annotated[
        str | None,
        typer.Option(
            metavar="PREVIOUS",
            rich_help_panel=CHAIN,
            show_default=False,
            help="The backup that the increment builds on. Default: the one in TARGET's folder "
            "whose record names the session that the changes are counted from.",
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            rich_help_panel=CHAIN,
            help="Put the increment into TARGET, a raw full backup, once it is whole and durable "
            "beside it: at no moment is there no backup.",
        ),
    ] = False,
    compress: Annotated[
        bool,
        typer.Option(
            "--compress",
            help="Compress qcow2 targets; the full backups of a FOLDER are qcow2 files then, too.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", rich_help_panel=SAFE, help="Write over a target that is there, once whole."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=SAFE,
            help="Go on with the session of a run that was killed. Without it, that session counts "
            "as failed, and a new one is begun.",
        ),
    ] = False,
    roll_forward: Annotated[
        bool,
        typer.Option(
            "--roll-forward",
            rich_help_panel=SAFE,
            help="Only end what a killed run with --in-place has left of these TARGETs; "
            "no server is needed.",
        ),
    ] = False,
    push: Annotated[
        bool,
        typer.Option(
            "--push",
            help="Let the server copy, by a job of its own: it writes TARGET itself, with its own "
            "rights, on its machine. For slow or distant targets; fleecenbd job pause, resume and "
            "rate work on it.",
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
            help="Release by reading, before it is durable: there is no --resume then.",
        ),
    ] = False,
    connections: Connections = None,
    requests: Requests = None,
    rate: RateOption = None,
    retries: Retries = "5",
    verify: Verify = False,
    checksum: ChecksumOption = None,
    progress: ProgressOption = "auto",
    progress_fd: ProgressFd = None,
    on_cbw_error: OnCbwError = None,
    cbw_timeout: CbwTimeout = None,
    temp_limit: TempLimit = None,
    temp_reserve: TempReserve = None,
    cluster_size: ClusterSize = None,
    temp: Temp = None,
    temp_dir: TempDir = None,
    temp_prealloc: TempPrealloc = False,
    temp_overwrite: TempOverwrite = False,
    ttl: Ttl = None,
    idle_ttl: IdleTtl = None,
    freeze_cmd: FreezeCommand = None,
    thaw_cmd: ThawCommand = None,
    hook_timeout: HookTimeout = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            metavar="PATH",
            envvar="FLEECENBD_CONTROL",
            show_default=False,
            show_envvar=True,
            help="The server's control socket. Default: that of a server on the default socket.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was made as JSON, not as a list of files.")
    ] = False,
) -> None:
    # Only here: other commands need neither libnbd nor the loop.
    from fleecenbd.cli import backup_asking, backup_run
    from fleecenbd.cli.backup_copy import PullAsk, PullDisk
    from fleecenbd.cli.backup_push import PushDisk
    from fleecenbd.cli.backup_view import BackupView
    from fleecenbd.cli.backup_work import Ask

    if roll_forward:
        backup_run.roll_forward(words)
        return
    values.check_name(session, "a session")
    if read_once and no_trim:
        raise UsageError("--read-once releases, and --no-trim does not: give one of them")
    mode, name = backup_asking.bitmap(bitmap, incremental, or_full=or_full)
    wishes = backup_asking.Wishes(
        is_incremental=incremental is not None,
        bitmap=name,
        onto=onto,
        in_place=in_place,
        compress=compress,
        checksum=checksum,
        force=force,
    )
    places: Places
    if all_disks or disk:
        places = backup_asking.nights(words, disk, wishes, all_disks=all_disks)
    else:
        places = backup_asking.pairs(words, wishes)
    if not push:  # else it is the server's job to write them
        backup_asking.check_tools(words, wishes)
    ask = Ask(
        session=session,
        body=begin_body(
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
        ),
        bitmap=name,
        mode=mode,
        or_full=or_full,
        resume=resume,
    )
    options = speed_and_safety(
        connections=connections,
        requests=requests,
        rate=rate,
        retries=retries,
        verify=verify,
        checksum=checksum,
    )
    options |= {"trim": not no_trim, "read_once": read_once, "watch_temp": progress != "none"}
    pulls = PullAsk(options, compress=compress, force=force, journal_folder=wishes.journal_folder)
    view = BackupView(progress_mode(progress), descriptor_of(progress_fd))

    def copies(client: ControlClient) -> CopyDisk:
        return PushDisk(pulls, view, client) if push else PullDisk(pulls, view)

    backup_run.run(control, ask, places, copies, view, as_json=as_json)
