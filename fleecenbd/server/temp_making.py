"""Temp images that are no raw files: qcow2 files, and exports of NBD servers, are made here."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from fleecenbd.engine.disk import Disk
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage.same_storage import Alone, Readable, is_same_storage

if TYPE_CHECKING:
    from fleecenbd.storage.temp_qcow2 import TempQcow2
    from fleecenbd.storage.temp_remote import TempExport

LOOK_TIMEOUT_S = 20.0
ENDING_TIMEOUT_S = 20.0
"""Seconds that a temp image that has just ended may take to give back its space."""
UNANSWERED_S = 900.0
"""Seconds for which what was asked, and never answered, may still be done: after so many Linux
gives up sending."""

_live: set[TempExport] = set()
"""Exports that hold a temp image of this process's."""
_unanswered: dict[str, float] = {}
"""URI of an export, to the loop's time when it was given up with requests unanswered."""
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
    whatever name, or where what an ended one asked for may still be done there.
    """
    from fleecenbd.storage.temp_remote import open_temp_export

    uri = place.uri(disk.name, session)
    async with _making:
        await _ended(uri)
        export = await open_temp_export(uri, disk.size, cluster_size=cluster_size)
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                if not place.overwrite:
                    await export.check_empty()
                for temp in list(_live):
                    if await _is_same(
                        export, temp.besides, temp.alone, partial(_is_unusable, temp)
                    ):
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
    export.on_closed = partial(_closed, export)
    return export


def _closed(export: TempExport) -> None:
    _live.discard(export)
    if export.is_unanswered:
        _unanswered[export.name] = asyncio.get_running_loop().time()


async def _ended(uri: str) -> None:
    """Return when no temp image that has ended can have anything done at this URI any more. Raises
    OSError(EBUSY) where that takes too long."""
    # Others, too, which may be the same by another name.
    ending = {asyncio.ensure_future(temp.wait_closed()) for temp in _live if temp.is_closed}
    if ending:
        await asyncio.wait(ending, timeout=ENDING_TIMEOUT_S)
    if any(temp.is_closed and _server_of(temp.name) == _server_of(uri) for temp in _live):
        raise OSError(
            errno.EBUSY,
            "a temp image that has ended still gives back its space at that server; try again",
            uri,
        )
    now = asyncio.get_running_loop().time()
    for given_up, since in list(_unanswered.items()):
        if now - since > UNANSWERED_S:
            del _unanswered[given_up]
    if uri in _unanswered:
        raise OSError(
            errno.EBUSY,
            "its server has left a temp image that has ended without an answer, and may still "
            f"write what that had asked for; give another export, or wait for {UNANSWERED_S:g} s",
            uri,
        )


def _server_of(uri: str) -> tuple[str, list[str]]:
    parts = urlsplit(uri)
    return parts.netloc, parse_qs(parts.query).get("socket", [])


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
async def _not_alone() -> AsyncIterator[None]:
    """Guests go on (same_storage.py)."""
    yield


def _same(uri: str, what: str) -> OSError:
    return OSError(
        errno.EBUSY,
        f"it leads to the storage of {what}, whatever it is called: each temp image needs one of "
        "its own. {disk} and {session} in the URI stand for names, which many NBD servers ignore",
        uri,
    )
