"""Temp images that are no raw files: qcow2 files, and exports of NBD servers, are made here."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fleecenbd.engine.disk import Disk
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage.same_storage import Alone, Readable, is_same_storage

if TYPE_CHECKING:
    from fleecenbd.storage.temp_qcow2 import TempQcow2
    from fleecenbd.storage.temp_remote import TempExport

LOOK_TIMEOUT_S = 20.0

_live: set[TempExport] = set()
"""Exports that hold a temp image of this process's."""
_making = asyncio.Lock()


def make_qcow2(path: str, disk: Disk, cluster_size: int) -> Awaitable[TempQcow2]:
    """Over the disk, in an empty file that is there, and that is not removed. Raises OSError."""
    from fleecenbd.storage.temp_qcow2 import make_temp_qcow2

    # Its child is in another folder.
    return make_temp_qcow2(
        os.path.abspath(path),
        disk.size,
        cluster_size=cluster_size,
        backing=backing_of(disk.device.name),
    )


def backing_of(image: str) -> tuple[str, str]:
    """A disk's image, as it is shown, as the backing file of a qcow2 file: name and format."""
    if image.startswith("qcow2:"):
        return os.path.abspath(image.removeprefix("qcow2:")), "qcow2"
    if "://" in image:
        return image, "raw"
    return os.path.abspath(image), "raw"


async def make_export(
    place: TempPlace, session: str, disk: Disk, cluster_size: int, disks: Iterable[Disk]
) -> TempExport:
    """At an NBD server. ``disks``: all that are served.

    Raises OSError: EBUSY where another session here, or a disk, has what the URI leads to, under
    whatever name.
    """
    from fleecenbd.storage.temp_remote import open_temp_export

    uri = place.uri(disk.name, session)
    async with _making:
        # One that has just ended gives back its space: it may be the same.
        ending = [asyncio.ensure_future(temp.wait_closed()) for temp in _live if temp.is_closed]
        if ending:
            await asyncio.wait(ending, timeout=LOOK_TIMEOUT_S)
        export = await open_temp_export(uri, disk.size, cluster_size=cluster_size)
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                if not place.overwrite:
                    await export.check_empty()
                for temp in list(_live):
                    if await _is_same(export, temp, temp.alone, partial(_is_unusable, temp)):
                        raise _same(uri, "another temp image")
                for other in list(disks):
                    if await _is_same(export, other.device, _not_alone, partial(_is_gone, other)):
                        raise _same(uri, f"disk {other.name}")
            await export.take(overwrite=place.overwrite)
        except BaseException as error:
            export.close()
            await export.wait_closed()
            if isinstance(error, TimeoutError):
                raise OSError(
                    errno.ETIMEDOUT,
                    f"it, or what else is kept, did not answer in {LOOK_TIMEOUT_S:g} s",
                    uri,
                ) from None
            raise
        _live.add(export)
    export.on_closed = partial(_live.discard, export)
    return export


async def _is_same(
    export: TempExport, other: Readable, alone: Alone, is_gone: Callable[[], bool]
) -> bool:
    """Raises OSError, but where the other one is gone: then it is not what has just answered."""
    if is_gone():
        return False
    try:
        return await is_same_storage(export, other, alone)
    except OSError:
        if is_gone():
            return False
        raise


def _is_gone(disk: Disk) -> bool:
    return disk.lost is not None or _is_unusable(disk.device)


def _is_unusable(device: object) -> bool:
    return not getattr(device, "is_usable", True)


@asynccontextmanager
async def _not_alone(offset: int, length: int) -> AsyncIterator[None]:
    """A guest may be writing: not to what is asked about, unless it is the same storage."""
    yield


def _same(uri: str, what: str) -> OSError:
    return OSError(
        errno.EBUSY,
        f"it leads to the storage of {what}, whatever it is called: each temp image needs one of "
        "its own. {disk} and {session} in the URI stand for names, which many NBD servers ignore",
        uri,
    )
