"""System calls that Python lacks or leaves half done: for a pool's threads, since they block.

They take a file descriptor. Those that take the image's name too raise OSError with that name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct

from fleecenbd.storage.device import Data
from fleecenbd.storage.errors import named_error, shrank_error

# From linux/falloc.h.
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# From linux/fs.h.
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_FICLONERANGE = 0x4020940D
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_LONG = struct.calcsize("L")

# From asm-generic/unistd.h: the same number on every machine.
_NR_CACHESTAT = 451

# From linux/stat.h and linux/fcntl.h; offsets into struct statx.
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_LENGTH, _STX_MASK, _STX_DIO_ALIGN = 256, 0, 0x98

ZEROES_LENGTH = 1 << 20
"""Bytes per write where zeroes are written out."""
_ZEROES = memoryview(bytes(ZEROES_LENGTH))

_libc = ctypes.CDLL(None, use_errno=True)
# The calls with 64 in their names take 64-bit offsets on 32-bit machines too.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int
_statx = getattr(_libc, "statx", None)  # glibc 2.28
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def overwrite_in_place(descriptor: int) -> None:
    """Ask a file system that writes elsewhere (btrfs) to write this file, which must be empty, in
    its place. Raises OSError where it does not."""
    (flags,) = struct.unpack("L", fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(_LONG)))
    fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, struct.pack("L", flags | _FS_NOCOW_FL))


def read_all(descriptor: int, offset: int, length: int, name: str) -> bytes:
    """Read exactly ``length`` bytes; EIO where the image ends before."""
    pieces: list[bytes] = []
    done = 0
    while True:
        try:
            data = os.pread(descriptor, length - done, offset + done)
        except OSError as error:
            raise named_error(error, name) from None
        if len(data) == length:
            return data
        pieces.append(data)
        done += len(data)
        if done == length:
            return b"".join(pieces)
        if not data:
            raise shrank_error(name, offset + done)


def write_all(descriptor: int, offset: int, data: Data, name: str) -> None:
    """Write all of ``data``, in as many calls as it takes."""
    rest = memoryview(data)
    while True:
        try:
            count = os.pwrite(descriptor, rest, offset)
        except OSError as error:
            raise named_error(error, name) from None
        if count == len(rest):
            return
        if count == 0:
            raise OSError(errno.EIO, f"nothing could be written at offset {offset}", name)
        rest = rest[count:]
        offset += count


def write_zeroes(descriptor: int, offset: int, length: int, name: str) -> None:
    """Write zeroes out, in pieces of at most ``ZEROES_LENGTH`` bytes."""
    end = offset + length
    while offset < end:
        piece = _ZEROES[: min(ZEROES_LENGTH, end - offset)]
        write_all(descriptor, offset, piece, name)
        offset += len(piece)


def fallocate(descriptor: int, mode: int, offset: int, length: int, name: str) -> None:
    """fallocate(2); mode is of FALLOC_FL_*."""
    while _fallocate(descriptor, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error), name)


def discard(descriptor: int, offset: int, length: int, name: str) -> None:
    """ioctl(BLKDISCARD): the block device may forget the range."""
    try:
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("QQ", offset, length))
    except OSError as error:
        raise named_error(error, name) from None


def clone_range(descriptor: int, source: int, offset: int, length: int, name: str) -> None:
    """ioctl(FICLONERANGE): the range shares the blocks of the same range of ``source``."""
    try:
        fcntl.ioctl(descriptor, _FICLONERANGE, struct.pack("qQQQ", source, offset, length, offset))
    except OSError as error:
        raise named_error(error, name) from None


def dirty_pages(descriptor: int, offset: int, length: int, name: str) -> int:
    """cachestat(2), Linux 6.5: pages of the range that are dirty, or being written. Doesn't block.

    ENOSYS from an older kernel, EPERM from some sandboxes.
    """
    wanted = struct.pack("QQ", offset, length)
    told = ctypes.create_string_buffer(40)
    if _syscall(ctypes.c_long(_NR_CACHESTAT), ctypes.c_int(descriptor), wanted, told, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    _cached, dirty, writing, _evicted, _recently = struct.unpack("5Q", told)
    return int(dirty + writing)


def image_size(descriptor: int) -> int:
    """Bytes in a regular file or a block device."""
    return os.lseek(descriptor, 0, os.SEEK_END)


def block_size(descriptor: int) -> int:
    """Bytes that a zeroing or a discard must be aligned to: 1 for a regular file."""
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return 1
    (size,) = struct.unpack("i", fcntl.ioctl(descriptor, _BLKSSZGET, bytes(4)))
    return int(size)


def direct_alignment(descriptor: int) -> int:
    """Bytes, a power of two, that direct I/O is aligned to: offsets, lengths and addresses.

    0: there is no direct I/O. As statx(2) tells it (STATX_DIOALIGN, Linux 6.1); where it does not,
    a logical block of a block device, and 4096 for a file.
    """
    if _statx is not None:
        told = ctypes.create_string_buffer(_STATX_LENGTH)
        done = _statx(descriptor, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), told)
        (mask,) = struct.unpack_from("I", told, _STX_MASK)
        if done == 0 and mask & _STATX_DIOALIGN:
            memory, offset = struct.unpack_from("II", told, _STX_DIO_ALIGN)
            return max(memory, offset, block_size(descriptor)) if offset else 0
    block = block_size(descriptor)
    return block if block > 1 else 4096
