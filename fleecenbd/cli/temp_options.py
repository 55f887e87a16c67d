"""Options about temp images, as typer has them."""

from __future__ import annotations

from typing import Annotated

import typer

from fleecenbd.server.temp_place import QCOW2, RAW

TEMPS = "Temp images"

Temp = Annotated[
    str | None,
    typer.Option(
        "--temp",
        metavar=f"{RAW}|{QCOW2}|URI",
        rich_help_panel=TEMPS,
        show_default=False,
        help="What old data is kept in: sparse files, qcow2 files over the disk (kept by a "
        "qemu-storage-daemon), or an export of an NBD server, larger than the disk by 1 MiB, for "
        "each disk and session one: {disk} and {session} in the URI stand for their names. "
        "Default: raw.",
    ),
]
TempDir = Annotated[
    str | None,
    typer.Option(
        "--temp-dir",
        metavar="PATH",
        rich_help_panel=TEMPS,
        show_default=False,
        help="Folder for their files, which is there. Default: the state directory.",
    ),
]
TempPrealloc = Annotated[
    bool,
    typer.Option(
        "--temp-prealloc",
        rich_help_panel=TEMPS,
        help="Take all of their space at the start, a whole disk for each, so that it cannot run "
        "out. What is released is freed.",
    ),
]
TempReserve = Annotated[
    str | None,
    typer.Option(
        "--temp-reserve",
        metavar="SIZE|none",
        rich_help_panel=TEMPS,
        show_default=False,
        help="What the temp images' file system keeps free: what would take more counts as a full "
        "temp image. Default: 5 % of it, 1G at least.",
    ),
]
TempOverwrite = Annotated[
    bool,
    typer.Option(
        "--temp-overwrite",
        rich_help_panel=TEMPS,
        help="The export at the URI may hold data, which goes. Default: it is refused.",
    ),
]
