"""Log lines on standard error, for people or (``--json-log``) for machines.

A log must not stop a server: nobody reading standard error, or the reader being gone, costs log
lines and nothing else. So a line is written only where that cannot block; what was lost is
counted and told later. Tracebacks are for ``--log-level debug``; below it, an unexpected
exception is one line too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
import time
from types import TracebackType
from typing import Any

from fleecenbd.cli.errors import one_line

LEVELS = ("debug", "info", "warning", "error")

PIECE_LENGTH_MAX = select.PIPE_BUF
"""Bytes that a pipe which poll(2) calls writable takes without blocking."""

STDERR = 2

logger = logging.getLogger("fleecenbd")


class TextFormatter(logging.Formatter):
    """``2026-11-22T20:15:03.123Z warning: message``."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_moment(record)} {record.levelname.lower()}: {_message(record)}"
        if (traceback := _traceback(self, record)) is not None:
            text = f"{text}\n{traceback}"
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; traceback at level debug."""

    def __init__(self) -> None:
        super().__init__()
        import json  # only here: few servers log it, and all must start fast

        self._dumps = json.dumps

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if (traceback := _traceback(self, record)) is not None:
            entry["traceback"] = traceback
        return self._dumps(entry, ensure_ascii=False)


def _moment(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _message(record: logging.LogRecord) -> str:
    message = one_line(record.getMessage())
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        message = one_line(f"{message}: {type(error).__name__}: {error}")
    return message


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    if not record.exc_info or not logger.isEnabledFor(logging.DEBUG):
        return None
    return formatter.formatException(record.exc_info)


class DescriptorHandler(logging.Handler):
    """Writes lines to a file descriptor, and never waits for its reader."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.lost = 0
        """Lines that could not be written since the last one that could."""
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._cut = False  # the last line lacks its end

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.lost and self._writable():
                lost, self.lost = self.lost, 0
                text = f"nobody read standard error: lines of this log lost: {lost}"
                self._put(logging.makeLogRecord({**_LOST, "msg": text}))
            self._put(record)
        except Exception:
            # A formatter's error, most likely: a log line is worth nobody's disk.
            self.lost += 1

    def _put(self, record: logging.LogRecord) -> None:
        line = self.format(record).encode(errors="backslashreplace") + b"\n"
        if self._cut:
            line = b"\n" + line
        written = self._write(line)
        self._cut = 0 < written < len(line) or (self._cut and written == 0)
        if written < len(line):
            self.lost += 1

    def _writable(self) -> bool:
        return any(events == select.POLLOUT for _, events in self._poll.poll(0))

    def _write(self, line: bytes) -> int:
        written = 0
        while written < len(line) and self._writable():
            try:
                written += os.write(self._descriptor, line[written : written + PIECE_LENGTH_MAX])
            except OSError:
                break
        return written


_LOST = {"name": logger.name, "levelno": logging.WARNING, "levelname": "WARNING"}


def set_up(level: str, *, as_json: bool) -> None:
    """Send the log to standard error; ``level`` is one of ``LEVELS``."""
    logging.raiseExceptions = False
    handler = DescriptorHandler(STDERR)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # other people's libraries
    logger.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def report(message: str) -> None:
    """Tell why the command failed: one line on standard error, whatever the log level."""
    handlers = logging.getLogger().handlers
    if handlers and isinstance(handlers[0].formatter, JsonFormatter):
        logger.error("%s", message)
    else:
        line = f"fleecenbd: {one_line(message)}\n".encode(errors="backslashreplace")
        # Nobody may be there to be told: the exit status says it then.
        with contextlib.suppress(OSError):
            os.write(STDERR, line)


def shows_tracebacks() -> bool:
    """Whether ``set_up`` was called with level debug."""
    return logger.level == logging.DEBUG


def loop_exception(_loop: object, context: dict[str, Any]) -> None:
    """asyncio's exception handler: an exception that nobody awaited is a fault of ours."""
    error = context.get("exception")
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    logger.error(
        "internal error: %s", context.get("message", "in the event loop"), exc_info=exc_info
    )


def _uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logger.error("internal error", exc_info=(kind, error, traceback))


def _uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None:
        logger.error(
            "internal error in a thread",
            exc_info=(arguments.exc_type, error, arguments.exc_traceback),
        )


def _unraisable(arguments: sys.UnraisableHookArgs) -> None:
    error = arguments.exc_value
    if error is not None:
        logger.error(
            "internal error: %s",
            arguments.err_msg or "ignored",
            exc_info=(arguments.exc_type, error, arguments.exc_traceback),
        )
