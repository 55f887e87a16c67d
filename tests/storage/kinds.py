"""Every kind of device, for the suites that hold for all of them.

Block devices are loop devices, which only root can make. They are in the list where the tests
run as root on a machine that has them, and always where root runs them in CI (``CI`` in the
environment): a CI machine that can't make them fails. Without root, the code paths of block
devices are tried in test_space.py only, with the kernel's answers faked.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleecenbd.storage.device import Device
from fleecenbd.storage.direct import DirectDevice
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.filesystem import Medium
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.qemu import open_qcow2
from fleecenbd.storage.remote import ALLOCATION, open_remote
from fleecenbd.storage.temp import TempImage
from fleecenbd.storage.temp_qcow2 import make_temp_qcow2
from fleecenbd.storage.temp_remote import TempExport

SIZE = (1 << 20) + 512
"""Bytes: a whole number of sectors, but of nothing larger."""

Open = Callable[[], Device | Coroutine[Any, Any, Device]]
"""Opens the device. A file or block device has the same content each time, a temp image none."""


async def opened(opener: Open) -> Device:
    """The device, however it is opened."""
    device = opener()
    return await device if isinstance(device, Coroutine) else device


@contextmanager
def memory(directory: Path) -> Iterator[Open]:
    yield lambda: MemoryDevice(SIZE)


@contextmanager
def memory_later(directory: Path) -> Iterator[Open]:
    yield lambda: MemoryDevice(SIZE, now=False)


def _image(directory: Path) -> Path:
    path = directory / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@contextmanager
def file(directory: Path) -> Iterator[Open]:
    path = _image(directory)
    yield lambda: FileDevice.open(path)


@contextmanager
def file_in_pool(directory: Path) -> Iterator[Open]:
    path = _image(directory)
    yield lambda: FileDevice(os.open(path, os.O_RDWR), str(path), medium=Medium.SLOW)


@contextmanager
def direct(directory: Path) -> Iterator[Open]:
    path = _image(directory)
    yield lambda: DirectDevice.open(path)


@contextmanager
def direct_in_pages(directory: Path) -> Iterator[Open]:
    """In blocks of 4096 bytes, of which the image holds no whole number."""
    path = _image(directory)
    yield lambda: DirectDevice(
        os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC), str(path), alignment=4096
    )


@contextmanager
def file_in_memory(directory: Path) -> Iterator[Open]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        path = _image(Path(shm))
        yield lambda: FileDevice.open(path)


@contextmanager
def temp(directory: Path) -> Iterator[Open]:
    yield lambda: TempImage.create(directory, "temp", SIZE)


@contextmanager
def temp_in_memory(directory: Path) -> Iterator[Open]:
    yield lambda: TempImage.create("/dev/shm", "temp", SIZE)


@contextmanager
def loop_device(path: Path, sector_size: int = 512) -> Iterator[str]:
    """A block device over a file, by its path. Of whole sectors: what is left of the file is not
    there."""
    command = ["/sbin/losetup", "--find", "--show", "--sector-size", str(sector_size), path]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["/sbin/losetup", "--detach", device], check=True)


@contextmanager
def block(directory: Path) -> Iterator[Open]:
    with loop_device(_image(directory)) as path:
        yield lambda: FileDevice.open(path)


@contextmanager
def direct_block(directory: Path) -> Iterator[Open]:
    with loop_device(_image(directory)) as path:
        yield lambda: DirectDevice.open(path)


@contextmanager
def large_sectors(directory: Path) -> Iterator[Open]:
    with _in_large_sectors(directory) as path:
        yield lambda: FileDevice(os.open(path, os.O_RDWR | os.O_CLOEXEC), path, size=SIZE)


@contextmanager
def direct_large_sectors(directory: Path) -> Iterator[Open]:
    flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
    with _in_large_sectors(directory) as path:
        yield lambda: DirectDevice(os.open(path, flags), path, size=SIZE)


@contextmanager
def _in_large_sectors(directory: Path) -> Iterator[str]:
    """A block device of 4096-byte sectors, a little longer than the suite's disk."""
    path = _image(directory)
    os.truncate(path, -(-SIZE // 4096) * 4096)
    with loop_device(path, 4096) as device:
        yield device


@contextmanager
def remote(directory: Path) -> Iterator[Open]:
    """Behind nbdkit, which takes whole blocks of 512 bytes only."""
    path = _image(directory)
    with nbdkit(directory, "--filter=blocksize-policy", "file", path, *BLOCKS) as uri:
        yield lambda: open_remote(uri)


BLOCKS = ("blocksize-minimum=512", "blocksize-error-policy=error")


@contextmanager
def nbdkit(directory: Path, *words: str | Path) -> Iterator[str]:
    """An nbdkit; its URI."""
    path = directory / "nbdkit.sock"
    pid = directory / "nbdkit.pid"
    process = subprocess.Popen(["nbdkit", "-f", "-U", path, "-P", pid, *words])
    try:
        while not pid.exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.kill()
        process.wait()
        pid.unlink(missing_ok=True)


@contextmanager
def qcow2(directory: Path) -> Iterator[Open]:
    path = directory / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    yield lambda: open_qcow2(str(path))


@contextmanager
def temp_preallocated(directory: Path) -> Iterator[Open]:
    yield lambda: TempImage.create(directory, "temp", SIZE, preallocate=True)


@contextmanager
def temp_qcow2(directory: Path) -> Iterator[Open]:
    """Over a disk that is read only by who opens the chain."""

    def make() -> Coroutine[Any, Any, Device]:
        path = directory / "temp.qcow2"
        path.write_bytes(b"")
        backing = (str(_image(directory)), "raw")
        return make_temp_qcow2(str(path), SIZE, cluster_size=512, backing=backing)

    yield make


@contextmanager
def temp_export(directory: Path) -> Iterator[Open]:
    """Behind nbdkit, which takes whole blocks of 512 bytes only."""
    path = directory / "temp.raw"
    with path.open("wb") as file:
        file.truncate(4 * SIZE)
    with nbdkit(directory, "--filter=blocksize-policy", "file", path, *BLOCKS) as uri:

        async def make() -> Device:
            client = await NbdClient.open(uri, contexts=(ALLOCATION,), retries=0)
            # Else its size is that of whole pages.
            return TempExport(client, uri, size=SIZE, hole_size=512)

        yield make


HAS_LOOP_DEVICES = os.geteuid() == 0 and (
    "CI" in os.environ or os.access("/dev/loop-control", os.W_OK)
)

KINDS = [
    *(memory, memory_later, file, file_in_pool, file_in_memory, direct, direct_in_pages),
    *(temp, temp_in_memory, temp_preallocated, temp_qcow2, temp_export),
    *(remote, qcow2),
]
if HAS_LOOP_DEVICES:
    KINDS += [block, direct_block, large_sectors, direct_large_sectors]
