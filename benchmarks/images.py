"""Images to serve, and what of them is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

NOISE_LENGTH = 8 << 20
RESIDENT_MAX = 0.02
"""The part of an image that may be left in the page cache for a run to be called cold."""


def make_image(path: Path, size: int) -> None:
    """A raw image of random data, so that nothing can be saved on zeroes."""
    noise = os.urandom(NOISE_LENGTH)
    with path.open("wb") as image:
        for index in range(0, size, NOISE_LENGTH):
            # Each block differs, and none is cheap to make: the noise, turned by its number.
            turn = (index // NOISE_LENGTH) % NOISE_LENGTH
            image.write((noise[turn:] + noise[:turn])[: size - index])
        image.flush()
        os.fsync(image.fileno())


def make_sparse(path: Path, size: int) -> None:
    """An image that is one hole. Raises OSError where the file system has no such large files."""
    with path.open("wb") as image:
        image.truncate(size)


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as in /proc/self/mounts."""
    path = path.resolve()
    found = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, kind = line.split(" ")[1:3]
        # The last mount of the longest path wins: it covers those before it.
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def warm(path: Path) -> None:
    """Read the whole image into the page cache."""
    with path.open("rb", buffering=0) as image:
        buffer = bytearray(4 << 20)
        while image.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """Write the image back and take it out of the page cache.

    Raises RuntimeError where it stays: such a run would be called cold and be none. (tmpfs is
    nothing but page cache.)
    """
    with path.open("rb+") as image:
        os.fsync(image.fileno())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    part = resident(path)
    if part > RESIDENT_MAX:
        raise RuntimeError(f"{path}: {part:.0%} of it stays in the page cache; use a disk's folder")


def resident(path: Path) -> float:
    """The part (0 to 1) of the file that is in the page cache: mincore(2)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return 0.0
        pages = -(-size // mmap.PAGESIZE)
        present = ctypes.create_string_buffer(pages)
        # Private and writable, because ctypes asks for a buffer that can be written.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=protection) as mapped:
            view = ctypes.c_char.from_buffer(mapped)
            libc = ctypes.CDLL(None, use_errno=True)
            address, length = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size)
            failed = libc.mincore(address, length, present)
            error = ctypes.get_errno()
            del view  # a map whose buffer is in use can't be closed
        if failed:
            raise OSError(error, f"mincore: {os.strerror(error)}", str(path))
    return sum(byte & 1 for byte in present.raw) / pages
