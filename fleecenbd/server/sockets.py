"""Listening sockets: made here, or handed over by systemd; and the messages to systemd.

A Unix socket, step by step, under a lock on its directory (so that of two servers that start at
once, one is refused):

    1  a socket file that nobody listens on is removed, but not without the lock, for it may be
       another server's that is about to listen; one that is alive is an error
    2  fchmod(0) on the unbound socket: Linux gives the file this mode, whatever the umask
    3  bind; then the group, then the mode that was asked for; then listen

At no moment is the file open to more people than was asked for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

BACKLOG = 128
"""Connections that wait to be accepted."""
UNIX_PATH_LENGTH_MAX = 107
"""Bytes of a Unix socket's path (sockaddr_un, less the final zero)."""
LISTEN_FDS_START = 3
"""The first descriptor that systemd hands over."""

NOTIFY_TIMEOUT_S = 1.0
"""Seconds that a service manager which does not read may hold us up."""

_DIRECTORY_LOCK_S = 2.0
"""Seconds to wait for another server that is starting in the same directory."""


@dataclass(frozen=True)
class UnixListener:
    """A listening Unix socket and its file."""

    socket: socket.socket
    path: str
    identity: tuple[int, int]
    """Device and inode of the socket file."""

    def remove(self) -> None:
        """Remove the socket file, if it is still this one. Does not close the socket."""
        try:
            if _identity(self.path) == self.identity:
                os.unlink(self.path)
        except OSError:
            pass  # gone, or no longer ours to touch


def listen_unix(path: str, *, mode: int = 0o600, group: int | None = None) -> UnixListener:
    """A non-blocking Unix socket, bound and listening. Raises OSError with the path in it.

    ``mode``: permission bits of the socket file (write is what lets a client connect).
    ``group``: id of the file's group; None: as the directory has it.
    """
    length = len(os.fsencode(path))
    if length > UNIX_PATH_LENGTH_MAX:
        raise OSError(
            errno.ENAMETOOLONG,
            f"the path has {length} bytes, a Unix socket's at most {UNIX_PATH_LENGTH_MAX}; "
            "choose a shorter one",
            path,
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked_directory(path) as is_locked:
            _remove_stale(path, is_locked)
            os.fchmod(sock.fileno(), 0)
            try:
                sock.bind(path)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _in_use(path) from None
                raise OSError(error.errno, _bind_cause(error), path) from None
            listener = UnixListener(sock, path, _identity(path))
            try:
                if group is not None:
                    _give_to_group(path, group)
                os.chmod(path, mode)
                sock.listen(BACKLOG)
            except BaseException:
                listener.remove()
                raise
        sock.setblocking(False)
        return listener
    except BaseException:
        sock.close()
        raise


def _bind_cause(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{error.strerror}: no right to make a socket in this folder; choose another path, "
            "or run as somebody who may"
        )
    if error.errno == errno.EROFS:
        return f"{error.strerror}; choose another path"
    return error.strerror or str(error)


def _give_to_group(path: str, group: int) -> None:
    try:
        os.lchown(path, -1, group)
    except OSError as error:
        text = f"the socket cannot be given to group {group}: {error.strerror}"
        if error.errno == errno.EPERM:
            text += "; name a group that this user is in, or run as root"
        raise OSError(error.errno, text, path) from None


@contextmanager
def _locked_directory(path: str) -> Iterator[bool]:
    """Keep other servers from starting in the same directory; False: it cannot be locked."""
    directory = os.path.dirname(path) or "."
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EACCES:  # one may bind in it, but not read it
            yield False
            return
        if error.errno == errno.ENOENT:
            text = "its directory does not exist; make it, or choose another path"
            raise OSError(errno.ENOENT, text, path) from None
        raise OSError(error.errno, error.strerror, path) from None
    try:
        deadline = time.monotonic() + _DIRECTORY_LOCK_S
        is_locked = False
        while not is_locked:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except OSError:
                # A courtesy between servers: whoever else locks directories cannot keep us out.
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        yield is_locked
    finally:
        os.close(descriptor)


def _remove_stale(path: str, is_locked: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(
            errno.EEXIST, "there is a file of this name, and it is no socket; choose another", path
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass  # nobody listens: a server that was killed left it
        except FileNotFoundError:
            return
        except PermissionError:
            raise OSError(
                errno.EACCES,
                "there is a socket already, and no right to see whether it is in use; "
                "choose another path",
                path,
            ) from None
        except OSError:
            raise _in_use(path) from None  # EAGAIN: too busy to answer, but alive
        else:
            raise _in_use(path)
    if not is_locked:
        raise OSError(
            errno.EBUSY,
            "a socket that nobody listens on is there, and its directory cannot be locked, so "
            "that another server may be about to take it; remove it if there is none",
            path,
        )
    os.unlink(path)


def _in_use(path: str) -> OSError:
    return OSError(
        errno.EADDRINUSE,
        "the socket is in use: a server listens on it; stop that one, or choose another path",
        path,
    )


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def listen_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Non-blocking TCP sockets, bound and listening, one per address that ``host`` resolves to.

    ``host`` None: the loopback, by IPv4 and IPv6 as far as there are. ``port`` 0: any free one,
    on the first address only. Raises OSError with "HOST port N" in it. May ask the resolver.
    """
    name = f"{host or 'localhost'} port {port}"
    try:
        found = socket.getaddrinfo(
            host or "localhost", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        text = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise OSError(
            errno.EADDRNOTAVAIL, f"{text}; give an address of this machine", name
        ) from None
    addresses = sorted({(family, address) for family, _, _, _, address in found})  # IPv4 first
    if port == 0:
        addresses = addresses[:1]
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sockets.append(_listen_at(family, address))
            except OSError as error:
                failure = OSError(error.errno, _tcp_cause(error), name)
                # localhost may name ::1 on a machine without IPv6.
                if host is None and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    missing = failure
                    continue
                raise failure from None
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, "no address to listen on", name)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_at(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_cause(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use: another program listens on it; choose another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "not an address of this machine; choose one that is"
    if error.errno == errno.EACCES:
        return "not allowed to listen on a port below 1024; choose another port"
    return error.strerror or str(error)


# -- systemd -------------------------------------------------------------------------------------


def activated_sockets(
    environment: MutableMapping[str, str], *, first: int = LISTEN_FDS_START
) -> list[tuple[str, socket.socket]] | None:
    """(name, socket) of each socket that was handed over by systemd's protocol (sd_listen_fds(3)).

    None: none were meant for this process. The variables are removed from ``environment``, so
    that no child takes the sockets for its own. Raises OSError for what is no listening stream
    socket.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not (pid.isdecimal() and count.isdecimal()) or int(pid) != os.getpid() or int(count) == 0:
        return None
    descriptors = range(first, first + int(count))
    if len(names) != len(descriptors):
        names = ["unknown"] * len(descriptors)
    sockets = []
    for name, descriptor in zip(names, descriptors, strict=True):
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
            if (
                sock.type != socket.SOCK_STREAM
                or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                or sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
            ):
                raise OSError(errno.EINVAL, "not listening")
        except OSError:
            raise OSError(
                errno.EINVAL,
                "handed over by socket activation, but no listening stream socket; "
                "in a systemd unit, write ListenStream= and leave Accept= at no",
                f"descriptor {descriptor}",
            ) from None
        sock.setblocking(False)
        sockets.append((name, sock))
    return sockets


def maker_pid(sock: socket.socket) -> int | None:
    """The process that called listen(2) on a Unix socket; None where that can't be told."""
    if sock.family != socket.AF_UNIX:
        return None
    size = struct.calcsize("iII")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid: int = struct.unpack("iII", credentials)[0]
    return pid or None


def notify(environment: Mapping[str, str], *states: str) -> bool:
    """Tell systemd, as in ``notify(os.environ, "READY=1")``; False: nobody wants to know.

    sd_notify(3), by hand: a datagram to the socket in NOTIFY_SOCKET, "@" for an abstract one.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT_S)
            sock.sendto("\n".join(states).encode(), address)
    except OSError:
        return False
    return True
