"""File systems of their own for tests, on loop devices; and where the blocks of a file are."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.storage.kinds import HAS_LOOP_DEVICES, loop_device

SIZE = 512 << 20
"""Bytes: mkfs.xfs makes none that is much smaller."""

BUSY_S = 20.0

CAN_MOUNT = HAS_LOOP_DEVICES
"""As with block devices: root where there are loop devices, and always where root runs CI."""

FORMATS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "xfs without reflink": ["mkfs.xfs", "-q", "-m", "reflink=0"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
}
_PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"


def _run(*command: str | Path) -> str:
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C"}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


@contextmanager
def mounted(
    kind: str, directory: Path, name: str = "mounted", *, sector_size: int = 512
) -> Iterator[Path]:
    """A new, empty file system, mounted at a folder; ``sector_size`` of the disk below."""
    image, folder = directory / f"{name}.img", directory / name
    with image.open("wb") as file:
        file.truncate(SIZE)
    folder.mkdir()
    with loop_device(image, sector_size) as device:
        _run(*FORMATS[kind], device)
        _run("mount", device, folder)
        try:
            yield folder
        finally:
            unmount(folder)


def unmount(folder: Path) -> None:
    """Unmount a file system; what is about to let go of it is waited for.

    A loop device that was detached keeps its file, and that file's file system, while somebody
    (udev, a mount namespace just made) still has the device open. Nothing tells when that is over.
    """
    end = time.monotonic() + BUSY_S
    while True:
        try:
            _run("umount", folder)
            return
        except subprocess.CalledProcessError as error:
            if "busy" not in error.stderr or time.monotonic() > end:
                raise AssertionError(error.stderr) from None
        time.sleep(0.05)


def blocks(path: Path | str) -> dict[int, int]:
    """The place on the device of each block of a file that has one, both counted in blocks."""
    found: dict[int, int] = {}
    for line in _run("filefrag", "-e", "-s", path).splitlines():
        cells = line.replace("..", ":").split(":")
        if len(cells) >= 6 and cells[0].strip().isdigit():
            first, last, place = (int(cell) for cell in cells[1:4])
            found.update((first + index, place + index) for index in range(last - first + 1))
    return found


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory, of so many bytes, mounted at a folder that is made."""
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "fleecenbd-test", folder)
    try:
        yield folder
    finally:
        unmount(folder)


def fill(folder: Path) -> Path:
    """A file that takes all space that is left; its path."""
    path = folder / "filler"
    piece = bytes(1 << 16)
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(piece)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return path
