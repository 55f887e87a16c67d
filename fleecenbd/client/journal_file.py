"""The journal's file: locked while a pull is at work, appended to and replaced durably."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fleecenbd.storage.pool import ThreadPool

Result = TypeVar("Result")

NEW_SUFFIX = ".new"
LOCK_TRIES = 10
"""How often a file that is replaced just while it is being locked is opened again."""


class DurableFile:
    """journal.JournalFile on a file system. Calls that block run in a thread of its own."""

    def __init__(self, path: str, descriptor: int, content: bytes) -> None:
        self.name = path
        self.content = content
        """What was there when it was opened."""
        self._descriptor = descriptor
        self._length = len(content)
        self._pool = ThreadPool(path, "journal", size_max=1)

    @classmethod
    def open(cls, path: str) -> DurableFile:
        """Open it, or make it, and lock it. Raises OSError: EBUSY where a pull is at work."""
        for _ in range(LOCK_TRIES):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _lock(descriptor, path)
                if _is_there(path, descriptor):
                    content = _read(descriptor)
                    return cls(path, descriptor, content)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # replaced or removed meanwhile: it was the lock of another file
        raise OSError(errno.EBUSY, "another pull is at work on this target", path)

    async def append(self, data: bytes) -> None:
        """Return when ``data`` is durable at the end."""
        await self._run(lambda: self._append(data))

    def _append(self, data: bytes) -> None:
        try:
            _write(self._descriptor, data, self._length)
            os.fdatasync(self._descriptor)
        except OSError:
            # Half a line would make the next one part of a spoilt one.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._length)
            raise
        self._length += len(data)

    async def replace(self, data: bytes) -> None:
        """Return when the content is ``data``, durably."""
        await self._run(lambda: self._replace(data))

    def _replace(self, data: bytes) -> None:
        path = f"{self.name}{NEW_SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            _lock(descriptor, self.name)
            _write(descriptor, data, 0)
            os.fsync(descriptor)
            os.rename(path, self.name)
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(path)
            raise
        before, self._descriptor, self._length = self._descriptor, descriptor, len(data)
        os.close(before)
        sync_folder(self.name)

    async def remove(self) -> None:
        """Close it, and let it be gone, durably."""
        await self._run(self._remove)
        await self.close()

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.name)
        sync_folder(self.name)

    async def close(self) -> None:
        """Close it; it stays."""
        self._pool.close(lambda: os.close(self._descriptor))
        await self._pool.wait_closed()

    async def _run(self, call: Callable[[], Result]) -> Result:
        try:
            return await self._pool.run(call)
        except OSError as error:
            if error.filename is None:
                error.filename = self.name
            raise


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another pull is at work on this target", path) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise  # else: a file system that has no locks


def _is_there(path: str, descriptor: int) -> bool:
    """Is the file of this name still the one that was opened?"""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _read(descriptor: int) -> bytes:
    parts = []
    offset = 0
    while part := os.pread(descriptor, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def sync_folder(path: str) -> None:
    """Make a name durable, or its end."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # else: a file system whose folders cannot be synced
    finally:
        os.close(folder)


def default_path(target: str, folder: Path) -> str:
    """The journal of a target that is no file, in a folder of ours: the name says which it is to
    a person, and its end to nobody but us."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", target).strip("-.")[-40:]
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    return str(folder / f"{stem}-{digest}.journal")
