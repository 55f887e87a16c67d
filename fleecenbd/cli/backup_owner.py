"""Whose session is it? A run of ``fleecenbd backup`` owns its session by a token of its own, and
whoever comes later can tell whether that run is still there.

The token is the session's owner, as the server knows it. As long as the run lives, it holds an
abstract Unix socket of that name: the kernel lets go of it when the process ends, however that
happens, and nothing stays behind. (It is seen within one network namespace; a run in another one
is told by its clients, see ``backup_left``.)
"""

from __future__ import annotations

import errno
import secrets
import socket

PREFIX = "fleecenbd backup "
TOKEN_LENGTH = 16


class Owner:
    """This run's token, held until ``close``."""

    def __init__(self, name: str | None = None) -> None:
        """``name``: that of a run that is dead, whose session this one goes on with.

        Raises OSError(EADDRINUSE) if it is not dead.
        """
        self.name = name or f"{PREFIX}{secrets.token_hex(TOKEN_LENGTH // 2)}"
        self._socket = _hold(self.name)

    def close(self) -> None:
        """Nobody holds it any more."""
        self._socket.close()


def is_backup(owner: str | None) -> bool:
    """Whether a session was begun by a run of this command."""
    return (
        owner is not None and owner.startswith(PREFIX) and len(owner) == len(PREFIX) + TOKEN_LENGTH
    )


def is_alive(owner: str) -> bool:
    """Whether that run is still there."""
    try:
        _hold(owner).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return True
        raise
    return False


def _hold(name: str) -> socket.socket:
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        held.bind(f"\0{name}")
    except BaseException:
        held.close()
        raise
    return held
