"""Servers started for the benchmarks, and what is read from their processes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from benchmarks import peers
from benchmarks.images import make_image

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    make_image(path, SIZE)
    return path


def _connect(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("start", [peers.fleecenbd, peers.qemu_fleecing])
def test_a_fleecing_servers_old_data_is_seen_whether_its_file_has_a_name_or_not(
    tmp_path: Path, image: Path, start: Callable[..., object], tcp: bool
) -> None:
    before = image.read_bytes()
    with start(tmp_path, image, tcp=tcp) as server:
        assert server.temp_bytes() == 0
        guest, backup = _connect(server.guest), _connect(server.fleece)
        guest.pwrite(b"new!" * 1024, 8192)
        assert 4096 <= server.temp_bytes() <= 65536
        assert backup.pread(4096, 8192) == before[8192:12288]
        assert guest.pread(4096, 8192) == b"new!" * 1024
        assert server.resident_bytes() > 1 << 20
        assert server.cpu_s() > 0
        for client in (guest, backup):
            client.shutdown()
    assert not (tmp_path / "qemu-temp.raw").exists()


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("start", [peers.qemu_nbd, peers.nbdkit_file])
def test_a_server_of_a_guests_disk_writes_to_the_image(
    tmp_path: Path, image: Path, start: Callable[..., object], tcp: bool
) -> None:
    with start(tmp_path, image, tcp=tcp) as server:
        client = _connect(server.guest)
        client.pwrite(b"seen" * 1024, 4096)
        client.flush()
        client.shutdown()
    assert image.read_bytes()[4096:8192] == b"seen" * 1024


def test_a_server_that_ends_at_once_is_shown_with_what_it_said(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended with status 1: .*missing\.raw"),
        peers.fleecenbd(tmp_path, tmp_path / "missing.raw"),
    ):
        pass


def test_the_cpu_clock_of_another_process_is_its_own() -> None:
    server = peers.Server((), (), (os.getpid(),), 0.0)
    before, seen = time.process_time(), server.cpu_s()
    assert before <= seen <= time.process_time()
