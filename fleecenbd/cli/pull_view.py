"""How a pull is shown: a bar, JSON lines, lines of N/100; and the sentence at its end."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fleecenbd.cli import logs
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.tables import duration, size
from fleecenbd.client import events

if TYPE_CHECKING:
    from fleecenbd.client.events import Event

MODES = ("auto", "bar", "json", "none")
STDOUT = 1
BAR_WIDTH_MIN = 10
BAR_WIDTH_MAX = 40
FACTS_WIDTH = 72
"""Columns, of the bar and of all that stands beside it."""


UNSEEN = (OSError, SystemExit)
"""What drawing raises once the window was closed (nohup, disown); of a pipe, rich makes SystemExit.
It ends no backup."""


class PullView:
    """Called with each event (``events.OnEvent``), while it is entered."""

    def __init__(self, mode: str, progress_fd: int | None = None, *, stdout: int = STDOUT) -> None:
        """``mode``: one of MODES; ``progress_fd``: a descriptor that gets lines of N/100."""
        self.is_json = mode == "json"
        self._says_much = mode != "none"
        with_bar = mode == "bar" or (mode == "auto" and sys.stderr is not None and _is_terminal())
        self._bar = _Bar() if with_bar else None
        self._percent = None if progress_fd is None else _Percent(progress_fd)
        self._json = _Lines(stdout) if self.is_json else None

    def __enter__(self) -> PullView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if self._json is not None:
            self._json.write(event, may_drop=isinstance(event, events.Progress))
        if self._percent is not None:
            self._percent.show(event)
        if self._bar is not None:
            self._bar.show(event)
        if self.is_json:
            return
        if isinstance(event, events.Note):
            logs.report(event.text)
        elif isinstance(event, events.Done) and self._says_much:
            if self._bar is not None:
                self._bar.stop()
            logs.report(summary(event))


def summary(done: events.Done) -> str:
    """One line."""
    rate = done.read / done.elapsed_s if done.elapsed_s > 0 else 0.0
    text = (
        f"done: {size(done.durable)} durable in {duration(done.elapsed_s)}, {size(done.read)} read "
        f"({size(int(rate))}/s), {size(done.released)} released"
    )
    if done.temp_peak is not None:
        text += f", temp image {size(done.temp_peak)} at most when looked at"
    if done.checksum is not None:
        text += f", {done.checksum.algorithm} {done.checksum.root}"
    if done.verified:
        text += ", read back and found right"
    return text


def check_descriptor(descriptor: int) -> int:
    """Can it be written to? Raises UsageError."""
    try:
        os.fstat(descriptor)
    except OSError as error:
        raise UsageError(f"--progress-fd: {descriptor}: {error.strerror}") from None
    return descriptor


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except ValueError:  # closed
        return False


class _Lines:
    """JSON lines to whoever reads them. A reader who does not keep up misses progress, and one
    who has gone misses all: a backup goes on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._is_gone = False

    def write(self, event: Event, *, may_drop: bool) -> None:
        if self._is_gone or (may_drop and not self._poll.poll(0)):
            return
        line = memoryview(msgspec.json.encode(event) + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            self._is_gone = True


class _Percent:
    """``N/100``, a line for each percent, as nbdcopy --progress=FD writes them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._last = -1

    def show(self, event: Event) -> None:
        if isinstance(event, events.Done):
            percent = 100
        elif isinstance(event, events.Progress):
            # 100 is for what is complete.
            percent = min(99, 100 * event.durable // event.to_copy) if event.to_copy else 99
        else:
            return
        if percent > self._last:
            self._last = percent
            with suppress(OSError):
                os.write(self._descriptor, b"%d/100\n" % percent)


class _Bar:
    """A line on the terminal, drawn anew with each event of progress."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(
                bar_width=max(BAR_WIDTH_MIN, min(BAR_WIDTH_MAX, console.width - FACTS_WIDTH))
            ),
            _Facts(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("pull", total=None, facts="")

    def start(self) -> None:
        with suppress(*UNSEEN):
            self._progress.start()

    def stop(self) -> None:
        with suppress(*UNSEEN):
            self._progress.stop()

    def show(self, event: Event) -> None:
        if not isinstance(event, events.Progress):
            return
        with suppress(*UNSEEN):
            self._progress.update(
                self._task,
                completed=event.durable,
                total=event.to_copy,
                facts=facts(event),
                refresh=True,
            )


class _Facts(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"], no_wrap=True)


def facts(event: events.Progress) -> str:
    """What stands beside the bar."""
    parts = [f"{size(event.durable)} of {size(event.to_copy)}", f"{size(int(event.rate))}/s"]
    if event.paused:
        parts.append("paused")
    elif event.eta_s is not None and event.durable < event.to_copy:
        parts.append(f"{duration(event.eta_s)} left")
    if event.temp_bytes is not None:
        parts.append(f"temp {size(event.temp_bytes)}")
    return "  ".join(parts)
