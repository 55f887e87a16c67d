"""A backup as a command: its loop, its signals, what it prints, its exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fleecenbd.cli import logs
from fleecenbd.cli.backing_up import Backup
from fleecenbd.cli.backup_places import Places
from fleecenbd.cli.backup_view import BackupView, show, show_failed
from fleecenbd.cli.backup_work import Ask, CopyDisk, Outcome
from fleecenbd.cli.control_client import ControlClient, with_client
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.pulling import run_until_signal
from fleecenbd.client import in_place
from fleecenbd.client.telling import text_of


def run(
    control: str | None,
    ask: Ask,
    places: Places,
    copies: Callable[[ControlClient], CopyDisk],
    view: BackupView,
    *,
    as_json: bool,
) -> None:
    """Make the backup. Raises CommandError, with the exit status in it."""

    async def work(client: ControlClient) -> Outcome:
        return await Backup(client, ask, places, copies(client)).run()

    try:
        outcome = run_until_signal(lambda: with_client(control, work))
    except OSError as error:
        show_failed(ask.session, text_of(error), view, with_json=as_json)
        raise CommandError(text_of(error)) from error
    except CommandError as error:
        show_failed(ask.session, str(error), view, with_json=as_json)
        raise
    if outcome.error is None:
        view.ends()
    show(outcome, view, with_json=as_json)
    if outcome.error is not None:
        raise CommandError(
            f"the backup is whole, but session {outcome.session} could not be finished: "
            f"{outcome.error}; the next backup finishes it. Until then the server keeps old data, "
            "and if it ends otherwise the next increment builds on the backup before this one"
        )


def roll_forward(targets: Sequence[str]) -> None:
    """Put what is pending into each target. Raises CommandError."""
    for target in targets:
        path = Path(target.removeprefix("raw:"))
        try:
            record = in_place.roll_forward(path)
        except OSError as error:
            raise CommandError(text_of(error)) from error
        if record is None and not path.exists():
            raise CommandError(f"{path}: there is no such file, and nothing pending for it")
        if record is None:
            logs.report(f"{path}: nothing is pending")
        else:
            logs.report(f"{path}: is the backup of session {record.id} now")
