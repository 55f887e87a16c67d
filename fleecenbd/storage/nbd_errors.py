"""What libnbd and the server say when something fails, as OSErrors that name the URI.

libnbd hands out an errno and a text of its own. The server's text, which says what to do, it hands
to a debug callback, as the tail of a message that begins as those in _SERVER_TEXT do. So debugging
is on while a connection is made, and on a connection that asks a failed request once more; never
where it would cost. Tried with libnbd 1.14 and 1.22, which says nothing there of a refused export.
"""

from __future__ import annotations

import errno
import os
import re

from fleecenbd.storage.libnbd import nbd

_SERVER_TEXT = re.compile(
    r"(?:handshake: server error message|structured error server message): (.*)", re.DOTALL
)
_PREFIX = re.compile(r"^nbd_\w+: (?:handshake: )?")

NO_SERVER = frozenset({errno.ENOENT, errno.ECONNREFUSED})
"""What connecting fails with where nobody listens."""


class NbdRefused(OSError):
    """Somebody answers, and will not serve the export as asked: trying again does not help."""


class NbdErrorReply(OSError):
    """The server's error reply to one request."""


class NbdLost(OSError):
    """The server is gone for good, or serves something else now: no call succeeds any more."""


class ServerTexts:
    """libnbd's debug messages, of which only what the server says is kept.

    It must not refer to the handle: libnbd holds it as long as that lives.
    """

    def __init__(self) -> None:
        self.last: str | None = None
        """The text of the last error that the server gave a reason for."""

    def __call__(self, _context: str, message: str) -> int:
        found = _SERVER_TEXT.fullmatch(message)
        if found is not None:
            self.last = found[1]
        return 0

    def take(self) -> str | None:
        """The last text, once."""
        text, self.last = self.last, None
        return text


def error_text(error: nbd.Error) -> str:
    """libnbd's own text, without the name of its function."""
    text: str = _PREFIX.sub("", error.string)
    return text.removesuffix(": Invalid argument")  # it says what is invalid


def lost_text(error: nbd.Error) -> str:
    """Why a connection broke: what the system says, or what libnbd found wrong."""
    return os.strerror(error.errnum) if error.errnum else error_text(error)


def reply_error(error: nbd.Error, text: str | None, uri: str) -> OSError:
    """The server's error reply; ``text``: its own, where that is known."""
    number = error.errnum or errno.EIO
    return NbdErrorReply(number, text or os.strerror(number), uri)


def unsent_error(error: nbd.Error, uri: str) -> OSError:
    """libnbd's refusal to send a request: it is out of bounds, or not offered by the server."""
    return OSError(error.errnum or errno.EINVAL, error_text(error), uri)


def connect_error(error: nbd.Error, texts: ServerTexts, uri: str) -> OSError:
    """Why a connection was not made, or a new one not taken up to its end."""
    number, text = error.errnum, error_text(error)
    server_text = texts.take()
    if number in NO_SERVER and text.startswith("connect"):
        what = "there is no such socket" if number == errno.ENOENT else "nobody listens there"
        return OSError(number, f"{what}: is the server running, and is the address right?", uri)
    if number == 0 and "magic" in text:
        return NbdRefused(
            errno.EPROTO, f"what answers there speaks no NBD, or not as it should ({text})", uri
        )
    if text.startswith("gnutls_handshake"):
        text = f"no TLS comes about; has the server this user's key, or certificate? ({text})"
    if server_text is not None:
        return NbdRefused(number or errno.EPROTO, server_text, uri)
    return OSError(number or errno.ECONNRESET, text, uri)


def closed_while_connecting(wants_tls: bool, texts: ServerTexts, uri: str) -> OSError:
    """The handshake came to its end, and to no export; ``wants_tls``: and to no TLS either."""
    if wants_tls:
        return NbdRefused(
            errno.ENOTSUP,
            "the server offers no TLS: connect by nbd:// or nbd+unix://, or give the server keys",
            uri,
        )
    text = texts.take() or "the server hung up during the handshake: its log may say why"
    return OSError(errno.ECONNRESET, text, uri)


def refusal_text(error: nbd.Error) -> str | None:
    """What libnbd says of a refused NBD_OPT_GO; from 1.16 on the server's text is in it."""
    text = error_text(error).removesuffix(f": {os.strerror(error.errnum)}")
    return None if text.startswith("server replied with error") else text


def go_error(number: int, text: str | None, refuses_all: bool, uri: str) -> OSError:
    """NBD_OPT_GO was refused. ``refuses_all``: and every other option too, without TLS."""
    if number == errno.ESHUTDOWN:
        return OSError(number, text or "the server is shutting down", uri)
    if number == errno.ENOENT:
        return NbdRefused(number, text or "the server has no export of this name", uri)
    if number == errno.ENOTSUP and (refuses_all or "requires TLS" in (text or "")):
        hint = f" ({text})" if text else ""
        return NbdRefused(
            number,
            f"the server wants TLS: connect by nbds:// or nbds+unix://, with its keys{hint}",
            uri,
        )
    return NbdRefused(number, text or f"the server refuses the export: {os.strerror(number)}", uri)
