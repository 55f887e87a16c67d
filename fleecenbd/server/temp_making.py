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
from fleecenbd.storage.nbd_places import Server, named_server
from fleecenbd.storage.same_storage import SIZE_APART, Likeness, is_temp, likeness

if TYPE_CHECKING:
    from fleecenbd.storage.temp_qcow2 import TempQcow2
    from fleecenbd.storage.temp_remote import TempExport

LOOK_TIMEOUT_S = 20.0
TAKE_TIMEOUT_S = 60.0
"""Seconds to empty what may hold data."""
ENDING_TIMEOUT_S = 20.0
"""Seconds that temp images that have ended may take to give back their space."""
UNANSWERED_S = 900.0
"""Seconds for which what was asked, and never answered, may still be done: after so many Linux
gives up sending."""

_live: set[TempExport] = set()
"""Exports that are, or may be, changed by this process: until their connections are closed."""
_unanswered: dict[Server, float] = {}
"""Servers that were left with a request unanswered, to the loop's time of that."""
_making = asyncio.Lock()
"""One is made at a time, and no disk is added meanwhile."""


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
    place: TempPlace,
    session: str,
    disk: Disk,
    cluster_size: int,
    disks: Callable[[], Iterable[Disk]],
) -> TempExport:
    """At an NBD server. ``disks``: all that are served.

    Raises OSError: EBUSY where another session here, or a disk, has what the URI leads to, under
    whatever name, or where what an ended one asked for may still be done there.
    """
    from fleecenbd.storage.temp_remote import open_temp_export

    uri = place.uri(disk.name, session)
    await _ended(uri)  # here, too: it may be one client that a server admits
    export = await open_temp_export(uri, disk.size, cluster_size=cluster_size)
    export.on_closed = partial(_closed, export)
    try:
        async with _making:
            async with _answering(uri, LOOK_TIMEOUT_S + ENDING_TIMEOUT_S):
                if not place.overwrite:
                    await export.check_empty()
                await _ended(uri)
                _live.add(export)  # from here on it may be written to
                await _is_apart(export, uri, disks)
            async with _answering(uri, TAKE_TIMEOUT_S):
                await export.take(overwrite=place.overwrite)
    except asyncio.CancelledError:
        export.close()  # who stops the server waits for what is live (``given_back``)
        raise
    except BaseException:
        export.close()
        await export.wait_closed()
        raise
    return export


@asynccontextmanager
async def _answering(name: str, seconds: float) -> AsyncIterator[None]:
    """Raises OSError(ETIMEDOUT) after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        if error.errno is not None:
            raise  # it says itself what took too long
        raise OSError(
            errno.ETIMEDOUT, f"it, or what else is kept, did not answer in {seconds:g} s", name
        ) from None


async def _is_apart(export: TempExport, uri: str, disks: Callable[[], Iterable[Disk]]) -> None:
    """Raises OSError where it is the storage of another temp image, or of a disk; what comes and
    goes meanwhile counts."""
    apart: set[TempExport | Disk] = {export}
    while True:
        await _ended(uri)
        temps = [temp for temp in _live if temp not in apart]
        others = [disk for disk in disks() if disk not in apart]
        if temps:
            temp = temps[0]
            try:
                is_same = await is_temp(export.besides, temp.besides, temp.alone, temp.lose)
            except OSError:
                if temp.is_closed:
                    continue  # it has ended meanwhile, and is waited for
                raise
            if temp.is_closed:
                continue
            if is_same:
                raise _same(uri, "another temp image")
            apart.add(temp)
        elif others:
            await _check_disk(export, uri, others[0])
            apart.add(others[0])
        else:
            return


async def _check_disk(export: TempExport, uri: str, disk: Disk) -> None:
    """Raises OSError(EBUSY) where it may be the disk's storage, or that cannot be known now."""
    _check_there(disk)
    if _is_gone(disk):
        return
    try:
        found = await likeness(export.besides, export.whole_size, disk.device)
    except OSError:
        _check_there(disk)
        if _is_gone(disk):
            return
        raise
    if found is Likeness.SAME:
        raise _same(uri, f"disk {disk.name}, or to a copy of it")
    if found is Likeness.EMPTY:
        raise OSError(
            errno.EBUSY,
            f"it cannot be told from the storage of disk {disk.name}: {found.value}; make it "
            f"larger, by {SIZE_APART >> 20} MiB at least",
            uri,
        )


def _is_gone(disk: Disk) -> bool:
    """Nothing is asked of it any more."""
    return disk.lost is not None or getattr(disk.device, "is_closed", False)


def _check_there(disk: Disk) -> None:
    """Raises OSError(EBUSY) where it cannot be asked now: its storage may be there all the same,
    and be wiped."""
    if not _is_gone(disk) and not getattr(disk.device, "is_usable", True):
        raise OSError(
            errno.EBUSY,
            f"disk {disk.name} is away, and cannot be compared with what is to be a temp image: "
            "try again when it is back (fleecenbd disk list)",
            disk.device.name,
        )


@asynccontextmanager
async def adding(disk: Disk) -> AsyncIterator[None]:
    """Within it the disk may be added to those that are served. Raises OSError(EBUSY) where it is
    the storage of a temp image."""
    if not _live and not _making.locked():
        _check_answered(disk.device.name)
        yield
        return
    async with _making:
        async with _answering(disk.device.name, LOOK_TIMEOUT_S):
            for temp in list(_live):
                if await _is_temp(disk, temp):
                    raise OSError(
                        errno.EBUSY,
                        "it leads to the storage of a session's temp image, whatever it is called",
                        disk.device.name,
                    )
        _check_answered(disk.device.name)
        yield


async def _is_temp(disk: Disk, temp: TempExport) -> bool:
    _check_there(disk)
    if not temp.is_closed and not _is_gone(disk):
        try:
            return await is_temp(disk.device, temp.besides, temp.alone, temp.lose)
        except OSError:
            _check_there(disk)
            if not temp.is_closed and not _is_gone(disk):
                raise
    if temp.is_closed:
        await temp.wait_closed()
    return False


def _closed(export: TempExport) -> None:
    _live.discard(export)
    if export.is_unanswered:
        _unanswered[named_server(export.name)] = asyncio.get_running_loop().time()


async def given_back() -> None:
    """Return when no temp image that has ended holds anything any more."""
    while ending := _ending():
        await asyncio.wait(ending)


def _ending() -> set[asyncio.Future[None]]:
    return {asyncio.ensure_future(temp.wait_closed()) for temp in _live if temp.is_closed}


async def _ended(uri: str) -> None:
    """Return when no temp image that has ended can have anything done at this URI any more. Raises
    OSError(EBUSY) where that takes too long."""
    # All of them: it may be the same server by another name.
    if ending := _ending():
        await asyncio.wait(ending, timeout=ENDING_TIMEOUT_S)
    if slow := next((temp for temp in _live if temp.is_closed), None):
        raise OSError(
            errno.EBUSY,
            f"a temp image that has ended still gives back its space ({slow.name}); try again",
            uri,
        )
    _check_answered(uri)


def _check_answered(uri: str) -> None:
    """Raises OSError(EBUSY) where an ended temp image may still have something done there."""
    since = _unanswered.get(named_server(uri))
    if since is None:
        return
    left = since + UNANSWERED_S - asyncio.get_running_loop().time()
    if left > 0:
        raise OSError(
            errno.EBUSY,
            "its server has left a temp image that has ended without an answer, and may still "
            f"write what that had asked for; give another server, or try again in {left:.0f} s",
            uri,
        )
    del _unanswered[named_server(uri)]


def _same(uri: str, what: str) -> OSError:
    return OSError(
        errno.EBUSY,
        f"it leads to the storage of {what}, whatever it is called: each temp image needs one of "
        "its own. {disk} and {session} in the URI stand for names, which many NBD servers ignore",
        uri,
    )
