"""A guest export never comes back different while its guest may come back."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbd
import pytest

from fleecenbd.server import guest_records
from fleecenbd.server.guest_records import GuestRecords
from tests.disks import MIB, make_disk
from tests.serving import FLEECENBD, Serving, serving, try_run

HERE = os.getpid()


def _ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


async def _noted(tmp_path: Path, pid: int | None = HERE) -> GuestRecords:
    records = GuestRecords(tmp_path / "state")
    records.came("vm.raw", MIB, pid)
    await records.settle()
    return records


async def test_an_image_that_is_as_it_was_is_served(tmp_path: Path) -> None:
    records = await _noted(tmp_path)
    records.check("vm", "vm.raw", MIB, writable=True)
    records.check("vm", "other.raw", 2 * MIB, writable=False)


@pytest.mark.parametrize("pid", [HERE, None], ids=["known", "unknown"])
async def test_another_size_is_refused_while_the_guest_may_come_back(
    tmp_path: Path, pid: int | None
) -> None:
    records = await _noted(tmp_path, pid)
    with pytest.raises(OSError, match=f"had {MIB} bytes, and has {2 * MIB} now") as caught:
        records.check("vm", "vm.raw", 2 * MIB, writable=True)
    assert caught.value.errno == errno.EBUSY


async def test_a_disk_that_could_be_written_is_not_served_read_only(tmp_path: Path) -> None:
    records = await _noted(tmp_path)
    with pytest.raises(OSError, match="could be written, and would be read-only now"):
        records.check("vm", "vm.raw", MIB, writable=False)


async def test_a_guest_whose_process_has_ended_does_not_come_back(tmp_path: Path) -> None:
    records = await _noted(tmp_path, _ended_process())
    records.check("vm", "vm.raw", 2 * MIB, writable=False)


async def test_another_process_with_the_guest_s_number_is_not_the_guest(tmp_path: Path) -> None:
    records = await _noted(tmp_path)
    (path,) = (tmp_path / "state" / "guests").iterdir()
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "started": record["started"] - 1}))
    records.check("vm", "vm.raw", 2 * MIB, writable=False)


@pytest.mark.parametrize("when", ["then", "now"])
async def test_a_guest_whose_process_hides_its_start_is_known_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    hidden = tmp_path / "empty"
    with monkeypatch.context() as patch:
        if when == "then":
            patch.setattr(guest_records, "PROCESSES", hidden)
        records = await _noted(tmp_path)
    if when == "now":
        monkeypatch.setattr(guest_records, "PROCESSES", hidden)
    with pytest.raises(OSError, match=f"pid {HERE}"):
        records.check("vm", "vm.raw", 2 * MIB, writable=True)


def test_a_process_s_start_is_found_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_records, "PROCESSES", tmp_path)
    (tmp_path / "7").mkdir()
    fields = " ".join(str(number) for number in range(4, 53))
    (tmp_path / "7" / "stat").write_bytes(b"7 (a) R (\xff) S " + fields.encode() + b"\n")
    assert guest_records._started(7) == 22


async def test_a_guest_of_before_the_last_boot_does_not_come_back(tmp_path: Path) -> None:
    records = await _noted(tmp_path)
    (path,) = (tmp_path / "state" / "guests").iterdir()
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "boot": "another"}))
    records.check("vm", "vm.raw", 2 * MIB, writable=True)


async def test_a_guest_that_has_left_does_not_come_back(tmp_path: Path) -> None:
    records = await _noted(tmp_path)
    records.left("vm.raw")
    await records.settle()
    records.check("vm", "vm.raw", 2 * MIB, writable=False)


async def test_a_record_that_cannot_be_read_is_told_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = await _noted(tmp_path)
    (path,) = (tmp_path / "state" / "guests").iterdir()
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        caplog.clear()
        records.check("vm", "vm.raw", 2 * MIB, writable=True)
        assert caplog.messages == [
            f"{path} is no record of a guest that was connected, and is ignored; remove it"
        ]


async def test_a_record_that_one_may_not_read_names_the_file_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = await _noted(tmp_path)
    (path,) = (tmp_path / "state" / "guests").iterdir()

    def refuse(*_: object, **__: object) -> str:  # root may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    records.check("vm", "vm.raw", 2 * MIB, writable=True)
    assert caplog.messages == [
        f"{path}, on guests that were connected, cannot be read (Permission denied), and is "
        "ignored; give another folder with --state-dir"
    ]


async def test_a_state_directory_that_cannot_be_written_is_told_and_hurts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file")
    records = await _noted(tmp_path)
    (message,) = caplog.messages
    assert message == (
        f"it cannot be noted which guests are connected: {tmp_path}/state/guests: "
        "Not a directory; give another folder with --state-dir"
    )
    records.check("vm", "vm.raw", MIB, writable=True)


async def test_a_record_that_no_thread_can_write_is_told_and_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    await _noted(tmp_path)
    assert "cannot be noted" in caplog.text


async def test_a_machine_that_does_not_tell_its_boot_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guest_records, "BOOT_ID", tmp_path / "missing")
    await _noted(tmp_path)
    assert "cannot be noted" in caplog.text


def _connect(server: Serving) -> nbd.NBD:
    guest = nbd.NBD()
    guest.connect_uri(server.uri("vm"))
    return guest


def _refused(tmp_path: Path, disk: Path, *options: str) -> str:
    result = try_run(
        *(FLEECENBD, "serve", disk, "-U", tmp_path / "f.sock"),
        *("--state-dir", tmp_path / "state", *options),
        timeout_s=30,
    )
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_refuses_what_the_guest_of_the_last_one_would_find_different(
    tmp_path: Path, how: signal.Signals
) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    guest = None
    try:
        with serving(tmp_path, disk) as server:
            guest = _connect(server)
            guest.pwrite(b"x", 0)
            if how == signal.SIGKILL:
                # The record is written beside the guest's requests; a stop waits for it.
                while not list((tmp_path / "state").glob("guests/*.json")):
                    guest.pread(1, 0)
                server.process.kill()
                server.process.wait()
                raise InterruptedError
    except InterruptedError:
        pass
    assert guest is not None
    assert "would be read-only" in _refused(tmp_path, disk, "--read-only")
    os.truncate(disk, 2 * MIB)
    line = _refused(tmp_path, disk)
    assert str(disk) in line
    assert f"pid {HERE}" in line
    os.truncate(disk, MIB)
    with serving(tmp_path, disk) as server:
        again = _connect(server)
        assert bytes(again.pread(1, 0)) == b"x"
        again.shutdown()
    # It left by itself: the disk may change.
    os.truncate(disk, 2 * MIB)
    with serving(tmp_path, disk) as server:
        assert _connect(server).get_size() == 2 * MIB
