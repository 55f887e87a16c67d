"""A client's socket: its options, and who is at the other end."""

from __future__ import annotations

import socket
import struct

from fleecenbd.server.limits import ServerLimits

SO_SNDBUFFORCE = 32
"""socket(7); Python has no name for it."""


def prepare(sock: socket.socket, limits: ServerLimits) -> tuple[str, int | None]:
    """Set the options of a connected socket; (what to call the peer, its process if known).

    Raises OSError, if the peer has gone already.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = struct.unpack("iII", credentials)[0] or None
        _enlarge_send_buffer(sock, limits.unix_send_buffer)
        return f"pid {pid}", pid
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.keepalive_idle_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.keepalive_interval_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.keepalive_count)
    host, port, *_ = sock.getpeername()
    return f"{host}:{port}", None


def _enlarge_send_buffer(sock: socket.socket, length: int) -> None:
    """Let the kernel take two replies of a pull at once, so that client and server overlap."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, length)
    except PermissionError:
        # Not root: as much as net.core.wmem_max allows.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, length)
