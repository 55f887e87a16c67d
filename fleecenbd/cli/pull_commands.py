"""``fleecenbd pull``: its options as they are typed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fleecenbd.cli import logs, values
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.places import default_state_directory, make_private_directory
from fleecenbd.cli.target_words import check_target, is_no_file

SPEED = "How fast"
SAFE = "What is safe, and what is left"
SHOWN = "What is shown"

COUNT_MAX = 1024
CONNECTIONS_MAX = 16
"""Of one pull: a server has places for 90 backup clients in all, and none would be faster."""

_NBD_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")

HELP = """
Copy a disk as it was, and release on the way what is safe, so that the server need not keep it.

URI is a fleecing export, as fleecenbd session begin prints it: the guest goes on using the disk \
meanwhile. Any other NBD export can be copied, too; then nothing is released.

TARGET is a raw file (sparse) or a block device, qcow2:PATH, or an NBD URI. A file is written \
under the name TARGET.part, and gets its own when it is whole.

The order is everything: read, write, make durable, note in the journal (TARGET.journal), and only \
then release by TRIM. So it can be killed, and so can the server, at any moment: with --resume it \
goes on where it was, in the same session.
"""

EXAMPLES = """
[bold]Examples[/]

fleecenbd pull 'nbd+unix:///vda@nightly?socket=/run/vm.sock' /backup/vda.raw

fleecenbd pull --resume 'nbd+unix:///vda@nightly?socket=/run/vm.sock' /backup/vda.raw

fleecenbd pull --checksum blake2b --verify --rate 100M nbd://host/vda@nightly qcow2:vda.qcow2

fleecenbd pull --bitmap chain --force 'nbd+unix:///vda@tue?socket=/run/vm.sock' /dev/backup/vda
"""

Connections = Annotated[
    str | None,
    typer.Option(
        "--connections",
        metavar="N",
        rich_help_panel=SPEED,
        show_default=False,
        help="Connections to the source, where it admits several. Default: up to 4, as many as "
        "there are cores.",
    ),
]
Requests = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="N",
        rich_help_panel=SPEED,
        show_default=False,
        help="READs in flight, over all connections.",
    ),
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        metavar="SIZE",
        rich_help_panel=SPEED,
        show_default=False,
        help="Bytes a second that are read, as in 100M. Default: no limit.",
    ),
]
Retries = Annotated[
    str,
    typer.Option(
        "--retries",
        metavar="N",
        rich_help_panel=SAFE,
        help="How often in a row a connection that was dropped is made anew (after 0.1 s, 0.2 s, "
        "and so on up to 10 s: 5 are about 3 s in all, and 10 about 43 s).",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        rich_help_panel=SAFE,
        help="Read the target back at the end, and compare, before it gets its name.",
    ),
]
ChecksumOption = Annotated[
    str | None,
    typer.Option(
        "--checksum",
        metavar="ALGORITHM",
        rich_help_panel=SAFE,
        show_default=False,
        help="blake2b, sha256, and others: of what was read, into TARGET.ALGORITHM.",
    ),
]
ProgressOption = Annotated[
    str,
    typer.Option(
        "--progress",
        metavar="auto|bar|json|none",
        rich_help_panel=SHOWN,
        help="A bar on standard error (auto: where that is a terminal); JSON lines on standard "
        "output; or nothing but what goes wrong.",
    ),
]
ProgressFd = Annotated[
    str | None,
    typer.Option(
        "--progress-fd",
        metavar="FD",
        rich_help_panel=SHOWN,
        show_default=False,
        help="Write lines of N/100 to this file descriptor, as nbdcopy does.",
    ),
]


def add_pull(app: typer.Typer) -> None:
    """Make it a command of ``fleecenbd``."""
    app.command("pull", cls=StrictCommand, help=HELP, epilog=EXAMPLES)(pull)


def pull(
    uri: Annotated[str, typer.Argument(metavar="URI", show_default=False, help="What to copy.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", show_default=False, help="Where to.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            rich_help_panel=SAFE,
            help="Write over what is there: a file, a block device that holds something, or a "
            "pull that has not ended (what that has released can be read nowhere else).",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=SAFE,
            help="Go on with a pull that has not ended. Refused in another session. A source that "
            "tells no session needs --force besides: you say that it is still the same.",
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
            help="Release by reading (the export's name and +once), not by TRIM: before it is "
            "durable here. What was read and lost, by a kill or a broken connection, cannot be "
            "read again, and --resume is refused then.",
        ),
    ] = False,
    journal: Annotated[
        str | None,
        typer.Option(
            "--journal",
            metavar="FILE",
            rich_help_panel=SAFE,
            show_default=False,
            help="Where it is noted what is durable. Default: TARGET.journal; for block devices "
            "and NBD URIs a file in pulls/ in the state directory.",
        ),
    ] = None,
    bitmap: Annotated[
        str | None,
        typer.Option(
            "--bitmap",
            metavar="NAME",
            show_default=False,
            help="Copy only what is dirty in this bitmap of the session. The rest of a device or "
            "an NBD export is left alone; a file is a new one, with holes there (for increments: "
            "fleecenbd backup).",
        ),
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress the clusters of a qcow2: target.")
    ] = False,
    connections: Connections = None,
    requests: Requests = None,
    rate: RateOption = None,
    retries: Retries = "5",
    verify: Verify = False,
    checksum: ChecksumOption = None,
    progress: ProgressOption = "auto",
    progress_fd: ProgressFd = None,
    no_keep: Annotated[
        bool,
        typer.Option(
            "--no-keep",
            hidden=True,
            help="Leave nothing behind where it fails or is cancelled: its session ends with it.",
        ),
    ] = False,
    session_id: Annotated[
        str | None,
        typer.Option(
            "--session-id",
            metavar="UUID",
            hidden=True,
            help="The only session that will do: a name is another one's once its own is over.",
        ),
    ] = None,
    backing: Annotated[
        str | None,
        typer.Option(
            "--backing",
            metavar="FILE",
            hidden=True,
            help="The backing file that a qcow2: target names, seen from the target's folder.",
        ),
    ] = None,
    backing_format: Annotated[
        str | None, typer.Option("--backing-format", metavar="raw|qcow2", hidden=True)
    ] = None,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands",
            hidden=True,
            help="Lines of JSON on stdin: pause, resume, rate, keep, cancel; its end cancels, "
            "and keeps.",
        ),
    ] = False,
) -> None:
    # Only here: other commands need neither libnbd nor the loop.
    from fleecenbd.cli.pulling import run_pull
    from fleecenbd.client.options import Backing, PullOptions

    if not _NBD_URI.match(uri):
        raise UsageError(
            f"{uri!r} is no NBD URI, as in nbd+unix:///vda@nightly?socket=/run/vm.sock; "
            "fleecenbd session begin prints those of a session"
        )
    check_target(target)
    if read_once and no_trim:
        raise UsageError("--read-once releases, and --no-trim does not: give one of them")
    if compress and not target.startswith("qcow2:"):
        raise UsageError(f"--compress is for qcow2: targets, and {target} is none")
    if bitmap is not None:
        values.check_name(bitmap, "a bitmap")
    folder = journal_folder() if journal is None and is_no_file(target) else None
    options = PullOptions(
        source=uri,
        target=target,
        force=force,
        resume=resume,
        session_id=session_id,
        trim=not no_trim,
        read_once=read_once,
        bitmap=bitmap,
        compress=compress,
        backing=None if backing is None else Backing(backing, backing_format or "raw"),
        journal=journal,
        journal_folder=folder,
        keep=not no_keep,
        **speed_and_safety(
            connections=connections,
            requests=requests,
            rate=rate,
            retries=retries,
            verify=verify,
            checksum=checksum,
        ),
        watch_temp=progress != "none",
    )
    if bitmap is not None and backing is None and not (commands or is_no_file(target)):
        logs.report(
            f"only what changed in {bitmap} is copied: the rest of {target} will read as zeroes, "
            "and it is no whole disk"
        )
    run_pull(options, view_of(progress, progress_fd), commands=commands)


def journal_folder() -> Path:
    """Where the journals of targets are that are no files. Raises UsageError."""
    folder = default_state_directory(os.environ, os.geteuid()) / "pulls"
    try:
        make_private_directory(folder)
    except OSError as error:
        raise UsageError(
            f"the journal has no place: {folder}: {error.strerror}; give one with --journal"
        ) from None
    return folder


def speed_and_safety(
    *,
    connections: str | None,
    requests: str | None,
    rate: str | None,
    retries: str,
    verify: bool,
    checksum: str | None,
) -> dict[str, Any]:
    """Fields of PullOptions. Raises UsageError."""
    from fleecenbd.client.checksums import algorithms

    if checksum is not None and checksum not in algorithms():
        raise UsageError(f"--checksum is one of {', '.join(algorithms())}, not {checksum!r}")
    bytes_per_s = None
    if rate is not None:
        bytes_per_s = values.parse_size(rate, "--rate")
        if not bytes_per_s:
            raise UsageError("--rate: 0 bytes a second would never end; leave it out for no limit")
    return {
        "connections": _count(connections, "--connections", most=CONNECTIONS_MAX),
        "requests": _count(requests, "--requests"),
        "retries": _count(retries, "--retries", least=0),
        "rate": bytes_per_s,
        "verify": verify,
        "checksum": checksum,
    }


def view_of(progress: str, progress_fd: str | None) -> Any:
    """The PullView that is asked for. Raises UsageError."""
    from fleecenbd.cli.pull_view import PullView

    return PullView(progress_mode(progress), descriptor_of(progress_fd))


def progress_mode(text: str) -> str:
    """Raises UsageError."""
    from fleecenbd.cli.pull_view import MODES

    if text not in MODES:
        raise UsageError(f"--progress is one of {', '.join(MODES)}, not {text!r}")
    return text


def descriptor_of(text: str | None) -> int | None:
    """A descriptor that can be written to. Raises UsageError."""
    from fleecenbd.cli.pull_view import check_descriptor

    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"--progress-fd: {text!r} is no file descriptor")
    return check_descriptor(int(text))


def _count(text: str | None, option: str, *, least: int = 1, most: int = COUNT_MAX) -> int | None:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UsageError(f"{option}: {text!r} is no number from {least} to {most}")
    return int(text)
