"""What can go wrong on the wire: the two exceptions of the protocol, and the table of errnos.

The peer's fault is a ProtocolError: drop the connection. An option that is refused is a
NegotiationError: send it as the option's reply and go on. A request that fails is an OSError
of other rooms; ``nbd_errno`` says which number its reply carries.
"""

from __future__ import annotations

import errno as host
from typing import Final

from fleecenbd.nbd.constants import (
    NBD_EINVAL,
    NBD_EIO,
    NBD_ENOMEM,
    NBD_ENOSPC,
    NBD_ENOTSUP,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_ESHUTDOWN,
    NBD_REP_FLAG_ERROR,
)

SHOWN_NAME_MAX: Final = 80
"""Characters of a peer's name that are echoed in a message."""


class ProtocolError(Exception):
    """The peer broke a rule of the protocol that leaves nothing to answer: drop the connection."""


class NegotiationError(Exception):
    """An option is refused: the error reply ``code`` (NBD_REP_ERR_*) with ``text`` for humans."""

    def __init__(self, code: int, text: str) -> None:
        assert code & NBD_REP_FLAG_ERROR, f"{code} is no error reply"
        super().__init__(text)
        self.code = code
        self.text = text


_NBD_ERRNO: Final[dict[int | None, int]] = {
    host.EPERM: NBD_EPERM,
    host.EACCES: NBD_EPERM,
    host.EROFS: NBD_EPERM,
    host.EIO: NBD_EIO,
    # An OSError without a number, and what Linux's block layer says of a device at fault:
    # with NBD_EINVAL a guest would look for the fault in its own request.
    None: NBD_EIO,
    host.ETIMEDOUT: NBD_EIO,
    host.ENODATA: NBD_EIO,
    host.ENODEV: NBD_EIO,
    host.ENOLINK: NBD_EIO,
    host.ENXIO: NBD_EIO,
    host.EREMOTEIO: NBD_EIO,
    host.EILSEQ: NBD_EIO,
    host.ENOMEM: NBD_ENOMEM,
    host.EINVAL: NBD_EINVAL,
    host.ENOSPC: NBD_ENOSPC,
    host.EDQUOT: NBD_ENOSPC,
    host.EFBIG: NBD_ENOSPC,
    host.EOVERFLOW: NBD_EOVERFLOW,
    host.ENOTSUP: NBD_ENOTSUP,
    host.EOPNOTSUPP: NBD_ENOTSUP,
    host.ESHUTDOWN: NBD_ESHUTDOWN,
}


def nbd_errno(errno: int | None, *, fast_zero: bool = True) -> int:
    """The NBD error of an ``OSError.errno``: the one table of the project.

    Anything that the table does not name is NBD_EINVAL, as in QEMU and nbdkit. NBD_ENOTSUP may
    only answer NBD_CMD_FLAG_FAST_ZERO: pass ``fast_zero=False`` for a request without it, and
    it is NBD_EINVAL too. (Specification, "Error values".)
    """
    error = _NBD_ERRNO.get(errno, NBD_EINVAL)
    if error == NBD_ENOTSUP and not fast_zero:
        return NBD_EINVAL
    return error


def shown_name(name: str) -> str:
    """A name of the peer's, fit to echo in a message: quoted, printable and short."""
    if len(name) > SHOWN_NAME_MAX:
        name = name[: SHOWN_NAME_MAX - 1] + "…"
    return "'" + "".join(letter if letter.isprintable() else "?" for letter in name) + "'"


def cut_text(text: str, length_max: int) -> bytes:
    """UTF-8 of ``text``, at most ``length_max`` bytes, cut between characters, without NUL."""
    data = text.replace("\0", "?").encode("utf-8", "replace")
    if len(data) <= length_max:
        return data
    return data[:length_max].decode("utf-8", "ignore").encode("utf-8")
