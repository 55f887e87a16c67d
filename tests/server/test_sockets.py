"""Listening sockets: who may connect at which moment, whose file it is; systemd's messages."""

import contextlib
import errno
import fcntl
import gc
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.server import sockets
from fleecenbd.server.sockets import (
    UnixListener,
    activated_sockets,
    listen_tcp,
    listen_unix,
    maker_pid,
    notify,
)
from tests.descriptors import no_new_descriptor


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path for a Unix socket; short, wherever pytest keeps its files."""
    monkeypatch.chdir(tmp_path)
    return "f.sock"


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The most careless umask there is."""
    before = os.umask(0)
    yield
    os.umask(before)


def _mode(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def _connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def _leave_stale(path: str) -> None:
    """What a killed server leaves: a socket file that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


# -- Unix sockets --------------------------------------------------------------------------------


@pytest.mark.usefixtures("open_umask")
def test_a_unix_socket_has_the_mode_that_was_asked_for_whatever_the_umask(path: str) -> None:
    for mode in (0o600, 0o660, 0o666):
        listener = listen_unix(path, mode=mode)
        assert _mode(path) == mode
        assert _connects(path)
        listener.remove()
        listener.socket.close()


@pytest.mark.usefixtures("open_umask")
def test_a_unix_socket_is_never_open_wider_than_asked(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    chmod, lchown = os.chmod, os.lchown

    def watched_chmod(name: str, mode: int) -> None:
        seen.append((_mode(path), _connects(path)))
        chmod(name, mode)
        seen.append((_mode(path), _connects(path)))

    def watched_lchown(name: str, user: int, group: int) -> None:
        seen.append((_mode(path), _connects(path)))
        lchown(name, user, group)

    monkeypatch.setattr(os, "chmod", watched_chmod)
    monkeypatch.setattr(os, "lchown", watched_lchown)
    listener = listen_unix(path, mode=0o600, group=os.getgid())
    listener.socket.close()
    assert seen == [(0, False), (0, False), (0o600, False)]


def test_a_unix_socket_belongs_to_the_group_that_was_asked_for(path: str) -> None:
    group = 12345 if os.geteuid() == 0 else os.getgroups()[-1]
    listener = listen_unix(path, mode=0o660, group=group)
    assert os.lstat(path).st_gid == group
    assert _mode(path) == 0o660
    listener.socket.close()


def test_a_group_that_cannot_be_given_leaves_no_socket_file(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(os, "lchown", refuse)
    with pytest.raises(PermissionError, match=r"cannot be given to group 1: .*; name a group"):
        listen_unix(path, group=1)
    assert not os.path.lexists(path)


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.EACCES, "no right to make a socket in this folder; choose another path, or run as"),
        (errno.EROFS, "Read-only file system; choose another path"),
    ],
)
def test_a_folder_where_no_socket_can_be_made_says_what_to_do(
    path: str, monkeypatch: pytest.MonkeyPatch, number: int, way_out: str
) -> None:
    class Refused(socket.socket):  # root may do everything
        def bind(self, address: Any) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(OSError, match=way_out) as caught:
        listen_unix(path)
    assert caught.value.filename == path


def test_a_socket_that_is_alive_is_refused_and_left_alone(path: str) -> None:
    listener = listen_unix(path)
    with pytest.raises(OSError, match=r"in use") as caught:
        listen_unix(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.filename == path
    assert _connects(path)
    listener.socket.close()


def test_a_socket_that_is_too_busy_to_answer_counts_as_alive(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        waiting = []
        while True:  # until its queue is full
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            if client.connect_ex(path) != 0:
                break
        with pytest.raises(OSError, match="in use"):
            listen_unix(path)
        for client in waiting:
            client.close()


def test_a_socket_file_that_nobody_listens_on_is_replaced(path: str) -> None:
    _leave_stale(path)
    assert not _connects(path)
    listener = listen_unix(path)
    assert _connects(path)
    listener.socket.close()


def test_a_file_that_is_no_socket_is_never_replaced(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="no socket") as caught:
        listen_unix(path)
    assert caught.value.errno == errno.EEXIST
    assert Path(path).read_text() == "precious"


def test_a_link_to_a_dead_socket_is_not_followed(path: str) -> None:
    _leave_stale("dead.sock")
    os.symlink("dead.sock", path)
    with pytest.raises(OSError, match="no socket"):
        listen_unix(path)
    assert os.path.islink(path)


def test_of_many_servers_that_start_at_once_exactly_one_gets_the_path(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_stale(path)
    # Between the look at what is there and bind, whoever comes waits a moment for a second one.
    second = threading.Barrier(2)
    met: list[int] = []
    fchmod = os.fchmod

    def watched_fchmod(descriptor: int, mode: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(second.wait(0.1))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", watched_fchmod)
    start = threading.Barrier(8)
    won: list[UnixListener] = []
    lost: list[int | None] = []

    def compete() -> None:
        start.wait()
        try:
            won.append(listen_unix(path))
        except OSError as error:
            lost.append(error.errno)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
    assert len(won) == 1
    assert lost == [errno.EADDRINUSE] * 7
    assert _connects(path)
    won[0].socket.close()


def test_somebody_who_keeps_the_directory_locked_delays_a_server_and_no_more(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_DIRECTORY_LOCK_S", 0.0)
    directory = os.open(".", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    listener = listen_unix(path)
    assert _connects(path)
    os.close(directory)
    listener.socket.close()


@pytest.mark.parametrize("why", ["locked", "cannot be locked", "cannot be read"])
def test_a_dead_socket_is_replaced_by_nobody_who_has_not_locked_the_directory(
    path: str, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(sockets, "_DIRECTORY_LOCK_S", 0.0)
    _leave_stale(path)
    inode = os.lstat(path).st_ino
    directory = os.open(".", os.O_RDONLY)
    if why == "locked":
        fcntl.flock(directory, fcntl.LOCK_EX)
    elif why == "cannot be locked":
        monkeypatch.setattr(fcntl, "flock", _refusing(errno.ENOLCK))
    else:
        monkeypatch.setattr(os, "open", _refusing(errno.EACCES))
    # Another one that starts could take the path between our look at the socket and its end.
    with pytest.raises(OSError, match=r"cannot be locked.*remove it") as caught:
        listen_unix(path)
    assert caught.value.filename == path
    assert os.lstat(path).st_ino == inode
    os.unlink(path)
    listener = listen_unix(path)
    assert _connects(path)
    listener.socket.close()
    os.close(directory)


def _refusing(error: int) -> Callable[..., int]:
    def refuse(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    return refuse


def test_removing_takes_the_file_away_and_not_the_connections(path: str) -> None:
    listener = listen_unix(path)
    listener.remove()
    assert not os.path.lexists(path)
    listener.remove()  # a second time: nothing to do
    listener.socket.close()


def test_a_file_that_is_no_longer_ours_is_not_removed(path: str) -> None:
    listener = listen_unix(path)
    os.unlink(path)
    other = listen_unix(path)  # ours is open still, so its inode cannot be this one's
    listener.remove()
    assert _connects(path)
    listener.socket.close()
    other.socket.close()


def test_a_path_too_long_for_a_socket_is_refused_with_the_limit(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="at most 107") as caught:
        listen_unix(str(tmp_path / ("x" * 108)))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_path_of_the_greatest_length_is_accepted(path: str) -> None:
    longest = "x" * sockets.UNIX_PATH_LENGTH_MAX
    listener = listen_unix(longest)
    assert _connects(longest)
    listener.socket.close()


def test_a_missing_directory_is_told_with_the_socket_s_path(path: str) -> None:
    with pytest.raises(OSError, match="directory does not exist") as caught:
        listen_unix("missing/f.sock")
    assert caught.value.filename == "missing/f.sock"


def test_a_failed_start_leaves_no_socket_open(path: str) -> None:
    Path(path).write_text("")
    with no_new_descriptor(), pytest.raises(OSError, match="no socket"):
        listen_unix(path)


def test_listening_sockets_do_not_block(path: str) -> None:
    listener = listen_unix(path)
    with pytest.raises(BlockingIOError):
        listener.socket.accept()
    listener.socket.close()


# -- TCP -----------------------------------------------------------------------------------------


def test_tcp_listens_on_the_loopback_unless_told_otherwise() -> None:
    found = listen_tcp(None, 0)
    assert {sock.getsockname()[0] for sock in found} <= {"127.0.0.1", "::1"}
    for sock in found:
        socket.create_connection(sock.getsockname()[:2]).close()
        sock.close()


def test_tcp_listens_on_the_address_that_was_asked_for() -> None:
    (sock,) = listen_tcp("127.0.0.2", 0)
    assert sock.getsockname()[0] == "127.0.0.2"
    with pytest.raises(BlockingIOError):
        sock.accept()
    sock.close()


def test_a_port_in_use_is_told_with_address_and_port() -> None:
    (taken,) = listen_tcp("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match="port is in use") as caught:
        listen_tcp("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.filename == f"127.0.0.1 port {port}"
    taken.close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match="not an address of this machine"):
        listen_tcp("192.0.2.1", 0)


def test_a_name_that_does_not_resolve_is_refused() -> None:
    with pytest.raises(OSError, match="give an address of this machine"):
        listen_tcp("no such name", 0)


def test_a_loopback_without_ipv6_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[Any]:
        stream = socket.SOCK_STREAM
        return [
            (socket.AF_INET6, stream, 6, "", ("2001:db8::1", 0, 0, 0)),
            (socket.AF_INET, stream, 6, "", ("127.0.0.1", 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = listen_tcp(None, 1 << 15)
    assert [sock.family for sock in found] == [socket.AF_INET]
    found[0].close()


# -- systemd -------------------------------------------------------------------------------------


@pytest.fixture
def handed(path: str) -> Iterator[tuple[int, str]]:
    """(first descriptor, path) of two listening sockets side by side, as systemd hands them."""
    gc.collect()  # sockets of a test that failed on purpose still own these numbers
    first = 900
    for number, name in enumerate((path, "backup.sock")):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            os.dup2(listener.fileno(), first + number)
    yield first, path
    for number in (first, first + 1):
        try:
            os.close(number)
        except OSError:
            continue  # the test has closed it


def _environment(**changes: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", **changes}


def test_sockets_handed_over_come_with_their_names(handed: tuple[int, str]) -> None:
    first, path = handed
    environment = _environment(LISTEN_FDNAMES="guest:backup", OTHER="stays")
    found = activated_sockets(environment, first=first)
    assert found is not None
    assert [name for name, _ in found] == ["guest", "backup"]
    assert found[0][1].getsockname() == path
    assert environment == {"OTHER": "stays"}, "a child would take the sockets for its own"
    for _, sock in found:
        assert not os.get_inheritable(sock.fileno())
        with pytest.raises(BlockingIOError):
            sock.accept()
        sock.close()


@pytest.mark.parametrize("names", ["", "one", "one:two:three"])
def test_names_that_do_not_fit_the_sockets_count_as_unknown(
    handed: tuple[int, str], names: str
) -> None:
    found = activated_sockets(_environment(LISTEN_FDNAMES=names), first=handed[0])
    assert found is not None
    assert [name for name, _ in found] == ["unknown", "unknown"]
    for _, sock in found:
        sock.close()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "2"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "2"},
        {"LISTEN_PID": "x", "LISTEN_FDS": "2"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
    ],
)
def test_sockets_meant_for_another_process_are_left_alone(environment: dict[str, str]) -> None:
    assert activated_sockets(environment) is None
    assert environment == {}


@pytest.mark.parametrize("kind", ["closed", "file", "connected", "datagram"])
def test_what_is_no_listening_stream_socket_is_refused(
    handed: tuple[int, str], kind: str, path: str
) -> None:
    first, _ = handed
    other: Any = None
    if kind == "closed":
        os.close(first + 1)
    elif kind == "file":
        other = open("file", "wb")  # noqa: SIM115
    elif kind == "connected":
        other, _ = socket.socketpair()
    else:
        other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if other is not None:
        os.dup2(other.fileno(), first + 1)
        other.close()
    with pytest.raises(OSError, match="ListenStream=") as caught:
        activated_sockets(_environment(), first=first)
    assert caught.value.filename == f"descriptor {first + 1}"


def test_the_maker_of_a_unix_socket_is_known(path: str) -> None:
    listener = listen_unix(path)
    assert maker_pid(listener.socket) == os.getpid()
    listener.socket.close()


def test_the_maker_of_a_tcp_socket_is_not_known() -> None:
    (sock,) = listen_tcp("127.0.0.1", 0)
    assert maker_pid(sock) is None
    sock.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(path: str, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        if abstract:
            manager.bind(f"\0fleecenbd-test-{os.getpid()}")
            address = f"@fleecenbd-test-{os.getpid()}"
        else:
            manager.bind(os.path.abspath(path))
            address = os.path.abspath(path)
        assert notify({"NOTIFY_SOCKET": address}, "READY=1", "STATUS=serving")
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_nobody_is_told_where_nobody_asked(environment: dict[str, str]) -> None:
    assert not notify(environment, "READY=1")


def test_a_manager_that_has_gone_is_no_error(path: str) -> None:
    assert not notify({"NOTIFY_SOCKET": os.path.abspath("gone")}, "READY=1")


def test_a_manager_that_does_not_read_holds_nobody_up(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "NOTIFY_TIMEOUT_S", 0.01)
    address = os.path.abspath(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        sent = 0
        while notify({"NOTIFY_SOCKET": address}, "READY=1"):
            sent += 1
    assert sent > 0
