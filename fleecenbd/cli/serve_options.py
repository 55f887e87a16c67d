"""Options of ``serve`` about its disks, and its first session, as typer has them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from fleecenbd.cli.disk_options import IGNORE, NONE, UNMAP, WRITEBACK

DISKS = "Disks and exports"
SESSION = "A session from the start"


class Cache(StrEnum):
    """--cache."""

    none = NONE
    writeback = WRITEBACK


CacheMode = Annotated[
    Cache | None,
    typer.Option(
        "--cache",
        rich_help_panel=DISKS,
        show_default=False,
        help="How raw images are opened: through the page cache, or past it (O_DIRECT), which "
        f"tmpfs refuses. Default: {WRITEBACK}.",
    ),
]
Discard = Annotated[
    list[str] | None,
    typer.Option(
        "--discard",
        metavar=f"[NAME=]{UNMAP}|{IGNORE}",
        rich_help_panel=DISKS,
        show_default=False,
        help="Whether what guests discard is freed: for all disks, or for disk NAME; as often as "
        f"needed. With {IGNORE} a TRIM succeeds and does nothing, and zeroes hold their space. "
        f"Default: {UNMAP}.",
    ),
]
DefaultExport = Annotated[
    str | None,
    typer.Option(
        "-e",
        "--default-export",
        metavar="NAME",
        rich_help_panel=DISKS,
        show_default=False,
        help="The export that the empty name means. Default: it is refused; but with --single "
        "or socket activation (libnbd's \\[ ]), over one disk and a session, it means the "
        "fleecing export. Over several disks it is refused there, too, and the log says so.",
    ),
]
FirstTempLimit = Annotated[
    str | None,
    typer.Option(
        "--temp-limit",
        metavar="SIZE",
        rich_help_panel=SESSION,
        show_default=False,
        help="Most that one disk's temp image may hold. Default: no limit.",
    ),
]
FirstClusterSize = Annotated[
    str | None,
    typer.Option(
        "--cluster-size",
        metavar="SIZE",
        rich_help_panel=SESSION,
        show_default=False,
        help="Unit of copying, a power of two. Default: 4k, more for disks past 256 GiB.",
    ),
]
