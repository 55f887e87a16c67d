"""Where NBD URIs lead, as far as names and addresses tell: two may be one and the same export.

That is not all that can be said: many servers ignore an export's name, and one storage can have
several servers. But what can be known without asking is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

_ALL = ("0.0.0.0", "::")
PORT = 10809
"""NBD's."""

Server: TypeAlias = tuple[Any, ...]


def named_server(uri: str) -> Server:
    """The server that a URI names, without asking anybody: a socket's path, or host and port. A
    path is nobody's, and stands for itself."""
    parts = urlsplit(uri)
    if not parts.scheme.startswith("nbd"):
        return (uri,)
    for part in parts.query.split("&"):
        key, _, value = part.partition("=")
        if key == "socket":
            return (os.path.normpath(unquote(value)),)
    try:
        port = parts.port or PORT
    except ValueError:  # told when somebody connects
        return (parts.netloc,)
    return (parts.hostname or "localhost", port)


def leads_to_same(one: str, other: str) -> bool:
    """Whether two URIs lead to the export of one name at one server.

    Asks for the addresses of hosts, and follows links: that blocks.
    """
    if _export(one) != _export(other):
        return False
    if named_server(one) == named_server(other):
        return True
    return not _servers(one).isdisjoint(_servers(other))


def leads_to_socket(uri: str, listening: Iterable[socket.socket]) -> bool:
    """Whether a URI leads to one of these sockets of ours, whatever export it names. Blocks, as
    ``leads_to_same``."""
    servers = _servers(uri)
    for sock in listening:
        address = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            path = os.fsdecode(address)
            if not path.startswith("\0") and (os.path.realpath(path),) in servers:
                return True
            continue
        host, port = address[:2]
        hosts = [place[0] for place in servers if len(place) == 2 and place[1] == port]
        if host in hosts or (host in _ALL and any(map(_is_local, hosts))):
            return True
    return False


def _is_local(address: str) -> bool:
    """Whether it is an address of this machine: one talks to that from the address itself."""
    if ip_address(address.partition("%")[0]).is_loopback:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, PORT))  # sends nothing
        except OSError:
            return False
        return bool(sock.getsockname()[0] == address)


def _export(uri: str) -> str:
    return unquote(urlsplit(uri).path.removeprefix("/"))


def _servers(uri: str) -> set[Server]:
    """All addresses of the server that a URI names."""
    named = named_server(uri)
    if len(named) == 1:
        return {(os.path.realpath(named[0]),)}
    host, port = named
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:  # told when somebody connects
        return {named}
    return {address[:2] for *_, address in found}
