"""``fleecenbd bitmap``: recording bitmaps, for incremental backups."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fleecenbd.cli import logs, values
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_commands import AsJson, Control, DiskName, call
from fleecenbd.cli.errors import UsageError
from fleecenbd.engine.recording import check_granularity

bitmap_app = typer.Typer(help="Recording bitmaps: what has changed on a disk, and since when.")

BitmapName = Annotated[str, typer.Argument(metavar="BITMAP", show_default=False)]


def _checked(disk: str, name: str) -> tuple[str, str, str, str]:
    values.check_name(disk, "a disk")
    values.check_name(name, "a bitmap")
    return "disks", disk, "bitmaps", name


def _print_if(as_json: bool, answer: Any) -> None:
    if as_json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))


def _granularity(text: str) -> int:
    count = values.parse_size(text, "--granularity")
    try:
        check_granularity(count)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    return count


@bitmap_app.command("add", cls=StrictCommand)
def add(
    disk: DiskName,
    name: BitmapName,
    granularity: Annotated[
        str | None,
        typer.Option(metavar="SIZE", show_default=False, help="Bytes for each bit. Default: 64k."),
    ] = None,
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Record what changes on a disk from now on."""
    words = _checked(disk, name)
    body = {}
    if granularity is not None:
        body["granularity"] = _granularity(granularity)
    _print_if(as_json, call(control, "PUT", *words, body=body))


@bitmap_app.command("list", cls=StrictCommand)
def list_bitmaps(control: Control = None, as_json: AsJson = False) -> None:
    """The bitmaps of all disks; lost ones, and why."""
    answer = call(control, "GET", "disks")
    found = {disk["name"]: disk["bitmaps"] for disk in answer["disks"]}
    if as_json:
        _print_if(as_json, found)
        return
    from fleecenbd.cli import tables

    tables.show(tables.bitmap_table(found))
    for disk, bitmaps in found.items():
        for bitmap in bitmaps:
            if bitmap["state"] == "lost":
                logs.report(
                    f"warning: bitmap {bitmap['name']} of {disk} is lost: {bitmap['reason']}; "
                    "a full backup is needed (session begin --bitmap-mode use-or-new)"
                )


@bitmap_app.command("clear", cls=StrictCommand)
def clear(
    disk: DiskName, name: BitmapName, control: Control = None, as_json: AsJson = False
) -> None:
    """Forget what has changed until now."""
    _print_if(as_json, call(control, "POST", *_checked(disk, name), "clear"))


@bitmap_app.command("merge", cls=StrictCommand)
def merge(
    disk: DiskName,
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", show_default=False)],
    control: Control = None,
    as_json: AsJson = False,
) -> None:
    """Add to TARGET what changed according to SOURCE."""
    values.check_name(source, "a bitmap")
    words = _checked(disk, target)
    _print_if(as_json, call(control, "POST", *words, "merge", body={"source": source}))


@bitmap_app.command("remove", cls=StrictCommand)
def remove(disk: DiskName, name: BitmapName, control: Control = None) -> None:
    """Record in it no longer. Refused while a session that resets it is not finished."""
    call(control, "DELETE", *_checked(disk, name))
