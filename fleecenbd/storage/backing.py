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

from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.opening import open_image
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)

_LOCAL = ("file", "host_device")
"""QEMU's drivers of what has a path."""


class Backing:
    """Files that are read and must not change; locked as ``LockMode.SHARED`` until ``close``."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        self._closing = threading.Lock()
        self._is_closed = False

    async def lock(self, name: str, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Those of QMP's ``query-named-block-nodes`` that are only read; of an image that is only
        read itself, it too. ``name``: the image's.

        Raises OSError: EBUSY where somebody may write to one. One that cannot be locked is logged.
        """
        paths = sorted(
            {str(node["file"]) for node in nodes if node["drv"] in _LOCAL and node["ro"]}
        )
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
        except BaseException:
            os.close(descriptor)
            raise
        with self._closing:
            if not self._is_closed:
                self._descriptors.append(descriptor)
                return
        os.close(descriptor)

    def close(self) -> None:
        """Others may write to them. What is being locked is let go of when that has ended."""
        with self._closing:
            self._is_closed = True
            while self._descriptors:
                os.close(self._descriptors.pop())
