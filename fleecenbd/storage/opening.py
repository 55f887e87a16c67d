"""Opening an image: what is none is refused, and reading it costs no write."""

from __future__ import annotations

import errno
import os
import stat


def open_image(name: str, *, read_only: bool) -> int:
    """A descriptor of a regular file or block device. Raises OSError, EINVAL for others."""
    # Opening a pipe or a tape would wait, so look first.
    _check_kind(os.stat(name).st_mode, name)
    descriptor = _open_without_atime(name, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        _check_kind(os.fstat(descriptor).st_mode, name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(mode: int, name: str) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise OSError(errno.EINVAL, "neither a regular file nor a block device", name)


def _open_without_atime(name: str, flags: int) -> int:
    """Open so that reads need not write the time of access: its journal may make them wait."""
    try:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOATIME)
    except PermissionError:
        return os.open(name, flags | os.O_CLOEXEC)  # only the owner may ask for it
