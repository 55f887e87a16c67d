"""Sockets that whoever started us has made: standard input (--single), socket activation."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from fleecenbd.cli.endpoints import Endpoint
from fleecenbd.cli.errors import CommandError, UsageError, reason
from fleecenbd.server.sockets import activated_sockets, maker_pid


@dataclass(frozen=True)
class Handed:
    """What whoever started us has made.

    ``endpoints``: listening sockets; None: no socket activation. ``client``: the connection of
    --single. ``starter``: pid of the client that started us for itself. ``controls``: control
    sockets.
    """

    endpoints: list[Endpoint] | None = None
    client: socket.socket | None = None
    starter: int | None = None
    controls: tuple[socket.socket, ...] = ()


NOTHING_HANDED = Handed()

_STANDARD = (0, 1, 2)
_IS_NO_SOCKET = (
    "--single: standard input is no connected stream socket; it is for programs that start a "
    "server with their connection as its standard input, as inetd and libnbd's connect_command do"
)


def take_standard_input() -> socket.socket:
    """The client's socket, moved away from standard input, output and error. Raises UsageError.

    No copy of it stays behind: the client is to see its end when the server closes it.
    """
    try:
        sock = socket.socket(fileno=os.dup(0))
        sock.getpeername()
    except OSError as error:
        if error.errno not in (errno.ENOTSOCK, errno.ENOTCONN, errno.EBADF):
            raise CommandError(f"--single: {reason(error, 'standard input')}") from error
        raise UsageError(_IS_NO_SOCKET) from None
    if sock.type != socket.SOCK_STREAM:
        raise UsageError(_IS_NO_SOCKET)
    here = os.fstat(sock.fileno())
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in _STANDARD:
        if os.path.samestat(os.fstat(descriptor), here):
            os.dup2(null, descriptor)
    os.close(null)
    return sock


def take_activated(
    environment: MutableMapping[str, str],
) -> tuple[list[Endpoint] | None, tuple[socket.socket, ...]]:
    """The sockets handed over by systemd, or by a client that does as systemd does.

    LISTEN_FDNAMES ``backup``: fleecing exports only; ``control``: apart, in the second place; any
    other: all exports. None: there was no socket activation. Raises CommandError.
    """
    try:
        found = activated_sockets(environment)
    except OSError as error:
        raise CommandError(reason(error)) from None
    if found is None:
        return None, ()
    endpoints = []
    controls = []
    for name, sock in found:
        if name == "control":
            if sock.family != socket.AF_UNIX:
                raise CommandError(
                    "socket activation handed over a control socket that is no Unix socket: "
                    "whoever reaches it would control the server; listen on a path"
                )
            controls.append(sock)
            continue
        unix = None
        if sock.family == socket.AF_UNIX:
            path = sock.getsockname()
            unix = path if isinstance(path, str) else os.fsdecode(path)
        endpoints.append(Endpoint(sock, name == "backup", unix))
    if not endpoints:
        raise CommandError(
            "socket activation handed over a control socket only: no guest and no backup could "
            "connect; add a socket called guest or backup"
        )
    return endpoints, tuple(controls)


def starting_client(endpoints: list[Endpoint]) -> int | None:
    """The pid of the client that started us for itself by socket activation, or None.

    It made the socket, and is our parent: so does libnbd, and nobody else will ever connect
    when it has gone. It may have: then we have another parent, and the socket a maker that is
    no more. systemd's sockets are left to systemd, which never ends.
    """
    parent = os.getppid()
    makers = {maker_pid(endpoint.socket) for endpoint in endpoints}
    maker = makers.pop()
    if makers or maker is None or maker <= 1:
        return None
    return maker if maker == parent or _has_ended(maker) else None


def _has_ended(pid: int) -> bool:
    """Whether a process is no more, or has yet to be waited for by its parent."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        return error.errno == errno.ESRCH
    try:
        ends = select.poll()
        ends.register(descriptor, select.POLLIN)
        return bool(ends.poll(0))
    finally:
        os.close(descriptor)
