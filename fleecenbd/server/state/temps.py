"""The temp images of a server with files: made, described, and removed when they may.

A file's name in ``files`` is ``temp-UUID``. Where temp images are to be elsewhere, a symbolic link
of this name leads there, to ``fleecenbd-temp-UUID``, and is made before it: so whatever a kill
leaves behind is found by the next start, and is swept.

Only raw files outlive their server. The others are described too: their sessions are broken then,
by name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.session import MakeTemp
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.files import Files
from fleecenbd.server.state.names import Names
from fleecenbd.server.temp_making import make_export, make_qcow2
from fleecenbd.server.temp_place import NBD, OWN_FILES, QCOW2, RAW, TempPlace
from fleecenbd.storage.device import Device
from fleecenbd.storage.temp import TempImage

if TYPE_CHECKING:
    from fleecenbd.server.state.description import FleeceEntry

Key = tuple[str, str]
"""(id of the session, disk)."""


class _Make(Protocol):
    """Runs a call in a thread, and drops what nobody waits for any more."""

    def __call__(
        self,
        make: Callable[[], Any],
        drop: Callable[[Any], Any],
        *,
        option: str,
        elsewhere: str | None,
    ) -> Awaitable[Any]: ...


class Temps:
    """The temp images of one FileStore."""

    def __init__(
        self,
        directory: StateDirectory,
        names: Names,
        files: Files,
        make: _Make,
        is_broken: Callable[[Key], bool],
        disks: Callable[[], Iterable[Disk]],
    ) -> None:
        self._directory = directory
        self._names = names
        self._files = files
        self._make = make
        self._is_broken = is_broken
        self._disks = disks

    def maker(self, session: str, place: TempPlace = OWN_FILES) -> MakeTemp:
        """Who makes the temp images of a session of this name, in that place."""
        return partial(self._make_temp, session, place)

    async def _make_temp(
        self, session: str, place: TempPlace, disk: Disk, cluster_size: int, session_id: str
    ) -> Device:
        """An empty temp image for the disk. Raises OSError."""
        name = f"temp-{random_uuid()}"
        if place.kind == NBD:
            return await self._make_export(name, disk, cluster_size, session_id, place, session)
        if place.kind == QCOW2:
            return await self._make_qcow2(name, disk, cluster_size, session_id, place)

        def create() -> TempImage:
            return TempImage.create_named(
                self._place(name, place.directory),
                disk.size,
                cluster_size=cluster_size,
                preallocate=place.preallocated,
            )

        try:
            temp: TempImage = await self._make(
                create,
                partial(self._drop, name),
                option=_option(place),
                elsewhere=place.directory,
            )
        except OSError:
            self._files.release(name)
            raise
        self.adopt(session_id, disk.name, temp, name)
        return temp

    async def _make_qcow2(
        self, name: str, disk: Disk, cluster_size: int, session_id: str, place: TempPlace
    ) -> Device:
        def create() -> str:
            path = self._place(name, place.directory)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            return path

        def drop(path: str) -> None:
            self._files.release(name)

        try:
            path = await self._make(create, drop, option=_option(place), elsewhere=place.directory)
            temp = await make_qcow2(path, disk, cluster_size)
        except BaseException:
            self._files.release(name)
            raise
        temp.on_closed = self._describe(session_id, disk.name, temp, name, QCOW2)
        return temp

    async def _make_export(
        self,
        name: str,
        disk: Disk,
        cluster_size: int,
        session_id: str,
        place: TempPlace,
        session: str,
    ) -> Device:
        temp = await make_export(place, session, disk, cluster_size, self._disks)
        given_back = temp.on_closed
        closed = self._describe(session_id, disk.name, temp, name, NBD)

        def both() -> None:
            if given_back is not None:
                given_back()
            closed()

        temp.on_closed = both
        return temp

    def _place(self, name: str, directory: str | None) -> str:
        """The path of a file to come. Raises OSError. Blocks."""
        path = os.fspath(self._directory.files / name)
        if directory is None:
            return path
        if not os.path.isdir(directory):
            is_other = os.path.exists(directory)
            why = "it is no folder" if is_other else "there is no such folder"
            raise OSError(errno.EINVAL, f"{why} for temp images", directory)
        elsewhere = os.path.join(directory, f"{ELSEWHERE}{name}")
        os.symlink(elsewhere, path)
        self._files.folders[name] = directory
        return elsewhere

    def _drop(self, name: str, temp: TempImage) -> None:
        temp.on_closed = partial(self._files.release, name)
        temp.close()

    # -- described, and gone again -------------------------------------------------------------

    def adopt(self, session_id: str, disk: str, temp: TempImage, name: str) -> None:
        """The temp image of that fleece is this file."""
        self._note_folder(name, temp.name)
        temp.on_closed = self._describe(session_id, disk, temp, name, RAW)

    def _describe(
        self, session_id: str, disk: str, temp: Device, name: str, kind: str
    ) -> Callable[[], None]:
        """What is to be called when it is closed."""
        from fleecenbd.server.state.description import TempEntry

        key = session_id, disk
        is_preallocated = isinstance(temp, TempImage) and temp.holds_space
        self._names.temps[key] = TempEntry(name, temp.size, temp.hole_size, kind, is_preallocated)
        return partial(self._closed, key, name)

    def adopt_void(self, session_id: str, disk: str, entry: FleeceEntry) -> None:
        """That fleece is broken: what the description says of its files stays, they need not."""
        key = session_id, disk
        self._names.bits.setdefault(key, entry.bits)
        self._names.temps[key] = entry.temp
        self._note_folder(entry.temp.file, path_of(self._directory, entry.temp.file))
        self._files.remove([entry.temp.file])

    def _note_folder(self, name: str, path: str) -> None:
        folder = os.path.dirname(path)
        if folder != os.fspath(self._directory.files):
            self._files.folders[name] = folder

    def _closed(self, key: Key, name: str) -> None:
        if self._is_broken(key):
            self._files.drop(name)
        else:
            self._files.release(name)


def _option(place: TempPlace) -> str:
    """Which says where temp images are to be."""
    return "--temp-dir" if place.directory is not None else "--temp-dir, or --state-dir"


ELSEWHERE = "fleecenbd-"
"""What a file in another folder has before its name."""


def path_of(directory: StateDirectory, name: str) -> str:
    """Where the temp image of this name is. Blocks."""
    path = os.fspath(directory.files / name)
    with suppress(OSError):
        return os.readlink(path)
    return path
