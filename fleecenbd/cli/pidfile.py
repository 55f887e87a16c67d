"""The pidfile: written whole, over nothing but an older pidfile, and removed at the end."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fleecenbd.cli.errors import CommandError, UsageError, reason
from fleecenbd.cli.values import DiskSpec

CONTENT_LENGTH_MAX = 32
"""Bytes. What is longer is no pidfile."""

_CONTENT = re.compile(rb"\s*[0-9]+\s*")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def check_pidfile(path: Path, disks: Sequence[DiskSpec]) -> None:
    """Raise CommandError if something is there that is not to be lost. Opens no disk."""
    for disk in disks:
        with suppress(OSError):  # what is not there is not lost
            if os.path.samefile(path, disk.path):
                raise UsageError(f"--pidfile: {path} is the disk {disk.name}; choose another file")
    try:
        _check_replaceable(path)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def pidfile(path: Path) -> Iterator[None]:
    """Our pid in a file, whole from its first moment; removed at the end if it is still ours."""
    text = f"{os.getpid()}\n"
    # In a directory that others may write, a name that they can guess could be a link of theirs.
    draft = path.parent / f".{path.name}.{os.urandom(8).hex()}"
    try:
        descriptor = os.open(draft, _NEW_FILE, 0o666)
        try:
            with open(descriptor, "w") as file:
                file.write(text)
            _check_replaceable(path)  # again: much may have happened since the start
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # gone already, with its directory perhaps
            if _content(path) == text.encode():
                path.unlink()


def _check_replaceable(path: Path) -> None:
    """Raise OSError unless there is nothing, or a pidfile."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "there is a directory of this name; name a file in it")
    content = _content(path) if stat.S_ISREG(found.st_mode) else b""
    if len(content) > CONTENT_LENGTH_MAX or not _CONTENT.fullmatch(content):
        raise OSError(
            errno.EEXIST,
            "there is a file of this name that is no pidfile, and would be lost; choose another "
            "name, or remove it",
        )


def _content(path: Path) -> bytes:
    """What a file begins with: all of a pidfile, and more than one holds of any other."""
    descriptor = os.open(path, _OLD_FILE)
    try:
        return os.read(descriptor, CONTENT_LENGTH_MAX + 1)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> CommandError:
    cause = reason(OSError(error.errno, error.strerror, str(path)))
    return CommandError(f"cannot write the pidfile {cause}")
