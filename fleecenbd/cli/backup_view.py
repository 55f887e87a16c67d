"""How a backup is shown: each disk as a pull is, percents over all of them, and what was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec

from fleecenbd.cli import logs
from fleecenbd.cli.backup_sessions import FAILED
from fleecenbd.cli.backup_work import Outcome, Work
from fleecenbd.cli.pull_view import PullView
from fleecenbd.cli.tables import size
from fleecenbd.client.events import Done, Event, OnEvent, Progress


class BackupView:
    """Makes a view for one disk after the other."""

    def __init__(self, progress: str, progress_fd: int | None) -> None:
        self.mode = progress
        self._percent = None if progress_fd is None else PullView("none", progress_fd)
        self._before = 0
        self._total = 0
        self.says_much = progress != "none"

    def begins(self, works: Sequence[Work]) -> None:
        """All that will be copied."""
        self._total = sum(work.to_copy for work in works)

    @contextmanager
    def of(self, work: Work) -> Iterator[OnEvent]:
        """While one disk is copied."""
        if self.says_much:
            logs.report(f"{work.disk}: {_what(work)}")
        with PullView(self.mode) as view:

            def told(event: Event) -> None:
                view(event)
                if self._percent is not None and isinstance(event, Progress):
                    durable = min(self._before + event.durable, self._total)
                    self._percent(
                        msgspec.structs.replace(event, durable=durable, to_copy=self._total)
                    )

            yield told
        self._before += work.to_copy

    def ends(self) -> None:
        """The backup is whole."""
        if self._percent is not None:
            self._percent(Done(self._total, 0, 0, 0.0, None, verified=False))


def _what(work: Work) -> str:
    destination, own = work.destination, work.answer["bitmap"]
    if destination.previous is None:
        text = f"a full backup, {destination.shown}"
        if own is not None and own["reason"] is not None:
            text += f" ({own['reason']})"
        return text
    text = f"what has changed, about {size(work.to_copy)}"
    if destination.in_place:
        return f"{text}, into {destination.shown}"
    return f"{text}, {destination.shown}, on {destination.previous.path}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "session": outcome.session,
        "id": outcome.session_id,
        "armed_at": outcome.armed_at,
        "result": outcome.result,
        "error": outcome.error,
        "elapsed_s": round(outcome.elapsed_s, 3),
        "warnings": outcome.warnings,
        "files": [str(path) for path in outcome.files],
        "disks": [_disk(work) for work in outcome.works],
    }


def _disk(work: Work) -> Mapping[str, Any]:
    destination, own, done = work.destination, work.answer["bitmap"], work.done
    return {
        "disk": work.disk,
        "size": work.answer["size"],
        "target": destination.target if work.file is None else str(work.file),
        "format": destination.format,
        "kind": "full" if destination.previous is None else "increment",
        "in_place": destination.in_place,
        "reason": None if own is None else own["reason"],
        "onto": None if destination.previous is None else str(destination.previous.path),
        "done": None if done is None else msgspec.to_builtins(done),
    }


def show_failed(session: str, error: str, view: BackupView, *, with_json: bool) -> None:
    """There is no backup: on standard output that is told to machines only."""
    told = {"session": session, "result": FAILED, "error": error, "files": []}
    if view.mode == "json":
        print(json.dumps({"event": "backup", **told}, ensure_ascii=False))
    elif with_json:
        print(json.dumps(told, ensure_ascii=False, indent=2))


def show(outcome: Outcome, view: BackupView, *, with_json: bool) -> None:
    """The files on standard output, one a line, and a sentence; or all of it as JSON."""
    if view.mode == "json":
        print(json.dumps({"event": "backup", **as_json(outcome)}, ensure_ascii=False))
    elif with_json:
        print(json.dumps(as_json(outcome), ensure_ascii=False, indent=2))
    else:
        for path in outcome.files:
            print(path)
    if view.says_much and outcome.error is None and outcome.works:
        moment = datetime.fromtimestamp(outcome.armed_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        disks = ", ".join(work.disk for work in outcome.works)
        logs.report(f"the backup of {disks} as of {moment} is whole")
