"""A pull as a command: signals, what stdin says, the exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import uvloop

from fleecenbd.cli import logs
from fleecenbd.cli.errors import CommandError, one_line
from fleecenbd.cli.process import keep_buffers_on_the_heap, start_collecting
from fleecenbd.cli.pull_view import PullView
from fleecenbd.client.controls import Controls
from fleecenbd.client.endpoints import OpenTarget
from fleecenbd.client.events import Event, Failed
from fleecenbd.client.options import PullOptions
from fleecenbd.client.pull import pull
from fleecenbd.client.telling import text_of

INTERRUPTED = 130
TERMINATED = 1
"""Exit statuses after SIGINT (and ``cancel``), and after SIGTERM and SIGHUP."""
LEFT_ALONE_S = 30.0
"""Seconds that a pull may go on once nobody is left who could end it."""

Result = TypeVar("Result")


class Interrupted(CommandError):
    """A signal, or a word on stdin, has ended it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_pull(
    options: PullOptions,
    view: PullView,
    *,
    commands: bool = False,
    open_target: OpenTarget | None = None,
) -> None:
    """Pull to the end. Raises CommandError, with the exit status in it.

    ``commands``: stdin has lines of JSON that pause it, resume it, limit it or cancel it.
    """
    kept: list[str | None] = [None]

    def told(event: Event) -> None:
        if isinstance(event, Failed):
            kept[0] = event.kept
        view(event)

    controls = Controls(options.rate)

    def keep() -> None:
        # It may be for the server, too, whose session lasts: systemd signals all of a unit.
        controls.keeps = commands

    async def work() -> object:
        if commands:
            task = asyncio.current_task()
            assert task is not None, "this is one"
            listen(controls, task)
        return await pull(options, told, controls=controls, open_target=open_target)

    try:
        with view:
            run_until_signal(work, signalled=keep)
    except Interrupted as error:
        raise Interrupted(f"interrupted{_what_stays(kept[0], options)}", error.status) from None
    except OSError as error:
        text = text_of(error)
        raise CommandError(f"{text}{_what_stays(kept[0], options)}") from error


def _what_stays(kept: str | None, options: PullOptions) -> str:
    if kept is None:
        return ""
    if options.read_once:
        return f"; {kept} keeps what is durable; what was read once and is not cannot be had again"
    return f"; {kept} keeps what is durable: --resume goes on with it while the session lives"


def run_until_signal(
    work: Callable[[], Awaitable[Result]], *, signalled: Callable[[], None] = lambda: None
) -> Result:
    """Run it on a loop of its own, as the main task. SIGINT and SIGTERM cancel it, and SIGHUP,
    unless that is ignored (nohup).

    ``signalled``: called before the first of these cancels it, if nobody else has. Raises
    Interrupted where it was cancelled, and what it raises itself.
    """
    keep_buffers_on_the_heap()
    start_collecting()
    status = INTERRUPTED

    async def main() -> Result:
        nonlocal status
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(logs.loop_exception)
        task = asyncio.current_task()
        assert task is not None, "this is one"

        def stop(signal_status: int) -> None:
            nonlocal status
            status = signal_status
            if not task.cancelling():
                signalled()
            task.cancel()

        loop.add_signal_handler(signal.SIGINT, stop, INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, stop, TERMINATED)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, stop, TERMINATED)
        return await work()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise Interrupted("interrupted", status) from None


def listen(controls: Controls, task: asyncio.Task[Any]) -> None:
    """Obey what stdin says, line by line, in a thread; its end cancels the task.

    At its end whoever started this has gone, or is going: what is durable is kept for its next
    life, and if the pull hangs, the kernel ends it.
    """
    loop = asyncio.get_running_loop()

    def left_alone() -> None:
        controls.keeps = True
        task.cancel()

    def read() -> None:
        stdin = sys.stdin
        for line in stdin if stdin is not None else ():
            loop.call_soon_threadsafe(obey, line, controls, task)
        signal.setitimer(signal.ITIMER_REAL, LEFT_ALONE_S)  # SIGALRM: no handler, none needed
        try:
            loop.call_soon_threadsafe(left_alone)
        except RuntimeError:
            return  # the pull has ended, and its loop is closed

    threading.Thread(target=read, name="commands", daemon=True).start()


def obey(line: str, controls: Controls, task: asyncio.Task[Any]) -> None:
    """One line: {"command":"pause"}, resume, rate with bytes_per_s, keep (what is durable,
    however it ends), or cancel."""
    try:
        words = json.loads(line)
        command = words["command"]
        if command == "pause":
            controls.pause()
        elif command == "resume":
            controls.resume()
        elif command == "rate":
            rate = words["bytes_per_s"]
            if rate is not None and not float(rate) > 0:
                raise ValueError("bytes_per_s is more than 0, or null")
            controls.set_rate(None if rate is None else float(rate))
        elif command == "keep":
            controls.keeps = True
        elif command == "cancel":
            task.cancel()
        else:
            raise ValueError(f"there is no command {command!r}")
    except (ValueError, KeyError, TypeError) as error:
        logs.report(f"a line on stdin is no command: {one_line(line)}: {error}")
