"""FileStore: bitmaps and temp images in files of the state directory, and their description.

The engine's Store (engine/store.py), and what only a server with files has to do: go on with what
was there, note which sessions have ended, and save everything at an orderly stop. When a file goes
is told in files.py, with one exception made here: a broken fleece needs no temp image, and its
space is freed at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.session import Session
from fleecenbd.engine.store import FleeceBits, RecordingBits
from fleecenbd.server.state.bits import FileFleeceBits, FileRecordingBits
from fleecenbd.server.state.directory import StateDirectory, sync_folder
from fleecenbd.server.state.disks import DiskFiles, take_back
from fleecenbd.server.state.files import COMMIT_DEADLINE_S, Files
from fleecenbd.server.state.names import Extra, Names, Unserved
from fleecenbd.server.state.temps import Temps
from fleecenbd.server.state.trust import Image
from fleecenbd.storage.device import Losable
from fleecenbd.storage.mapped import MappedFile
from fleecenbd.storage.pool import ThreadPool

if TYPE_CHECKING:
    from fleecenbd.server.state.description import Description

logger = logging.getLogger(__name__)

STAMPS = "stamps-"
"""What the names of files with stamps begin with."""

Result = TypeVar("Result")


class FileStore:
    """Where everything of one server lives that lasts."""

    def __init__(
        self, directory: StateDirectory, boot: str, found: Description | None = None
    ) -> None:
        """``found``: the description that is there already."""
        self.directory = directory
        self.names = Names()
        self.unserved = Unserved()
        self._boot = boot
        self._disks: dict[str, DiskFiles] = {}
        self._sessions: dict[str, Session] = {}
        self._fleeces: dict[tuple[str, str], FileFleeceBits] = {}
        self._bitmaps: dict[str, FileRecordingBits] = {}
        self.extras: dict[str, Extra] = {}
        """What a session's keeper wants to know of it after a restart, by its name."""
        self._committing: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        """As ``_closing``, and nobody waits for it."""
        self._makers = ThreadPool(str(directory.path), "bitmaps", size_max=2)
        self._files = Files(directory, found.files() if found is not None else set())
        self.temps = Temps(
            directory, self.names, self._files, self._make, self._is_broken, self._served
        )

    # -- disks -----------------------------------------------------------------------------

    def add_disk(self, disk: Disk) -> None:
        """A disk is served from now on; nothing is in flight on it yet."""
        files = self._disks[disk.name] = DiskFiles(disk)
        disk.stamps = files.stamps
        self.unserved, unneeded = take_back(disk, self.unserved)
        if disk.bitmaps:
            for name in unneeded:
                self._files.release(name)
            self._start(self._commit_disks(disk.name), self._committing)

    def remove_disk(self, name: str) -> None:
        """It is served no more: its bitmaps go, and that is written down."""
        files = self._disks.pop(name)
        for bitmap in list(files.disk.bitmaps):
            files.disk.remove_bitmap(bitmap).close()
        files.stamps.detach()
        self.names.stamps.pop(name, None)
        if files.file is not None:
            files.file.close()
            self._files.release(files.file.path)
            self._start(self._commit_disks(name), self._committing)

    async def _commit_disks(self, name: str) -> None:
        try:
            await self.commit()
        except OSError as error:
            logger.error("whether disk %s is served could not be written down: %s", name, error)

    # -- engine.store.Store ----------------------------------------------------------------

    async def make_fleece_bits(
        self, session_id: str, disk: str, size: int, cluster_size: int, granularity: int | None
    ) -> FleeceBits:
        """Zeroes, allocated in full. Raises OSError."""
        await self._attach(disk)
        name = f"fleece-{random_uuid()}"
        length = Bitmap.bitmap_length(size, cluster_size)
        areas = {"access": length, "done": length}
        if granularity is not None:
            areas["own"] = Bitmap.bitmap_length(size, granularity)
        identity: dict[str, str | int] = {
            "kind": "fleece",
            "session": session_id,
            "disk": disk,
            "size": size,
            "cluster_size": cluster_size,
        }
        bits = await self._map(name, identity, areas)
        return self.adopt_fleece_bits(session_id, disk, bits, name)

    async def make_recording_bits(
        self, disk: str, bitmap_id: str, size: int, granularity: int
    ) -> RecordingBits:
        """Zeroes, allocated in full. Raises OSError."""
        await self._attach(disk)
        name = f"bitmap-{bitmap_id}"
        identity: dict[str, str | int] = {
            "kind": "bitmap",
            "id": bitmap_id,
            "disk": disk,
            "size": size,
            "granularity": granularity,
        }
        file = await self._map(name, identity, {"bits": Bitmap.bitmap_length(size, granularity)})
        return self.adopt_recording_bits(bitmap_id, file, name)

    async def commit(
        self, *, adding: Session | None = None, removing: Session | None = None
    ) -> None:
        """Replace the description. Raises OSError; ETIMEDOUT after ``COMMIT_DEADLINE_S``."""
        if removing is not None:
            self._sessions.pop(removing.id, None)
        if adding is not None:
            # Before it is written: a description that comes next may be there before the session's
            # recording bits are cleared. And if it is late, nobody adds it after its removal.
            self._sessions[adding.id] = adding
        try:
            await self._files.write(self._describe(), deadline_s=COMMIT_DEADLINE_S)
        except BaseException:
            if adding is not None:
                self._sessions.pop(adding.id, None)
            raise

    # -- what was there before -------------------------------------------------------------

    def adopt_fleece_bits(
        self, session_id: str, disk: str, file: MappedFile, name: str
    ) -> FileFleeceBits:
        """The bitmaps of that fleece are in this file."""
        key = session_id, disk
        self.names.bits[key] = name
        bits = self._fleeces[key] = FileFleeceBits(file, partial(self._fleece_closed, key))
        return bits

    def adopt_recording_bits(self, bitmap_id: str, file: MappedFile, name: str) -> RecordingBits:
        """The bits of that bitmap are in this file."""
        self.names.bitmaps[bitmap_id] = name
        bits = FileRecordingBits(file, partial(self._bitmap_closed, bitmap_id))
        self._bitmaps[bitmap_id] = bits
        return bits

    def adopt_session(self, session: Session) -> None:
        """It is in the description."""
        self._sessions[session.id] = session

    async def begin_run(self) -> None:
        """All that is to go on was adopted: from now on guests may write. Raises OSError.

        The clean mark goes, durably, before the first stamp; then a description of this run, where
        there was one before.
        """
        await self._files.writer.run(self.directory.unmark)
        keep: set[str] = set()
        if await self._files.writer.run(self.directory.has_description):
            for name, files in self._disks.items():
                if files.disk.bitmaps or files.disk.fleeces:
                    await self._attach(name)
            description = self._describe()
            await self._files.write(description, durable=True)
            keep = description.files()
        for name in await self._files.writer.run(self.directory.sweep, keep):
            # Each run has stamps of its own; anything else is a dead server's.
            level = logging.DEBUG if name.startswith(STAMPS) else logging.INFO
            logger.log(level, "%s was left over, and is removed", self.directory.files / name)

    # -- the end ---------------------------------------------------------------------------

    def before_end(self, session: Session, *, failed: bool) -> None:
        """Before ``session.finish``: what a kill must not forget, until ``end`` has committed.

        A bitmap that the session made is removed in the very step in which it fails, and records
        no more: from now on nobody can make a success of it.
        """
        for fleece in session.fleeces:
            bits = self._fleeces.get((session.id, fleece.disk.name))
            if failed and bits is not None:
                bits.mark_broken("the session was finished as failed")

    def end(self, session: Session) -> None:
        """After ``session.finish``: replace the description, then let go of the files."""
        self._sessions.pop(session.id, None)
        self.extras.pop(session.name, None)
        self._start(self._commit_end(session), self._committing)

    async def _commit_end(self, session: Session) -> None:
        try:
            await self.commit(removing=session)
        except OSError as error:
            logger.error(
                "session %s is finished, but that could not be written down (%s: %s): a server "
                "that is killed now would take it up again",
                session.name,
                error.filename or self.directory.path,
                error.strerror,
            )
        # What others keep has no file here that anybody would miss.
        is_elsewhere = any(isinstance(fleece.temp, Losable) for fleece in session.fleeces)
        self._start(session.wait_closed(), self._leaving if is_elsewhere else self._closing)

    def _start(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def settle(self) -> None:
        """Return when every end is written down."""
        while self._committing:
            await asyncio.wait(set(self._committing))

    async def wait_ended(self) -> None:
        """Return when the files of every session that ended are gone (a hung one's never are)."""
        await self.settle()
        while self._closing:
            await asyncio.wait(set(self._closing))
        await self._files.removed()

    async def save(self) -> None:
        """Sync everything, then leave the clean mark. Raises OSError, and leaves none then.

        The caller has drained everything: no guest writes any more, and images are synced.
        """
        folders = set()
        for session in self._sessions.values():
            for fleece in session.fleeces:
                # What others keep goes with us: its session is a broken one then.
                if fleece.broken is None and not isinstance(fleece.temp, Losable):
                    await fleece.block_copy.drained()
                    await fleece.temp.flush()
                    folders.add(Path(fleece.temp.name).parent)
        if not await self._files.writer.run(self.directory.has_description):
            return
        for name, files in self._disks.items():
            if files.disk.active_writes:
                raise OSError(errno.EBUSY, "a write to it has not ended", name)
            files.image = await self._makers.run(Image.of, files.disk.device)
        mapped = [bits.file for bits in self._fleeces.values()]
        mapped += [bits.file for bits in self._bitmaps.values()]
        for file in mapped:
            await self._makers.run(file.sync)
        description = self._describe(is_clean=True)
        for folder in folders - {self.directory.files}:
            with suppress(FileNotFoundError):  # the next start tells whose temp image is gone
                await self._files.pool_of(str(folder)).run(sync_folder, folder)
        await self._makers.run(self.directory.sync_files)
        digest = await self._files.write(description, durable=True)
        await self._files.writer.run(self.directory.mark, digest)

    def close(self) -> None:
        """Let go of the files, which stay as they are, and of the directory.

        In the same step the caller closes the images: what fails from now on, because all is
        closed, changes nothing that lasts, and no guest write can start any more.
        """
        for session in self._sessions.values():
            for fleece in session.fleeces:
                fleece.close_bits()
                fleece.temp.close()
        for files in self._disks.values():
            files.stamps.detach()
            for bitmap in files.disk.bitmaps.values():
                bitmap.close()
            if files.file is not None:
                files.file.close()
        self._makers.close()
        self._files.close()

    async def wait_closed(self) -> None:
        """Return when others can have the directory."""
        await self._files.wait_closed()

    # -- inside ----------------------------------------------------------------------------

    def _describe(self, *, is_clean: bool = False) -> Description:
        from fleecenbd.server.state.describe import describe

        return describe(
            self._boot,
            self._disks,
            self._sessions.values(),
            self.names,
            extras=self.extras,
            unserved=self.unserved,
            is_clean=is_clean,
        )

    def _fleece_closed(self, key: tuple[str, str], path: str) -> None:
        for registry in (self._fleeces, self.names.bits, self.names.temps):
            registry.pop(key, None)
        self._files.release(path)

    def _bitmap_closed(self, bitmap_id: str, path: str) -> None:
        self._bitmaps.pop(bitmap_id, None)
        self.names.bitmaps.pop(bitmap_id, None)
        self._files.release(path)

    def _served(self) -> list[Disk]:
        return [files.disk for files in self._disks.values()]

    def _is_broken(self, key: tuple[str, str]) -> bool:
        bits = self._fleeces.get(key)
        return bits is not None and bits.is_broken

    async def _attach(self, name: str) -> None:
        """Give the disk's stamps a file, if it has none. Raises OSError."""
        files = self._disks[name]
        async with files.making:
            if files.file is not None:
                return
            file_name = f"{STAMPS}{random_uuid()}"
            file = await self._map(file_name, {"kind": "stamps", "disk": name}, {})
            try:
                files.image = await self._makers.run(Image.of, files.disk.device)
                files.stamps.attach(file, files.image.mtime_ns)
            except BaseException:
                file.close()
                self._files.release(file.path)
                raise
            files.file = file
            self.names.stamps[name] = file_name

    async def _map(
        self, name: str, identity: dict[str, str | int], areas: dict[str, int]
    ) -> MappedFile:
        path = self.directory.files / name

        def drop(file: MappedFile) -> None:
            file.close()
            self._files.release(file.path)

        return await self._make(partial(MappedFile.create, path, identity, areas), drop)

    async def _make(
        self,
        make: Callable[[], Result],
        drop: Callable[[Result], Any],
        *,
        option: str = "--state-dir",
        elsewhere: str | None = None,
    ) -> Result:
        """Make a file in a thread; one that nobody waits for any more is dropped. ``option``: says
        where else it could be; ``elsewhere``: the folder, if it is not ours."""
        makers = self._makers if elsewhere is None else self._files.pool_of(elsewhere)
        making = makers.run(make)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(partial(_drop_made, drop))
            raise
        except OSError as error:
            known = error.filename if error.filename is not None else str(self.directory.files)
            cause = f"{error.strerror}; give another folder with {option}"
            raise OSError(error.errno, cause, known) from error


def _drop_made(drop: Callable[[Any], Any], making: asyncio.Future[Any]) -> None:
    if not making.cancelled() and making.exception() is None:
        drop(making.result())
