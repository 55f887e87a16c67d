"""A target that is a raw file or a block device: written by threads, durable by fdatasync.

A file is PATH.part until it is complete, sparse, and its owner's alone; what is not written reads
as zeroes. A block device has no other name, and holds whatever it held: zeroes are made there.

After a failed fdatasync nothing of what it was to cover counts as durable, and the pull ends: the
kernel may call those pages clean from then on. What is pulled next time is written again.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from fleecenbd.client.journal_file import sync_folder
from fleecenbd.client.options import PART_SUFFIX
from fleecenbd.storage.device import Buffer, Data
from fleecenbd.storage.errors import named_error
from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.pool import ThreadPool
from fleecenbd.storage.space import Space
from fleecenbd.storage.system_calls import image_size, read_all, write_all

REQUESTS = 8
"""Writes in flight, each in a thread."""
LOOK_LENGTH = 1 << 20
"""Bytes at either end of a device that are looked at: does it hold something?"""
NEW_MODE = 0o600
"""A guest's disk is not for everybody."""


class FileTarget:
    """endpoints.Target over an open descriptor. Made by ``open_file`` and ``open_block_device``."""

    requests = REQUESTS
    write_unit = 1

    def __init__(
        self,
        name: str,
        descriptor: int,
        *,
        part: str | None,
        is_zero: bool,
        force: bool,
    ) -> None:
        self.name = name
        self.is_zero = is_zero
        self._descriptor = descriptor
        self._part = part
        """Its name until it is complete; None: it has no other."""
        self._force = force
        self._space = Space(descriptor, part or name)
        self._pool = ThreadPool(name, "target", size_max=REQUESTS)

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data``."""
        await self._pool.run(write_all, self._descriptor, offset, data, self.name)

    async def zero(self, offset: int, length: int) -> None:
        """Punch a hole, or whatever else the device has for it."""
        await self._pool.run(self._space.zero, offset, length, True, False)

    async def pread(self, offset: int, length: int) -> Buffer:
        """From the device: what the page cache holds of the range, and is clean, is dropped."""
        return await self._pool.run(self._read_back, offset, length)

    def _read_back(self, offset: int, length: int) -> bytes:
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        return read_all(self._descriptor, offset, length, self.name)

    async def flush(self) -> None:
        """fdatasync."""
        await self._pool.run(self._sync)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise named_error(error, self.name) from None

    async def complete(self) -> None:
        """A file gets its name, durably."""
        await self._pool.run(self._complete)
        await self._close()

    def _complete(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise named_error(error, self.name) from None
        if self._part is not None:
            give_name(self._part, self.name, force=self._force)

    async def keep(self) -> None:
        """Close it."""
        await self._close()

    async def discard(self) -> None:
        """Close it; a file goes."""
        await self._close()
        if self._part is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._part)

    async def _close(self) -> None:
        self._pool.close(lambda: os.close(self._descriptor))
        await self._pool.wait_closed()


def check_file(path: str, *, force: bool, resume: bool) -> None:
    """Whether PATH.part may be made, or taken up, and become PATH. Raises OSError."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"its folder {folder} does not exist; make it", path)
    if not os.path.basename(path):
        raise IsADirectoryError(errno.EISDIR, "is a folder; name the file in it", path)
    _check_final(path, force=force)
    part = f"{path}{PART_SUFFIX}"
    try:
        mode = os.lstat(part).st_mode
    except FileNotFoundError:
        if resume:
            raise FileNotFoundError(
                errno.ENOENT, f"nothing can be resumed: {part} is gone", path
            ) from None
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, f"{part} is there and no file; remove it", path)
    if not resume and not force:
        raise other_part(part, path)


def other_part(part: str, path: str) -> OSError:
    """PATH.part is there, and nobody can tell what of it is durable."""
    return FileExistsError(
        errno.EEXIST,
        f"{part} is there, from another pull: keep it, remove it, or begin anew with --force",
        path,
    )


def _check_final(path: str, *, force: bool) -> None:
    """What has the target's name already."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path) and not force:
            raise FileExistsError(
                errno.EEXIST, "is a link that leads nowhere; --force replaces it", path
            ) from None
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder; name the file in it", path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is neither a file nor a block device", path)
    if not force:
        raise FileExistsError(errno.EEXIST, "is there already; --force replaces it", path)
    # The disk that is being backed up, perhaps: its server would go on writing to what has no name.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_unused(descriptor, path)
    finally:
        os.close(descriptor)


def _check_unused(descriptor: int, path: str) -> None:
    try:
        lock_image(descriptor, path, LockMode.EXCLUSIVE)
    except OSError as error:
        if error.errno == errno.EBUSY:
            text = f"{error.strerror}".partition(";")[0]
            raise OSError(errno.EBUSY, f"{text}; name another target", path) from None
        # A file system that can't lock can't tell.


def give_name(part: str, path: str, *, force: bool) -> None:
    """PATH.part is complete: let it be PATH, durably. Raises OSError."""
    if not force and os.path.lexists(path):
        raise FileExistsError(
            errno.EEXIST,
            "has come to be there meanwhile; move it away and resume, or resume with --force",
            path,
        )
    os.rename(part, path)
    sync_folder(path)


def make_part(path: str, *, force: bool) -> int:
    """Make PATH.part anew, empty; its descriptor."""
    part = f"{path}{PART_SUFFIX}"
    if force:
        with suppress(FileNotFoundError):
            os.unlink(part)
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, NEW_MODE)


def open_file(path: str, size: int, *, force: bool, resume: bool) -> FileTarget:
    """Make PATH.part, or open what an earlier pull left. Blocks. Raises OSError."""
    check_file(path, force=force, resume=resume)
    part = f"{path}{PART_SUFFIX}"
    if resume:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    else:
        descriptor = make_part(path, force=force)
    try:
        _check_unused(descriptor, path)
        if resume:
            _check_length(descriptor, part, size, path)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
        sync_folder(part)
    except BaseException as error:
        os.close(descriptor)
        if not resume:
            os.unlink(part)
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise OSError(
                errno.EFBIG,
                f"no file of {size} bytes can be had there (its file system, or ulimit -f)",
                path,
            ) from None
        raise
    return FileTarget(path, descriptor, part=part, is_zero=not resume, force=force)


def _check_length(descriptor: int, part: str, size: int, path: str) -> None:
    """A file has its whole length before anything in it is called durable."""
    found = os.fstat(descriptor).st_size
    if found != size:
        raise OSError(
            errno.EIO,
            f"nothing can be resumed: {part} has {found} bytes, and had {size}: it was changed "
            "since, and what was durable in it is not to be trusted; begin anew with --force",
            path,
        )


def open_block_device(path: str, size: int, *, force: bool, resume: bool) -> FileTarget:
    """Open a block device that nobody else uses. Blocks. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError(
                errno.EBUSY, "is in use: mounted, or another program's; name another target", path
            ) from None
        raise
    try:
        _check_unused(descriptor, path)
        found = image_size(descriptor)
        if found < size:
            raise too_small(path, found, size)
        if not (force or resume) and _holds_something(descriptor, found, path):
            raise holds_something(path)
    except BaseException:
        os.close(descriptor)
        raise
    return FileTarget(path, descriptor, part=None, is_zero=False, force=force)


def _holds_something(descriptor: int, size: int, path: str) -> bool:
    length = min(LOOK_LENGTH, size)
    return any(any(read_all(descriptor, at, length, path)) for at in (0, size - length))


def too_small(name: str, found: int, size: int) -> OSError:
    """A device that the disk does not fit into."""
    return OSError(
        errno.ENOSPC,
        f"has {found} bytes, and the disk has {size}: {size - found} are missing; take a larger "
        "one",
        name,
    )


def holds_something(name: str) -> OSError:
    """A device that is not empty."""
    return OSError(
        errno.EEXIST, "holds something already (it is not all zeroes); --force overwrites it", name
    )
