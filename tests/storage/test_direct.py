"""DirectDevice: whole blocks only below, any request above, and no page cache between."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from fleecenbd.storage import system_calls
from fleecenbd.storage.buffers import BOUNCE_LENGTH
from fleecenbd.storage.claims import Claims
from fleecenbd.storage.direct import DirectDevice
from tests.descriptors import no_new_descriptor
from tests.mounts import CAN_MOUNT, mounted
from tests.storage.kinds import HAS_LOOP_DEVICES, loop_device

WAIT_S = 10.0
SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


async def closed(device: DirectDevice) -> None:
    device.close()
    await device.wait_closed()


async def test_nothing_is_done_now(image: Path) -> None:
    device = DirectDevice.open(image)
    assert device.pread_now(0, 4096) is None
    assert not device.pread_into_now(0, memoryview(bytearray(4096)))
    assert not device.pwrite_now(0, bytes(4096))
    await closed(device)


async def test_what_is_written_leaves_nothing_in_the_page_cache(image: Path) -> None:
    device = DirectDevice.open(image)
    await device.flush()
    await device.pwrite(4096, os.urandom(65536))
    await device.pwrite(1, b"in part")
    assert device.dirty_pages(0, SIZE) == 0
    await closed(device)


@pytest.mark.parametrize("length", [1, BOUNCE_LENGTH - 1, 3 * BOUNCE_LENGTH + 7])
async def test_a_request_longer_than_a_buffer_is_whole(tmp_path: Path, length: int) -> None:
    path = tmp_path / "vda.raw"
    before = os.urandom(4 * BOUNCE_LENGTH)
    path.write_bytes(before)
    device = DirectDevice.open(path)
    data = os.urandom(length)
    for offset in (0, 511, 4096, 4 * BOUNCE_LENGTH - length):
        await device.pwrite(offset, data)
        assert await device.pread(offset, length) == data
        around = await device.pread(0, 4 * BOUNCE_LENGTH)
        assert around == before[:offset] + data + before[offset + length :]
        await device.pwrite(0, before)
    await closed(device)


async def _follow(device: DirectDevice, size: int) -> bytes:
    """Requests of any kind at any place; what the image must hold after them."""
    dice = random.Random(size)
    model = bytearray(await device.pread(0, size))
    for _ in range(60):
        offset = dice.randrange(size)
        length = min(size - offset, dice.choice([1, 100, 512, 4096, 9000, size]))
        data = dice.randbytes(length)
        if dice.random() < 0.6:
            await device.pwrite(offset, data)
        else:
            data = bytes(length)
            await device.zero(offset, length, may_trim=dice.random() < 0.5)
        model[offset : offset + length] = data
        assert await device.pread(offset, length) == data
    assert await device.pread(0, size) == model
    return bytes(model)


@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4097, 8704, 65537, 70_000])
async def test_an_odd_size_is_kept_and_served_to_its_last_byte(
    tmp_path: Path, size: int, alignment: int
) -> None:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(size))
    device = DirectDevice(os.open(path, os.O_RDWR | os.O_DIRECT), str(path), alignment=alignment)
    model = await _follow(device, size)
    assert path.stat().st_size == size
    await device.flush()
    await closed(device)
    assert path.read_bytes() == model


@pytest.mark.skipif(not CAN_MOUNT, reason="needs root and loop devices")
@pytest.mark.parametrize("size", [4096, 12_800, 70_001])
async def test_an_odd_size_on_a_disk_of_large_sectors(tmp_path: Path, size: int) -> None:
    with mounted("ext4", tmp_path, sector_size=4096) as folder:
        path = folder / "vda.raw"
        path.write_bytes(os.urandom(size))
        device = DirectDevice.open(path)
        assert device.alignment == 4096
        model = await _follow(device, size)
        await device.flush()
        await closed(device)
        assert path.read_bytes() == model


@pytest.mark.skipif(not HAS_LOOP_DEVICES, reason="needs root and loop devices")
@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_a_block_device_s_alignment_is_its_logical_block(
    image: Path, sector_size: int
) -> None:
    with loop_device(image, sector_size) as path:
        device = DirectDevice.open(path)
        assert device.alignment == sector_size
        await _follow(device, SIZE)
        await closed(device)


def test_where_statx_tells_nothing_a_file_has_blocks_of_4096(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_calls, "_statx", None)
    with image.open("rb") as file:
        assert system_calls.direct_alignment(file.fileno()) == 4096


# Parts of blocks


class Stopped:
    """The first read of a block that is to be changed waits until it is let go."""

    def __init__(self, device: DirectDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading = threading.Event()
        self.go = threading.Event()
        self.waiting = threading.Event()
        read, must_wait = device._read_block, Claims._must_wait

        def slow(offset: int, buffer: memoryview) -> None:
            read(offset, buffer)
            if not self.reading.is_set():
                self.reading.set()
                assert self.go.wait(WAIT_S)

        def told(claims: Claims, claim: object) -> bool:
            waits = must_wait(claims, claim)  # type: ignore[arg-type]
            if waits:
                self.waiting.set()
            return waits

        monkeypatch.setattr(device, "_read_block", slow)
        monkeypatch.setattr(Claims, "_must_wait", told)


@pytest.mark.parametrize("change", ["part", "whole", "zero", "trim"])
async def test_a_block_written_in_part_loses_nobody_else_s_change(
    image: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    device = DirectDevice(os.open(image, os.O_RDWR | os.O_DIRECT), str(image), alignment=4096)
    await device.pwrite(0, b"\xff" * 65536)
    stopped = Stopped(device, monkeypatch)
    loop = asyncio.get_running_loop()
    part = asyncio.create_task(device.pwrite(10, b"a" * 10))
    assert await loop.run_in_executor(None, stopped.reading.wait, WAIT_S)
    other = asyncio.create_task(
        {
            "part": lambda: device.pwrite(100, b"b" * 50),
            "whole": lambda: device.pwrite(0, b"b" * 8192),
            "zero": lambda: device.zero(0, 8192),
            "trim": lambda: device.trim(0, 8192),
        }[change]()
    )
    assert await loop.run_in_executor(None, stopped.waiting.wait, WAIT_S)
    stopped.go.set()
    await asyncio.gather(part, other)
    expected = bytearray(b"\xff" * 65536)
    expected[10:20] = b"a" * 10
    if change == "part":
        expected[100:150] = b"b" * 50
    else:
        expected[:8192] = (b"b" if change == "whole" else b"\0") * 8192
    assert await device.pread(0, 65536) == expected
    await closed(device)


async def test_many_small_writes_to_few_blocks_all_arrive(image: Path) -> None:
    device = DirectDevice.open(image)
    expected = b"".join(bytes([index % 251]) * 60 for index in range(200))
    await asyncio.gather(
        *(device.pwrite(index * 60, expected[index * 60 : index * 60 + 60]) for index in range(200))
    )
    assert await device.pread(0, len(expected)) == expected
    await closed(device)


# What is refused, and the end


def test_tmpfs_is_refused_by_what_it_is() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image:
        image.truncate(SIZE)
        with pytest.raises(OSError, match="takes no direct I/O") as refused:
            DirectDevice.open(image.name)
        assert (refused.value.errno, refused.value.filename) == (errno.ENOTSUP, image.name)


def test_a_file_system_that_refuses_the_flag_is_told_by_its_image(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="takes no direct I/O"):
        DirectDevice.open(image)


def test_an_image_that_is_refused_leaves_no_descriptor(image: Path) -> None:
    with (
        no_new_descriptor(),
        tempfile.NamedTemporaryFile(dir="/dev/shm") as other,
        pytest.raises(OSError, match="takes no direct I/O"),
    ):
        DirectDevice.open(other.name)


async def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(513))
    with no_new_descriptor():
        device = DirectDevice.open(path)
        await device.pwrite(512, b"x")
        await closed(device)


async def test_a_read_behind_the_end_of_an_image_that_shrank_is_an_error(image: Path) -> None:
    device = DirectDevice.open(image)
    os.truncate(image, 4096)
    for offset in (4096, SIZE - 10):
        with pytest.raises(OSError, match="the image shrank") as refused:
            await device.pread(offset, 10)
        assert refused.value.errno == errno.EIO
    await closed(device)


async def test_nobody_writes_what_was_opened_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(513))
    device = DirectDevice.open(path, read_only=True)
    for call in (device.pwrite(0, b"x"), device.zero(0, 1), device.trim(0, 1)):
        with pytest.raises(OSError, match="read-only"):
            await call
    assert await device.pread(512, 1) == b"\0"
    await closed(device)


@pytest.mark.skipif(not HAS_LOOP_DEVICES, reason="needs root and loop devices")
async def test_a_block_device_s_node_may_be_on_a_tmpfs(tmp_path: Path) -> None:
    """As in a container, whose /dev is one."""
    content = os.urandom(SIZE)
    image = tmp_path / "vda.raw"
    image.write_bytes(content)
    with loop_device(image) as path:
        node = Path("/dev/shm") / f"fleecenbd-test-{os.getpid()}"
        os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(path).st_rdev)
        try:
            device = DirectDevice.open(node)
            assert await device.pread(0, SIZE) == content
            await closed(device)
        finally:
            node.unlink()
