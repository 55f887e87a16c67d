"""What a command fails with: one line that names the object, the cause, and the way out."""

from __future__ import annotations

import errno
import os

HINTS = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file or a block device",
    errno.EROFS: "give --read-only, or put it where it can be written",
    errno.ENOSPC: "make room, or choose another place",
}
"""What to do about an errno whose text does not say so itself."""


class CommandError(Exception):
    """The command failed: its message is one line, the exit status is ``status``."""

    status = 1


class UsageError(CommandError):
    """The command was called in a way that cannot work."""

    status = 2


def one_line(text: str) -> str:
    """The text with every run of white space, line ends included, made one space."""
    return " ".join(text.split())


def reason(error: OSError, name: str | None = None) -> str:
    """The object and the cause, "vm.raw: No such file or directory (check the path)".

    ``name``: what to call the object where the error itself does not know.
    """
    text = error.strerror or str(error)
    if error.errno is not None and text == os.strerror(error.errno) and error.errno in HINTS:
        text = f"{text} ({HINTS[error.errno]})"
    known = error.filename if error.filename is not None else name
    return text if known is None else f"{known}: {text}"
