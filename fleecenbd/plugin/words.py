"""What the plugin tells, in nbdkit's words and through nbdkit's log."""

from __future__ import annotations

import ctypes
import logging
import re
import traceback
from collections.abc import Callable
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any

from fleecenbd.cli.logs import logger as our_logger
from fleecenbd.plugin.parameters import PARAMETERS


class Told(Exception):
    """A callback failed as it may: its text, one line, is all that nbdkit's log is to show."""


_OPTIONS = "|".join(PARAMETERS)
_IN_NBDKITS_WORDS = (
    (re.compile(r"--begin\b"), "session="),
    (re.compile(r" \(serve --shared N admits more\)"), ""),
    (re.compile(r"--(read-only|force-share)\b(?!:)"), r"\1=true"),
    (re.compile(rf"--({_OPTIONS})\b(?=:)"), r"\1"),
    (re.compile(rf"--({_OPTIONS})\b( (?=[A-Z]))?"), r"\1="),
    (re.compile(r"\bwrite \[NAME=\]IMAGE"), "write disk=[NAME=]IMAGE"),
    (re.compile(r"\bwrite NAME="), "write disk=NAME="),
)


def in_nbdkits_words(text: str) -> str:
    """A message of ``serve`` with its options named as our parameters."""
    for pattern, words in _IN_NBDKITS_WORDS:
        text = pattern.sub(words, text)
    return text


def hide_expected_tracebacks() -> None:
    """Let ``Told`` be shown as its text alone.

    nbdkit logs what ``traceback.format_exception`` makes of an exception, and knows no way to
    fail with a message only. The interpreter is this plugin's own.
    """
    original: Callable[..., list[str]] = traceback.format_exception

    def format_exception(*arguments: Any, **options: Any) -> list[str]:
        told = next((each for each in arguments if isinstance(each, Told)), None)
        return [str(told)] if told is not None else original(*arguments, **options)

    traceback.format_exception = format_exception


class _NbdkitHandler(logging.Handler):
    """Warnings and errors go where nbdkit's own go (--log); the rest is shown by nbdkit -v."""

    def __init__(self, debug: Callable[[str], None]) -> None:
        super().__init__()
        self._debug = debug
        self._error = ctypes.CDLL(None).nbdkit_error

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record).replace("\0", "?")
        if record.levelno >= logging.WARNING:
            self._error(b"%s", in_nbdkits_words(text).encode(errors="replace"))
        else:
            self._debug(text)


class Log:
    """Our log, into nbdkit's. ``debug``: nbdkit.debug."""

    def __init__(self, debug: Callable[[str], None]) -> None:
        logging.logThreads = False  # nbdkit's threads are not Python's
        logging.raiseExceptions = False
        self._handler = _NbdkitHandler(debug)
        self._listener: QueueListener | None = None
        root = logging.getLogger()
        root.handlers = [self._handler]
        root.setLevel(logging.WARNING)
        our_logger.setLevel(logging.INFO)

    def start(self) -> None:
        """From now on a thread writes: the event loop must not wait for a log's reader."""
        queue: SimpleQueue[Any] = SimpleQueue()
        self._listener = QueueListener(queue, self._handler)
        logging.getLogger().handlers = [QueueHandler(queue)]
        self._listener.start()

    def stop(self) -> None:
        """Return when all is written; later lines are written by whoever logs them."""
        logging.getLogger().handlers = [self._handler]
        if self._listener is not None:
            self._listener.stop()
