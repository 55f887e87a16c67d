"""The command ``fleecenbd``: argv in, exit status out.

0: done. 1: failed. 2: wrong usage. A failure is one line on standard error, and no traceback
short of ``--log-level debug``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn, cast

import typer

from fleecenbd import __version__
from fleecenbd.cli import logs
from fleecenbd.cli.command import StrictCommand
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.serve import EXAMPLES, HELP, serve

app = typer.Typer(
    name="fleecenbd",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What the parser raises for wrong usage. The class has no public name of its own in all
# versions of typer; the base of a public one has been it in all.
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fleecenbd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """An NBD server that fleeces: live disks, and point-in-time images of them."""


app.command(cls=StrictCommand, help=HELP, epilog=EXAMPLES)(serve)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit status. Raises nothing."""
    try:
        command = typer.main.get_command(app)
        status = command.main(list(arguments), prog_name="fleecenbd", standalone_mode=False)
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except CommandError as error:
        _show_traceback()
        logs.report(str(error))
        return error.status
    except _USAGE_ERROR as error:
        text = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        text = text.replace("Value error, ", "")  # how the parser's own library begins a cause
        logs.report(f"{text}; see fleecenbd --help, fleecenbd serve --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return 1  # whoever read the help has seen enough
    except Exception as error:
        if isinstance(error, OSError) and not _came_from_serve(error):
            logs.report(f"cannot write to standard output: {error.strerror}")
            return 1
        _show_traceback()
        logs.report(
            f"internal error: {type(error).__name__}: {error}; "
            "--log-level debug shows where, for a report"
        )
        return 1


def _came_from_serve(error: Exception) -> bool:
    """False: help and version are what else there is, and they do nothing but write."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is serve.__code__ for frame, _ in frames)


def _show_traceback() -> None:
    if logs.shows_tracebacks():
        traceback.print_exc()


def main() -> NoReturn:
    """The console script.

    Ends without the interpreter's own end: that would run what is left of a server whose
    device hangs, and there is nothing that it has to do.
    """
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
