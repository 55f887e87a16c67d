"""The command ``fleecenbd``: argv in, exit status out.

0: done. 1: failed. 2: wrong usage. A failure is one line on standard error, and no traceback
short of ``--log-level debug``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fleecenbd.cli import logs
from fleecenbd.cli.errors import CommandError


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit status. Raises nothing."""
    # Imports are made here, where nothing is collected yet (``main``), and typer's only where it
    # is needed: it takes longer to import than a server to start.
    try:
        from fleecenbd.cli.serve import serve
        from fleecenbd.cli.words import plain_words
    except KeyboardInterrupt:
        return 130

    try:
        words = plain_words(arguments[1:]) if arguments[:1] == ["serve"] else None
        if words is not None:
            return serve(words)
        from fleecenbd.cli import command_line

        status = command_line.run(arguments)
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
        return status
    except CommandError as error:
        _show_traceback()
        logs.report(str(error))
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1  # whoever read the help has seen enough
    except Exception as error:
        if isinstance(error, OSError) and not _came_from(serve, error):
            logs.report(f"cannot write to standard output: {error.strerror}")
            return 1
        _show_traceback()
        logs.report(
            f"internal error: {type(error).__name__}: {error}; "
            "--log-level debug shows where, for a report"
        )
        return 1


def _came_from(serve: Callable[..., int], error: Exception) -> bool:
    """False: help and version are what else there is, and they do nothing but write."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code is serve.__code__:
            return True
        step = step.tb_next
    return False


def _show_traceback() -> None:
    if logs.shows_tracebacks():
        import traceback

        traceback.print_exc()


def main() -> NoReturn:
    """The console script.

    Ends without the interpreter's own end: that would run what is left of a server whose
    device hangs, and there is nothing that it has to do.
    """
    gc.disable()  # until the server runs (process.start_collecting): imports make no garbage
    _open_standard_descriptors()
    status = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # closed, or nobody reads it
    os._exit(status)


def _open_standard_descriptors() -> None:
    """An image opened as descriptor 2 would get our error messages."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
