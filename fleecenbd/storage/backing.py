"""What a qcow2 image builds on, locked: whoever writes there changes the disk, and its past.

A qemu-storage-daemon locks what it writes. Of the files below it only says that it reads them: its
export lets others write to the disk, so that it does not mind who writes to them. We do.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.opening import open_image
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)

_LOCAL = ("file", "host_device")
"""QEMU's drivers of what has a path."""


_all: WeakSet[Backing] = WeakSet()
_changing = threading.Lock()
"""Held while a Backing's files are changed, or looked at."""


def who_builds_on(path: str) -> str | None:
    """The name of an image of ours that builds on a file. Blocks."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    with _changing:
        for backing in _all:
            if (found.st_dev, found.st_ino) in backing.files.values():
                return backing.name
    return None


class Backing:
    """Files that are read and must not change; locked as ``LockMode.SHARED`` until ``close``."""

    def __init__(self) -> None:
        self.name = ""
        """Of the image that builds on them."""
        self.files: dict[int, tuple[int, int]] = {}
        """Descriptors, to device and inode."""
        self._is_closed = False
        with _changing:
            _all.add(self)

    async def lock(self, name: str, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Those of QMP's ``query-named-block-nodes`` that are only read; of an image that is only
        read itself, it too. ``name``: the image's.

        Raises OSError: EBUSY where somebody may write to one. One that cannot be locked is logged.
        """
        paths = sorted(
            {str(node["file"]) for node in nodes if node["drv"] in _LOCAL and node["ro"]}
        )
        self.name = name
        # Threads of its own: a hung file system keeps neither others nor the process's end waiting.
        pool = ThreadPool(name, "backing", size_max=1)
        locking = pool.run(self._lock_all, name, paths)
        pool.close()
        await locking

    def _lock_all(self, name: str, paths: Iterable[str]) -> None:
        for path in paths:
            if self._is_closed:
                return
            try:
                self._lock(path)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    use = str(error.strerror).removeprefix("the image ")
                    raise OSError(errno.EBUSY, f"it builds on {path}, which {use}", name) from None
                logger.warning(
                    "%s builds on %s, which is not locked: %s", name, path, error.strerror
                )

    def _lock(self, path: str) -> None:
        descriptor = open_image(path, read_only=True)
        try:
            lock_image(descriptor, path, LockMode.SHARED)
            found = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        with _changing:
            if not self._is_closed:
                self.files[descriptor] = found.st_dev, found.st_ino
                return
        os.close(descriptor)

    def close(self) -> None:
        """Others may write to them. What is being locked is let go of when that has ended."""
        with _changing:
            self._is_closed = True
            while self.files:
                os.close(self.files.popitem()[0])
