"""nbdkit's filters in front of the plugin: what each does, and that the data is right."""

import errno
import re
import time
from pathlib import Path

import nbd
import pytest

from tests.behind_nbdkit import behind_nbdkit
from tests.disks import first_difference
from tests.plugin.conftest import SIZE
from tests.serving import connected, run


def test_log_tells_every_request_and_nothing_is_lost(disk: Path, tmp_path: Path) -> None:
    logfile, target = tmp_path / "requests.log", tmp_path / "backup.raw"
    with behind_nbdkit(
        *(tmp_path, disk, "--begin", "n"),
        options=["--filter=log"],
        settings=[f"logfile={logfile}"],
    ) as server:
        run("nbdcopy", server.uri("vm@n"), target)
        with connected(server.uri("vm@n")) as backup:
            backup.trim(65536, 131072)
    assert first_difference(disk, target) is None
    told = logfile.read_text()
    assert re.search(r" Connect .*export=.vm@n", told)
    assert re.search(r" Read ", told)
    assert re.search(r" Trim .*offset=0x20000 count=0x10000", told)


def test_rate_holds_a_pull_back_and_nothing_is_lost(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    # 2 MiB at 8 Mbit/s are two seconds, of which the filter hands out a part beforehand.
    with behind_nbdkit(
        *(tmp_path, disk, "--begin", "n"),
        options=["--filter=rate"],
        settings=["rate=8M", "burstiness=0.5"],
    ) as server:
        started = time.monotonic()
        run("nbdcopy", "--no-extents", server.uri("vm@n"), target)
        elapsed = time.monotonic() - started
    assert elapsed > SIZE * 8 / 8e6 / 2
    assert first_difference(disk, target) is None


def test_delay_keeps_a_read_waiting_and_not_the_guests_write(disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    with (
        behind_nbdkit(
            *(tmp_path, disk, "--begin", "n"),
            options=["--filter=delay"],
            settings=["delay-read=500ms"],
        ) as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@n")) as backup,
    ):
        started = time.monotonic()
        buffer = nbd.Buffer(4096)
        cookie = backup.aio_pread(buffer, 0)
        guest.pwrite(b"w" * 4096, 0)
        while not backup.aio_command_completed(cookie):
            backup.poll(-1)
        assert time.monotonic() - started >= 0.5
        assert bytes(buffer.to_bytearray()) == before[:4096]


def test_error_fails_reads_until_it_is_told_to_stop(disk: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    trigger.touch()
    with (
        behind_nbdkit(
            *(tmp_path, disk, "--begin", "n"),
            options=["--filter=error"],
            settings=["error-pread=ENOSPC", "error-pread-rate=100%", f"error-pread-file={trigger}"],
        ) as server,
        connected(server.uri("vm@n")) as backup,
    ):
        with pytest.raises(nbd.Error) as caught:
            backup.pread(4096, 0)
        assert caught.value.errnum == errno.ENOSPC
        trigger.unlink()
        assert bytes(backup.pread(SIZE, 0)) == disk.read_bytes()
