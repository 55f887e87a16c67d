"""Temp images of a server whose sessions end with it, with messages that say what to do."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.places import make_private_directory
from fleecenbd.engine.disk import Disk
from fleecenbd.server.temp_making import make_export, make_qcow2
from fleecenbd.server.temp_place import NBD, OWN_FILES, QCOW2, TempPlace
from fleecenbd.storage.device import Device
from fleecenbd.storage.pool import ThreadPool
from fleecenbd.storage.temp import TempImage
from fleecenbd.storage.unowned import OwnedFile, remove_unowned

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Seconds that a folder has to say whether it is there."""

QCOW2_PREFIX = "fleecenbd-"
QCOW2_SUFFIX = ".temp.qcow2"


class TempDirectory:
    """Where temp images are made, in a thread: the directory's disk may hang.

    The server's own directory is made with the first of them. Raw files have no name, and so are
    gone with the server; of qcow2 files those whose server is gone are removed when one is made.
    """

    def __init__(
        self,
        path: Path,
        session: str,
        place: TempPlace = OWN_FILES,
        disks: Callable[[], Iterable[Disk]] = tuple,
    ) -> None:
        """``path``: the server's own, where ``place`` names no other. ``disks``: all that are
        served."""
        self._disks = disks
        self.path = path if place.directory is None else Path(place.directory)
        self._is_own = place.directory is None
        self._session = session
        self._place = place
        self._pool = ThreadPool(str(path), "temp images", size_max=1)

    async def make(self, disk: Disk, cluster_size: int, session_id: str) -> Device:
        """An empty temp image for the disk (engine.session.MakeTemp). Raises OSError.

        An image that nobody waits for any more when it is made is closed.
        """
        if self._place.kind == NBD:
            return await make_export(self._place, self._session, disk, cluster_size, self._disks)
        if self._place.kind == QCOW2:
            return await self._make_qcow2(disk, cluster_size)
        making = self._pool.run(self.create, disk.name, disk.size, cluster_size)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_close_made)
            raise

    def create(self, name: str, size: int, cluster_size: int) -> Device:
        """A raw one, in this very thread. Raises OSError. Blocks."""
        image = f"{name}@{self._session}"
        try:
            self._make_own()
            return TempImage.create(
                self.path,
                image,
                size,
                cluster_size=cluster_size,
                preallocate=self._place.preallocated,
            )
        except OSError as error:
            raise self._with_way_out(error) from error

    def _make_own(self) -> None:
        if self._is_own:
            make_private_directory(self.path)

    def _with_way_out(self, error: OSError) -> OSError:
        """A system call on a descriptor knows no name, and no way out."""
        known = error.filename if error.filename is not None else str(self.path)
        option = "--temp-dir" if not self._is_own else "--temp-dir, or --state-dir"
        cause = f"{error.strerror}; give another folder for temp images with {option}"
        return OSError(error.errno, cause, known)

    async def _make_qcow2(self, disk: Disk, cluster_size: int) -> Device:
        making = self._pool.run(self._create_file, f"{disk.name}@{self._session}")
        try:
            file = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_remove_made)
            raise
        try:
            temp = await make_qcow2(file.path, disk, cluster_size)
        except BaseException:
            await asyncio.shield(self._remove(file))
            raise
        temp.on_closed = partial(self._remove, file)
        return temp

    def _create_file(self, image: str) -> OwnedFile:
        try:
            self._make_own()
            remove_unowned(os.fspath(self.path), QCOW2_PREFIX, QCOW2_SUFFIX)
            return OwnedFile(os.fspath(self.path), f"{QCOW2_PREFIX}{image}-", QCOW2_SUFFIX)
        except OSError as error:
            raise self._with_way_out(error) from error

    async def _remove(self, file: OwnedFile) -> None:
        with suppress(OSError):  # what stays is removed when the next one is made
            await self._pool.run(file.remove)


async def look_for(directory: str) -> None:
    """Say in the log where --temp-dir is not there: sessions would find that out at night.

    That is no reason not to serve guests: it may be mounted later.
    """
    if (why := await _why_not_there(directory)) is not None:
        logger.warning("--temp-dir %s: %s; no session can begin there", directory, why)


async def check_there(directory: str, session: str) -> None:
    """For --begin, before anything of the last server's is taken up: its session may have its temp
    image there, and would be lost for a folder that is mounted a moment later. Raises
    CommandError."""
    if (why := await _why_not_there(directory)) is not None:
        raise CommandError(
            f"cannot begin session {session}: --temp-dir {directory}: {why}; nothing was changed: "
            "start again when it is there, give another folder, or begin no session"
        )


async def _why_not_there(directory: str) -> str | None:
    pool = ThreadPool(directory, "folder for temp images", size_max=1)
    try:
        async with asyncio.timeout(LOOK_S):
            is_there = await pool.run(os.path.isdir, directory)
    except TimeoutError:
        return "it does not answer"
    finally:
        pool.close()
    return None if is_there else "there is no such folder"


def _close_made(making: asyncio.Future[Device]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _remove_made(making: asyncio.Future[OwnedFile]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().remove()
