"""Sockets as they were asked for, and the URIs that lead to them."""

import socket
from contextlib import ExitStack
from pathlib import Path

import nbd
import pytest

from fleecenbd.cli.endpoints import Addresses, Endpoint, open_endpoints
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.values import DiskSpec
from fleecenbd.server.sockets import UnixListener
from tests.descriptors import open_descriptors


def test_a_unix_uri_has_the_whole_path_and_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as cleanup:
        (endpoint,) = open_endpoints(Addresses(unix="f.sock"), cleanup)
        assert endpoint.uri("vm@nightly") == (
            f"nbd+unix:///vm@nightly?socket={tmp_path.resolve()}/f.sock"
        )
        assert endpoint.port is None
        endpoint.socket.close()


def test_libnbd_reads_the_uri_of_a_path_with_special_characters(tmp_path: Path) -> None:
    path = tmp_path / "a &?=+%20#;ä.sock"
    with ExitStack() as cleanup:
        (endpoint,) = open_endpoints(Addresses(unix=str(path)), cleanup)
        handle = nbd.NBD()
        handle.aio_connect_uri(endpoint.uri("vm"))
        endpoint.socket.setblocking(True)
        endpoint.socket.settimeout(10)
        accepted, _ = endpoint.socket.accept()
        accepted.close()
        endpoint.socket.close()


def test_tcp_uris_have_brackets_around_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        port = sock.getsockname()[1]
        endpoint = Endpoint(sock, backup_only=False)
        assert endpoint.uri("vm") == f"nbd://[::1]:{port}/vm"
        assert endpoint.port == port


def test_a_wildcard_address_is_shown_as_this_machine() -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        endpoint = Endpoint(sock, backup_only=False)
        assert endpoint.uri("vm") == f"nbd://{socket.gethostname()}:{endpoint.port}/vm"


def test_all_sockets_are_opened_and_their_files_go(tmp_path: Path) -> None:
    paths = tmp_path / "f.sock", tmp_path / "b.sock"
    addresses = Addresses(
        unix=str(paths[0]),
        backup_unix=str(paths[1]),
        unix_mode=0o666,
        host="127.0.0.1",
        port=0,
        backup_port=0,
    )
    with ExitStack() as cleanup:
        endpoints = open_endpoints(addresses, cleanup)
        assert [endpoint.backup_only for endpoint in endpoints] == [False, True, False, True]
        for path in paths:
            assert path.stat().st_mode & 0o777 == 0o666
    for path in paths:
        assert not path.exists()
    for endpoint in endpoints:
        endpoint.socket.close()


def test_where_one_socket_cannot_be_opened_the_files_of_others_go_while_those_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.sock"
    were_open: list[int] = []
    remove = UnixListener.remove

    def watched(listener: UnixListener) -> None:
        were_open.append(listener.socket.fileno())
        remove(listener)

    monkeypatch.setattr(UnixListener, "remove", watched)
    before = open_descriptors()
    addresses = Addresses(unix=str(path), backup_unix=str(tmp_path / "missing" / "b.sock"))
    with ExitStack() as cleanup:
        with pytest.raises(CommandError, match=r"missing/b\.sock: its directory does not exist"):
            open_endpoints(addresses, cleanup)
        assert not path.exists()
        assert open_descriptors().keys() <= before.keys()
    assert were_open[0] >= 0
    assert len(were_open) == 1


def test_a_private_socket_is_in_a_directory_of_its_own_that_goes() -> None:
    with ExitStack() as cleanup:
        (endpoint,) = open_endpoints(Addresses(unix="-"), cleanup)
        assert endpoint.unix is not None
        directory = Path(endpoint.unix).parent
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()
    endpoint.socket.close()


@pytest.mark.parametrize(
    ("options", "empty", "command"),
    [
        ({}, None, "vm"),
        ({"session": "n"}, None, "vm@n"),
        ({"session": "n", "addresses": None}, "vm@n", "vm@n"),
        ({"addresses": None}, None, "vm"),
        ({"session": "n", "default_export": "vm", "addresses": None}, "vm", "vm"),
        ({"session": "n", "two": True, "addresses": None}, None, ""),
        ({"two": True}, None, ""),
        ({"two": True, "default_export": "b"}, "b", "b"),
    ],
)
def test_what_the_empty_name_means_and_what_a_command_gets(
    options: dict[str, object], empty: str | None, command: str
) -> None:
    disks = (DiskSpec("vm", "vm.raw"), DiskSpec("b", "b.raw"))
    given: dict[str, object] = {"addresses": Addresses(unix="f.sock"), **options}
    given["disks"] = disks if given.pop("two", False) else disks[:1]
    serve = ServeOptions(**given)
    assert serve.empty_name == empty
    assert serve.command_export == command
