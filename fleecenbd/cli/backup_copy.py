"""A disk of a session copied by this process: a pull, shown as one of several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleecenbd.cli import logs
from fleecenbd.cli.backup_view import BackupView
from fleecenbd.cli.backup_work import Work
from fleecenbd.client.changed import changed_bits
from fleecenbd.client.events import Done, Event, Start
from fleecenbd.client.options import JOURNAL_SUFFIX, Backing, PullOptions
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

    async def __call__(self, work: Work) -> Done:
        destination = work.destination
        options = PullOptions(
            source=work.uri,
            target=destination.target,
            force=self._ask.force and destination.staged is None,
            resume=work.is_resumed and _has_begun(destination.staged),
            bitmap=work.answer["bitmap"]["name"] if work.dirty_only else None,
            compress=self._ask.compress and destination.format == "qcow2",
            backing=_backing(work),
            journal_folder=self._ask.journal_folder,
            keep=destination.staged is not None,
            **self._ask.options,
        )
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
            return await changed_bits(source, own["name"], own["granularity"])
        finally:
            with suppress(OSError):
                await source.close()


def _has_begun(staged: Path | None) -> bool:
    return staged is not None and os.path.exists(f"{staged}{JOURNAL_SUFFIX}")


def _backing(work: Work) -> Backing | None:
    backing, previous = work.destination.backing, work.destination.previous
    if backing is None or previous is None:
        return None
    return Backing(backing, previous.disk.format)
