"""What went wrong, as an HTTP status with one message."""

from __future__ import annotations

import errno

NOT_FOUND = 404
CONFLICT = 409

_STATUS = {
    errno.ENOENT: NOT_FOUND,
    errno.EEXIST: CONFLICT,
    errno.EBUSY: CONFLICT,
    errno.EADDRNOTAVAIL: CONFLICT,
    errno.EPIPE: CONFLICT,
    errno.EAGAIN: 503,
    errno.EINVAL: 422,
    errno.ESHUTDOWN: 503,
    errno.ETIMEDOUT: 504,
}


class CallError(Exception):
    """The call is refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def from_os_error(error: OSError) -> CallError:
    """Of an error of the server. One about a file is not about what the call names."""
    text = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        status = 507
    elif error.filename is not None:
        status = {errno.EBUSY: CONFLICT, errno.EINVAL: 422}.get(error.errno or 0, 500)
    else:
        status = _STATUS.get(error.errno or 0, 500)
    if error.filename is not None:
        text = f"{error.filename}: {text}"
    return CallError(status, text)
