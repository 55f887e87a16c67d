"""A guest's write that waits keeps one of nbdkit's threads; a backup's TRIM lets it go on."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import nbd
import pytest

from tests.behind_nbdkit import ROOT, behind_nbdkit
from tests.serving import START_TIMEOUT_S, Serving, connected

GATED = Path(__file__).with_name("gated.py")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Where the FIFO will be, from the test's own moment on."""
    return tmp_path / "gate"


@pytest.fixture
def gated(
    tmp_path: Path, disk: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractContextManager[Serving]]:
    """Starts nbdkit with one thread for each connection, and copies that wait."""
    monkeypatch.setattr("tests.behind_nbdkit.PLUGIN", GATED)
    environment = {"GATE": str(gate), "PYTHONPATH": str(ROOT)}
    return partial(
        *(behind_nbdkit, tmp_path, disk, "--begin", "n"),
        options=["-t", "1"],
        environment=environment,
    )


def _held(gate: Path, guest: nbd.NBD) -> int:
    """The FIFO, open for writing once the copy has it open for reading: now the copy hangs."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
            guest.poll(20)


def _await(client: nbd.NBD, cookie: int) -> None:
    while not client.aio_command_completed(cookie):
        assert client.poll(60_000) == 1, "it still waits"


def test_a_trim_lets_a_waiting_write_and_what_stands_behind_it_go_on(
    gated: Callable[..., AbstractContextManager[Serving]], gate: Path, tmp_path: Path
) -> None:
    before = (tmp_path / "before.raw").read_bytes()
    with (
        gated() as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@n")) as backup,
    ):
        os.mkfifo(gate)
        new = bytearray(b"n" * 4096)
        write = guest.aio_pwrite(nbd.Buffer.from_bytearray(new), 0)
        read = guest.aio_pread(nbd.Buffer(4096), 65536)
        hold = _held(gate, guest)
        gate.unlink()
        try:
            # Another connection has a thread of its own, and this range waits for nothing.
            assert bytes(backup.pread(4096, 65536)) == before[65536 : 65536 + 4096]
            guest.poll(0)
            assert not guest.aio_command_completed(write)
            assert not guest.aio_command_completed(read), "it has overtaken in the only thread"
            # Its own reply waits until the copy's space can be freed.
            trim = backup.aio_trim(4096, 0)
            for cookie in (write, read):
                _await(guest, cookie)
            assert not backup.aio_command_completed(trim)
        finally:
            os.close(hold)
        _await(backup, trim)
        assert bytes(guest.pread(4096, 0)) == new


def test_a_temp_image_that_hangs_at_the_end_is_told_and_the_process_ends_all_the_same(
    gated: Callable[..., AbstractContextManager[Serving]], gate: Path
) -> None:
    with gated("--cbw-timeout", "0.2", status=1) as server:
        with connected(server.uri("vm")) as guest:
            os.mkfifo(gate)
            write = guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"n" * 4096)), 0)
            hold = _held(gate, guest)
            gate.unlink()
            _await(guest, write)  # the session has broken instead
        assert server.stop() == 1
        os.close(hold)
    assert "vm@n broke" in server.messages()
    assert "calls that hang" in server.messages()
