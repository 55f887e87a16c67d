"""What a qcow2 image builds on: nobody writes there while its disk is open."""

from __future__ import annotations

import asyncio
import errno
import logging
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fleecenbd.storage import backing as backing_module
from fleecenbd.storage import qemu
from fleecenbd.storage.backing import Backing
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.qemu import open_qcow2
from tests.descriptors import descriptors_of, no_new_descriptor

SIZE = 1 << 20
TIMEOUT_S = 30.0


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A raw image, a qcow2 image over it, and one over that."""
    raw, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    raw.write_bytes(b"r" * SIZE)
    _overlay(middle, raw, "raw")
    _overlay(top, middle, "qcow2")
    return raw, middle, top


def _overlay(image: Path, below: Path, kind: str) -> None:
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", kind, image]
    subprocess.run(words, check=True)


def _writes(image: Path, kind: str) -> str:
    """What QEMU says when it is to write there."""
    words = ["qemu-io", "-f", kind, "-c", "write -q -P 1 0 512", str(image)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stderr


@pytest.mark.parametrize("read_only", [False, True])
async def test_nobody_writes_to_what_an_open_image_builds_on(
    chain: tuple[Path, Path, Path], read_only: bool
) -> None:
    raw, middle, top = chain
    device = await open_qcow2(str(top), read_only=read_only)
    for image, kind in ((raw, "raw"), (middle, "qcow2")):
        assert "Failed to get" in _writes(image, kind)
    with pytest.raises(OSError, match="in use by this very process") as caught:
        FileDevice.open(raw)
    assert caught.value.errno == errno.EBUSY
    reader = FileDevice.open(raw, read_only=True)
    reader.close()
    await reader.wait_closed()
    # Others may build on it, too.
    other = top.with_name("other.qcow2")
    _overlay(other, raw, "raw")
    second = await open_qcow2(str(other))
    for opened in (second, device):
        opened.close()
        await opened.wait_closed()
    assert _writes(middle, "qcow2") == ""
    assert _writes(raw, "raw") == ""
    assert descriptors_of(raw.parent) == []


async def test_what_another_image_here_builds_on_is_told_at_once(
    chain: tuple[Path, Path, Path],
) -> None:
    """Not after a wait, nor as another process that is to be ended: that would be our own."""
    _, middle, top = chain
    device = await open_qcow2(str(top))
    started = time.monotonic()
    with no_new_descriptor(), pytest.raises(OSError, match=rf"qcow2:{top} builds on it") as caught:
        await open_qcow2(str(middle))
    assert caught.value.errno == errno.EBUSY
    assert time.monotonic() - started < qemu.LOCK_WAIT_S / 2
    device.close()
    await device.wait_closed()
    device = await open_qcow2(str(middle))
    device.close()
    await device.wait_closed()


async def test_what_somebody_may_write_to_is_not_built_on(chain: tuple[Path, Path, Path]) -> None:
    raw, _, top = chain
    writer = FileDevice.open(raw)
    with (
        no_new_descriptor(),
        pytest.raises(OSError, match=r"base\.raw, which is in use by this") as caught,
    ):
        await open_qcow2(str(top), name="qcow2:top.qcow2")
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "qcow2:top.qcow2")
    # As --force-share has it.
    device = await open_qcow2(str(top), locks=False)
    device.close()
    await device.wait_closed()
    writer.close()
    await writer.wait_closed()


async def test_what_cannot_be_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "base.raw"
    image.write_bytes(bytes(SIZE))
    nodes = [
        {"drv": "file", "ro": True, "file": str(image)},
        {"drv": "file", "ro": True, "file": str(tmp_path / "gone")},
        {"drv": "file", "ro": False, "file": str(tmp_path / "written")},
        {"drv": "nbd", "ro": True, "file": "nbd://localhost"},
    ]

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "the image cannot be locked")

    monkeypatch.setattr(backing_module, "lock_image", refuse)
    backing = Backing()
    with caplog.at_level(logging.WARNING):
        await backing.lock("qcow2:top", nodes)
    assert [record.getMessage() for record in caplog.records] == [
        f"qcow2:top builds on {image}, which is not locked: the image cannot be locked",
        f"qcow2:top builds on {tmp_path / 'gone'}, which is not locked: No such file or directory",
    ]
    backing.close()
    assert descriptors_of(tmp_path) == []


async def test_locking_that_is_cancelled_is_let_go_of_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that hangs keeps nobody waiting."""
    images = [tmp_path / "base.raw", tmp_path / "other.raw"]
    nodes = []
    for image in images:
        image.write_bytes(bytes(SIZE))
        nodes.append({"drv": "file", "ro": True, "file": str(image)})
    goes_on = threading.Event()
    monkeypatch.setattr(backing_module, "lock_image", lambda *_: goes_on.wait())
    backing = Backing()
    locking = asyncio.ensure_future(backing.lock("qcow2:top", nodes))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not descriptors_of(tmp_path):  # noqa: ASYNC110 - a thread opens it
                await asyncio.sleep(0)
        locking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await locking
        backing.close()
        # It is still being locked: another file must not get its number.
        assert descriptors_of(tmp_path) == [str(images[0])]
    finally:
        goes_on.set()
    async with asyncio.timeout(TIMEOUT_S):
        while descriptors_of(tmp_path):  # noqa: ASYNC110 - a thread closes it
            await asyncio.sleep(0)
        while any(thread.name.startswith("backing") for thread in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert descriptors_of(tmp_path) == []
