"""Two names of one export."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from fleecenbd.storage.nbd_places import leads_to_same, leads_to_socket, named_server

ADDRESSES = {"store": ["10.0.0.7", "fd00::7"], "seven": ["10.0.0.7"], "eight": ["10.0.0.8"]}


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, *, type: int) -> list[object]:
        if host == "nowhere":
            raise socket.gaierror("Name or service not known")
        return [(0, type, 0, "", (address, port)) for address in ADDRESSES.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("nbd://store/vm", "nbd://store/vm", True),
        ("nbd://store/vm", "nbd://store:10809/vm", True),
        ("nbd://store/vm", "nbds://STORE/vm", True),
        ("nbd://store/vm", "nbd://seven/vm", True),
        ("nbd://store/vm", "nbd://[fd00::7]/vm", True),
        ("nbd://store/v%6d", "nbd://seven//vm", False),
        ("nbd://store/v%6d", "nbd://seven/vm", True),
        ("nbd://store", "nbd://seven/", True),
        ("nbd://store/vm", "nbd://eight/vm", False),
        ("nbd://store/vm", "nbd://store:10810/vm", False),
        ("nbd://store/vm", "nbd://store/data", False),
        ("nbd://nowhere/vm", "nbd://store/vm", False),
        ("nbd://nowhere/vm", "nbd://nowhere/vm", True),
        ("nbd://store:99999/vm", "nbd://store/vm", False),
        ("nbd+unix:///vm?socket=/run/s", "nbd+unix:///vm?socket=/run/../run/s", True),
        ("nbd+unix:///vm?socket=/run/s", "nbds+unix:///vm?socket=/run/t", False),
        ("nbd+unix:///vm?socket=/run/s", "nbd://store/vm", False),
    ],
)
def test_whether_two_uris_lead_to_one_export(one: str, other: str, same: bool) -> None:
    assert leads_to_same(one, other) == same
    assert leads_to_same(other, one) == same


def test_a_link_to_a_socket_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "socket")
    uris = [f"nbd+unix:///vm?socket={tmp_path / name}" for name in ("link", "socket")]
    assert leads_to_same(*uris)


def test_a_path_is_no_server() -> None:
    assert named_server("/disks/vm.raw") == ("/disks/vm.raw",)
    assert named_server("nbd://host") != named_server("vm.raw")


@pytest.mark.parametrize(
    ("bound", "named", "ours"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "127.0.0.2", True),
        ("0.0.0.0", "10.0.0.7", False),
    ],
)
def test_our_own_ports_are_known(bound: str, named: str, ours: bool) -> None:
    with socket.create_server((bound, 0)) as sock:
        port = sock.getsockname()[1]
        assert leads_to_socket(f"nbd://{named}:{port}/any", [sock]) is ours
        assert not leads_to_socket(f"nbd://{named}:{port + 1}/any", [sock])


def test_our_own_unix_sockets_are_known(tmp_path: Path) -> None:
    path, link = tmp_path / "s+t.sock", tmp_path / "link"
    link.symlink_to(path)
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as unnamed:
        sock.bind(str(path))
        assert leads_to_socket(f"nbd+unix:///any?socket={path}", [unnamed, sock])
        assert leads_to_socket(f"nbd+unix:///any?socket={link}", [sock])
        assert leads_to_socket(f"nbd+unix:///any?x=y&socket={quote(str(path), safe='')}", [sock])
        assert not leads_to_socket(f"nbd+unix:///any?socket={tmp_path}/other", [sock])
        assert not leads_to_socket("nbd://127.0.0.1/any", [sock])
