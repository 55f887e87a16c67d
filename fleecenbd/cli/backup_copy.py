"""A disk of a session copied by this process: a pull, shown as one of several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleecenbd.cli import logs
from fleecenbd.cli.backup_view import BackupView
from fleecenbd.cli.backup_work import Work
from fleecenbd.client.changed import changed_bits
from fleecenbd.client.endpoints import check_session
from fleecenbd.client.events import Done, Event, Start
from fleecenbd.client.journal import session_of
from fleecenbd.client.options import Backing, PullOptions, find_places
from fleecenbd.client.pull import pull
from fleecenbd.client.source import open_source
from fleecenbd.engine.bitmap import Bitmap


@dataclass(frozen=True)
class PullAsk:
    """What of the command line is for the pulls."""

    options: dict[str, Any] = field(default_factory=dict)
    """Fields of PullOptions: speed and safety."""
    compress: bool = False
    force: bool = False
    journal_folder: Path | None = None
    """For what is no file."""


class PullDisk:
    """backup_work.CopyDisk."""

    def __init__(self, ask: PullAsk, view: BackupView) -> None:
        self._ask = ask
        self._view = view

    def begins(self, works: Sequence[Work]) -> None:
        self._view.begins(works)

    def options(self, work: Work) -> PullOptions:
        """The pull of one disk, but for whether it goes on with another."""
        destination = work.destination
        return PullOptions(
            source=work.uri,
            session_id=work.session_id,
            target=destination.target,
            force=self._ask.force and destination.staged is None,
            bitmap=work.answer["bitmap"]["name"] if work.dirty_only else None,
            compress=self._ask.compress and destination.format == "qcow2",
            backing=_backing(work),
            journal_folder=self._ask.journal_folder,
            keep=destination.staged is not None,
            **self._ask.options,
        )

    async def __call__(self, work: Work) -> Done:
        options = self.options(work)
        if work.is_resumed and has_begun(options, work.session_id):
            options = replace(options, resume=True)
        with self._view.of(work) as show:

            def told(event: Event) -> None:
                if isinstance(event, Start):
                    work.has_started = True
                show(event)

            return await pull(options, told)

    async def changed(self, work: Work) -> Bitmap:
        own = work.answer["bitmap"]
        source = await open_source(
            work.uri,
            contexts=(f"qemu:dirty-bitmap:{own['name']}",),
            connections=1,
            requests=None,
            retries=self._ask.options["retries"],
            tell=logs.report,
        )
        try:
            check_session(source, work.session_id)
            return await changed_bits(source, own["name"], own["granularity"])
        finally:
            with suppress(OSError):
                await source.close()


def has_begun(options: PullOptions, session_id: str) -> bool:
    """Whether there is a pull to go on with: that of a device may be long over."""
    places = find_places(options)
    try:
        content = Path(places.journal).read_bytes()
    except FileNotFoundError:
        return False
    return places.file is not None or session_of(content) == session_id


def _backing(work: Work) -> Backing | None:
    backing, previous = work.destination.backing, work.destination.previous
    if backing is None or previous is None:
        return None
    return Backing(backing, previous.disk.format)
