"""The files of a state directory: which of them the description names, and when others go.

A file goes when whoever used it has let go of it, *and* the description on disk does not name it:
whichever comes later. So a kill never leaves a description whose files are gone. Names are used
once: what ends late meets nobody else's file.

Descriptions are written one after the other, by one thread. A file is taken for named from the
moment when a description that names it is on its way.

To remove a large temp image takes seconds. So it is done by a thread of its own: not by the loop's,
which serves guests, nor by the one that writes descriptions, for which guests are held.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

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
        self._remover = ThreadPool(str(directory.path), "removing", size_max=1)
        self.folders: dict[str, str] = {}
        """Of those that are elsewhere, by name."""
        self._elsewhere: dict[str, ThreadPool] = {}
        """Folders of temp images elsewhere, which may hang: nothing else waits for them."""
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
        writing.add_done_callback(self._written_down)
        try:
            # What is late goes on: the next description is written after it.
            digest, _ = await asyncio.wait_for(asyncio.shield(writing), deadline_s)
            return digest
        except TimeoutError:
            raise OSError(
                errno.ETIMEDOUT,
                f"the description was not written within {deadline_s:g} s; check the disk, or "
                "give another folder with --state-dir",
                str(self.directory.path),
            ) from None

    def _written_down(self, writing: asyncio.Future[tuple[str, set[str]]]) -> None:
        """Nobody may wait for it any more: then its failure is known already, or told later."""
        if not writing.cancelled() and writing.exception() is None:
            self.remove(writing.result()[1])

    def _replace(self, description: Description, *, durable: bool) -> tuple[str, set[str]]:
        """Run by the writer's thread. The SHA-256, and the files that nobody needs any more."""
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
        return digest, gone

    def _named(self) -> set[str]:
        return self._written.union(*self._on_their_way)

    def release(self, path: str) -> None:
        """Nobody uses the file any more. Run by any thread."""
        name = path.rpartition("/")[2]
        with self._lock:
            if name in self._named():
                self._released.add(name)
                return
        self.drop(name)

    def drop(self, name: str) -> None:
        """Remove a file, whoever names it. Run by any thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.unlink([name])  # a thread of a pool, which may wait
        else:
            self.remove([name])

    def remove(self, names: Collection[str]) -> None:
        """Remove files, in a thread; on the loop's. Once closed, the next start sweeps them."""
        own = []
        for name in names:
            directory = self.folders.pop(name, None)
            if directory is None:
                own.append(name)
            else:
                with suppress(OSError):
                    self.pool_of(directory).run(self.unlink, [name])
        if own:
            with suppress(OSError):
                self._remover.run(self.unlink, own)

    def pool_of(self, directory: str) -> ThreadPool:
        """The threads for what is made and removed there."""
        pool = self._elsewhere.get(directory)
        if pool is None:
            pool = self._elsewhere[directory] = ThreadPool(directory, "elsewhere", size_max=2)
        return pool

    async def removed(self) -> None:
        """Return when all that was to be removed here until now is."""
        await self._remover.run(int)

    def close(self) -> None:
        """Write nothing any more, and let go of the directory when everything has ended."""
        for pool in self._elsewhere.values():
            pool.close()
        self.writer.close(partial(self._remover.close, self.directory.close))

    async def wait_closed(self) -> None:
        """Return when others can have the directory."""
        await self.writer.wait_closed()
        await self._remover.wait_closed()

    def unlink(self, names: Iterable[str]) -> None:
        """Remove files; what stays is told, and swept at the next start. Blocks."""
        for name in names:
            try:
                self.directory.unlink(name)
            except OSError as error:
                logger.warning("%s stays until the next start: %s", error.filename, error.strerror)
