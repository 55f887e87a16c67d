"""What a qcow2 image builds on, locked: whoever writes there changes the disk, and its past.

A qemu-storage-daemon locks what it writes. Of the files below it only says that it reads them: its
export lets others write to the disk, so that it does not mind who writes to them. We do.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.opening import open_image

logger = logging.getLogger(__name__)

_LOCAL = ("file", "host_device")
"""QEMU's drivers of what has a path."""


class Backing:
    """Files that are read and must not change; locked as ``LockMode.SHARED`` until ``close``."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    async def lock(self, name: str, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Those of QMP's ``query-named-block-nodes`` that are only read; of an image that is only
        read itself, it too. ``name``: the image's.

        Raises OSError: EBUSY where somebody may write to one. One that cannot be locked is logged.
        """
        paths = sorted(
            {str(node["file"]) for node in nodes if node["drv"] in _LOCAL and node["ro"]}
        )
        locking = asyncio.ensure_future(asyncio.to_thread(self._lock_all, name, paths))
        try:
            await asyncio.shield(locking)
        except asyncio.CancelledError:
            while not locking.done():  # for ``close``, however often it is cancelled
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({locking})
            raise

    def _lock_all(self, name: str, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                descriptor = open_image(path, read_only=True)
                self._descriptors.append(descriptor)
                lock_image(descriptor, path, LockMode.SHARED)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    use = str(error.strerror).removeprefix("the image ")
                    raise OSError(errno.EBUSY, f"it builds on {path}, which {use}", name) from None
                logger.warning(
                    "%s builds on %s, which is not locked: %s", name, path, error.strerror
                )

    def close(self) -> None:
        """Others may write to them."""
        while self._descriptors:
            os.close(self._descriptors.pop())
