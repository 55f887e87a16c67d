"""``fleecenbd events``: what happens in a server, as it happens."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleecenbd.cli import logs, values
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.control_commands import Control
from fleecenbd.cli.errors import CommandError, UsageError
from fleecenbd.server.events import EVENTS_LOST, KINDS

if TYPE_CHECKING:
    from fleecenbd.cli.control_client import ControlClient

EXAMPLES = """
[bold]Examples[/]

fleecenbd events

fleecenbd events --session nightly --json

fleecenbd events --kind temp-low --kind temp-full --count 1 && echo 'the backup should hurry'
"""


def add_events(app: typer.Typer) -> None:
    """Make it a command of ``fleecenbd``."""
    app.command("events", cls=StrictCommand, epilog=EXAMPLES)(events)


def events(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            show_default=False,
            help=f"Only these; may be given more than once. There are {', '.join(KINDS)}.",
        ),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(metavar="SESSION", show_default=False, help="Only what is about it."),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(metavar="DISK", show_default=False, help="Only what is about it."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="End after so many. Default: with the server.",
        ),
    ] = None,
    control: Control = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each as the server tells it: a line of JSON.")
    ] = False,
) -> None:
    """What happens from now on, a line each: sessions, clients, disks, temp images, jobs.

    Temp images that fill up, guests that are throttled, sessions that break and bitmaps that are
    lost are told here as they are in the server's log. "listening" on standard error says that
    from then on nothing is missed. Ctrl-C ends it.
    """
    wanted = _Wanted(kind or (), session, disk)
    # Only here: it takes longer to import than most calls take.
    from fleecenbd.cli.control_client import call_server

    try:
        call_server(control, lambda client: _follow(client, wanted, count, as_json))
    except KeyboardInterrupt:
        sys.stdout.flush()
        if count is not None:
            raise


async def _follow(client: ControlClient, wanted: _Wanted, count: int | None, as_json: bool) -> None:
    shown = 0
    async with client.events() as told:
        logs.report(f"listening to the server at {client.path}")
        async for event in told:
            if not wanted.takes(event):
                continue
            print(json.dumps(event, ensure_ascii=False) if as_json else _line(event), flush=True)
            shown += event["event"] != EVENTS_LOST
            if shown == count:
                return
    stopped = f"the server at {client.path} has stopped"
    if count is not None:
        raise CommandError(f"{stopped}, after {shown} of {count} events")
    logs.report(stopped)


class _Wanted:
    """Which events are asked for. That some were lost is told to everybody."""

    def __init__(self, kinds: Sequence[str], session: str | None, disk: str | None) -> None:
        """Raises UsageError for what there cannot be."""
        for kind in kinds:
            if kind not in KINDS:
                raise UsageError(f"--kind {kind}: there is no such event; --help lists them")
        if session is not None:
            values.check_name(session, "a session")
        if disk is not None:
            values.check_name(disk, "a disk")
        self._kinds = kinds
        self._session = session
        self._disk = disk

    def takes(self, event: Mapping[str, Any]) -> bool:
        if event["event"] == EVENTS_LOST:
            return True
        if self._kinds and event["event"] not in self._kinds:
            return False
        session, disks = event.get("session"), event.get("disks", [event.get("disk")])
        if "export" in event:
            # DISK, DISK@SESSION or DISK@SESSION+once; names have neither sign.
            disk, _, rest = event["export"].partition("@")
            session, disks = rest.partition("+")[0] or None, [disk]
        return (self._session in (None, session)) and (self._disk is None or self._disk in disks)


def _line(event: Mapping[str, Any]) -> str:
    # Only here: what it is made of takes long to import.
    from fleecenbd.cli.event_lines import line

    return line(event)
