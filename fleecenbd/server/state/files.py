"""The files of a state directory: which of them the description names, and when others go.

A file goes when whoever used it has let go of it, *and* the description on disk does not name it:
whichever comes later. So a kill never leaves a description whose files are gone. Names are used
once: what ends late meets nobody else's file.

Descriptions are written one after the other, by one thread. A file is taken for named from the
moment when a description that names it is on its way.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.storage.pool import ThreadPool

if TYPE_CHECKING:
    from fleecenbd.server.state.description import Description

logger = logging.getLogger(__name__)

COMMIT_DEADLINE_S = 5.0
"""Seconds that the description may take to be replaced: guests are held meanwhile."""


class Files:
    """Writes descriptions, and removes what neither they nor anybody else needs."""

    def __init__(self, directory: StateDirectory, named: set[str]) -> None:
        """``named``: the files in the description on disk."""
        self.directory = directory
        # One thread: what is written first is on disk first.
        self.writer = ThreadPool(str(directory.path), "state", size_max=1)
        self._lock = threading.Lock()
        # Under the lock, names of files:
        self._written = named  # in the description on disk
        self._on_their_way: list[set[str]] = []
        self._released: set[str] = set()  # used by nobody any more

    async def write(
        self, description: Description, *, durable: bool = False, deadline_s: float | None = None
    ) -> str:
        """Replace the description; its SHA-256. Raises OSError; ETIMEDOUT after the deadline."""
        with self._lock:
            self._on_their_way.append(description.files())
        writing = self.writer.run(partial(self._replace, description, durable=durable))
        writing.add_done_callback(_look_at)
        try:
            # What is late goes on: the next description is written after it.
            return await asyncio.wait_for(asyncio.shield(writing), deadline_s)
        except TimeoutError:
            raise OSError(
                errno.ETIMEDOUT,
                f"the description was not written within {deadline_s:g} s; check the disk, or "
                "give another folder with --state-dir",
                str(self.directory.path),
            ) from None

    def _replace(self, description: Description, *, durable: bool) -> str:
        """Run by the writer's thread."""
        names = description.files()
        try:
            digest = self.directory.write(description, durable=durable)
        except BaseException:
            with self._lock:
                # The old one is there still, or the new one is: both count.
                self._on_their_way.remove(names)
                self._written |= names
            raise
        with self._lock:
            self._on_their_way.remove(names)
            self._written = names
            gone = self._released - self._named()
            self._released -= gone
        self.unlink(gone)
        return digest

    def _named(self) -> set[str]:
        return self._written.union(*self._on_their_way)

    def release(self, path: str) -> None:
        """Nobody uses the file any more. Run by any thread."""
        name = path.rpartition("/")[2]
        with self._lock:
            if name in self._named():
                self._released.add(name)
                return
        self.unlink([name])

    def unlink(self, names: Iterable[str]) -> None:
        """Remove files; what stays is told, and swept at the next start."""
        for name in names:
            path = self.directory.files / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s stays until the next start: %s", path, error.strerror)


def _look_at(writing: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more: then its failure is known already, or told later."""
    if not writing.cancelled():
        writing.exception()
