"""Opening an image: what is none is refused, and reading it costs no write."""

from __future__ import annotations

import errno
import os
import stat

from fleecenbd.storage.errors import no_direct_error


def open_image(name: str, *, read_only: bool, flags: int = 0) -> int:
    """A descriptor of a regular file or block device. Raises OSError, EINVAL for others.

    ``flags``: of open(2), besides. ENOTSUP where O_DIRECT is among them, and refused.
    """
    # Opening a pipe or a tape would wait, so look first.
    _check_kind(os.stat(name).st_mode, name)
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    try:
        descriptor = _open_without_atime(name, flags)
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise no_direct_error(name) from None
        raise
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
