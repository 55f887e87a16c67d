"""examples/nbdkit: the engine in nbdkit, and nbdkit in front of a server."""

import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.examples.conftest import EXAMPLES, example
from tests.serving import START_TIMEOUT_S, STOP_TIMEOUT_S, connected, free_port, run, serving

PLUGIN, IN_FRONT = "nbdkit/plugin.sh", "nbdkit/in-front.sh"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 4 MiB; what servers keep goes beside it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return make_disk(tmp_path / "vm.raw", 4 * MIB + 512)


def test_a_backup_through_the_plugin_is_complete(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    done = example(PLUGIN, disk, target)
    assert done.status == 0, done.stderr
    assert first_difference(disk, target) is None


def test_a_backup_of_an_image_in_use_is_refused_and_leaves_nothing(
    disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "backups").mkdir()
    with serving(tmp_path, disk):
        done = example(PLUGIN, disk, tmp_path / "backups" / "vm.raw")
    assert done.status != 0
    assert "in use" in done.stderr
    assert list((tmp_path / "backups").iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_target_that_is_no_file_is_refused_and_left_as_it_is(
    disk: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    target = tmp_path / "backups" / "vm.raw"
    target.parent.mkdir()
    make(target)
    kind = target.stat().st_mode
    done = example(PLUGIN, disk, target)
    assert done.status == 1
    assert "not a file" in done.stderr
    assert target.stat().st_mode == kind
    assert list(target.parent.rglob("*")) == [target]


@contextmanager
def _in_front(tmp_path: Path, *arguments: str | Path) -> Iterator[None]:
    """The example, once nbdkit listens."""
    pidfile = tmp_path / "pidfile"
    os.mkfifo(pidfile)
    ready = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    with (tmp_path / "nbdkit.log").open("wb") as log:
        command = [EXAMPLES / IN_FRONT, *arguments, "-P", pidfile]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert select.select([ready], [], [], START_TIMEOUT_S)[0], "nbdkit did not get ready"
        yield
    finally:
        os.close(ready)
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def test_clients_pull_and_trim_over_tls_and_every_request_is_logged(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy_disk(disk, tmp_path / "before.raw")
    keys, requests, target = tmp_path / "keys.psk", tmp_path / "requests", tmp_path / "backup.raw"
    run("psktool", "-u", "backup", "-p", keys)
    monkeypatch.setenv("REQUESTS", str(requests))
    port = free_port()
    uri = f"nbds://backup@127.0.0.1:{port}/?tls-psk-file={keys}"
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        with connected(server.uri("vm")) as guest:
            guest.pwrite(b"new" * 100_000, 1000)
        with _in_front(tmp_path, server.unix, "vm@nightly", keys, "-p", str(port)):
            run("nbdcopy", uri, target)
            backup = nbd.NBD()
            backup.set_uri_allow_local_file(True)
            backup.connect_uri(uri)
            backup.trim(MIB, 0)
            backup.shutdown()
        with connected(server.uri("vm@nightly")) as direct, pytest.raises(nbd.Error):
            direct.pread(1, MIB - 1)
    assert first_difference(before, target) is None
    assert "Read" in requests.read_text()
    assert "Trim" in requests.read_text()


def test_a_guests_disk_is_not_put_on_the_network(tmp_path: Path) -> None:
    done = example(IN_FRONT, tmp_path / "f.sock", "vm", tmp_path / "keys")
    assert done.status == 1
    assert "DISK@SESSION" in done.stderr


@pytest.mark.parametrize("name", [PLUGIN, IN_FRONT])
def test_wrong_usage_is_answered_with_the_right_one(name: str) -> None:
    done = example(name)
    assert done.status == 2
    assert done.stderr.startswith("usage: ")
