"""Where clients may connect: the sockets that were asked for, and their NBD URIs."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from fleecenbd.cli.errors import CommandError, reason
from fleecenbd.cli.places import make_private_directory
from fleecenbd.server.sockets import listen_tcp, listen_unix

DEFAULT_PORT = 10809
"""The port that IANA gave to NBD."""
PRIVATE = "-"
"""``--unix -``: a socket in a directory of its own."""


@dataclass(frozen=True)
class Addresses:
    """The sockets to open. ``unix_mode``, ``unix_group``: of every Unix socket's file.

    ``default``: the Unix path was not asked for, so its directory may have to be made.
    """

    unix: str
    unix_is_default: bool = False
    unix_mode: int = 0o600
    unix_group: int | None = None
    host: str | None = None
    port: int | None = None
    backup_unix: str | None = None
    backup_port: int | None = None


@dataclass(frozen=True)
class Endpoint:
    """A listening socket. ``unix``: its path, None for TCP; absolute if we made it."""

    socket: socket.socket
    backup_only: bool
    unix: str | None = None

    @property
    def port(self) -> int | None:
        """The TCP port; None for a Unix socket."""
        return None if self.unix is not None else int(self.socket.getsockname()[1])

    @property
    def is_known(self) -> bool:
        """Whether an URI leads to it: a handed Unix socket's path may be relative, or none."""
        return self.unix is None or os.path.isabs(self.unix)

    def uri(self, export: str) -> str:
        """The NBD URI of an export, as libnbd and QEMU read it."""
        name = quote(export, safe="@+")
        if self.unix is not None:
            return f"nbd+unix:///{name}?socket={quote(self.unix, safe='/')}"
        host, port, *_ = self.socket.getsockname()
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        elif ":" in host:
            host = f"[{host}]"
        return f"nbd://{host}:{port}/{name}"


def open_endpoints(addresses: Addresses, cleanup: ExitStack) -> list[Endpoint]:
    """Bind and listen. ``cleanup`` gets what removes the socket files: call it while the sockets
    are open still, for then nobody else's file can be taken for one of them. Raises CommandError.
    """
    endpoints: list[Endpoint] = []
    files = ExitStack()
    path = addresses.unix
    try:
        if path == PRIVATE:
            # Only here: they take a while to import, and a server is to start fast.
            import shutil
            import tempfile

            directory = tempfile.mkdtemp(prefix="fleecenbd-")  # mode 0700
            files.callback(partial(shutil.rmtree, directory, ignore_errors=True))
            path = os.path.join(directory, "nbd.sock")
        elif addresses.unix_is_default:
            make_private_directory(Path(path).parent)
        endpoints.append(_open_unix(path, addresses, files, backup_only=False))
        if addresses.backup_unix is not None:
            endpoints.append(_open_unix(addresses.backup_unix, addresses, files, backup_only=True))
        for port, backup_only in ((addresses.port, False), (addresses.backup_port, True)):
            if port is not None:
                sockets = listen_tcp(addresses.host, port)
                endpoints += [Endpoint(sock, backup_only) for sock in sockets]
    except BaseException as error:
        files.close()
        for endpoint in endpoints:
            endpoint.socket.close()
        if not isinstance(error, OSError):
            raise
        raise CommandError(f"cannot listen on {reason(error, path)}") from error
    cleanup.enter_context(files)
    return endpoints


def _open_unix(path: str, addresses: Addresses, files: ExitStack, *, backup_only: bool) -> Endpoint:
    listener = listen_unix(path, mode=addresses.unix_mode, group=addresses.unix_group)
    files.callback(listener.remove)
    return Endpoint(listener.socket, backup_only, os.path.abspath(path))
