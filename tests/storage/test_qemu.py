"""A qemu-storage-daemon of ours: who is cancelled leaves none."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.resizing import is_away
from fleecenbd.storage import qemu, remote
from fleecenbd.storage.qemu import QemuChild
from tests.descriptors import no_new_descriptor


async def test_a_start_that_is_cancelled_leaves_no_child() -> None:
    child = QemuChild("image")
    starting = asyncio.ensure_future(child.start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert child._process is not None, "who is known can be ended"
    await child.kill()
    assert child._process.returncode is not None


async def test_a_child_that_hangs_up_and_lives_loses_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "HUNG_UP_S", 0.05)
    path = tmp_path / "vda.qcow2"
    _make(path)
    device = await qemu.open_qcow2(str(path))
    lost = asyncio.get_running_loop().create_future()
    disk = Disk("vda", device)
    tell = device.on_lost
    assert tell is not None

    def is_lost(why: str) -> None:
        tell(why)
        lost.set_result(why)

    device.on_lost = is_lost
    await device._child.execute("block-export-del", {"id": "export", "mode": "hard"})
    with pytest.raises(OSError, match="lost"):
        await device.pread(0, 512)
    assert not is_away(disk)
    async with asyncio.timeout(30):
        why = await lost
    assert why.startswith("qemu-storage-daemon does not serve it any more: ")
    assert disk.lost == why
    device.close()
    await device.wait_closed()


async def test_a_child_that_cannot_be_watched_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for an end that nobody would be told of."""
    path = tmp_path / "vda.qcow2"
    _make(path)

    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    async with asyncio.timeout(30):
        with no_new_descriptor(), pytest.raises(OSError, match="too many open files"):
            await qemu.open_qcow2(str(path))
    monkeypatch.undo()
    device = await qemu.open_qcow2(str(path))  # nobody has it locked
    device.close()
    await device.wait_closed()


async def test_a_child_that_hangs_at_the_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "END_TIMEOUT_S", 0.2)
    monkeypatch.setattr(remote, "CLOSE_S", 0.2)
    path = tmp_path / "vda.qcow2"
    _make(path)
    device = await qemu.open_qcow2(str(path))
    process = device._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    device.close()
    async with asyncio.timeout(30):
        await device.wait_closed()
        await device._child.ended.wait()
    assert process.returncode == -signal.SIGKILL


def _make(path: Path) -> None:
    words = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"]
    subprocess.run(words, check=True)
