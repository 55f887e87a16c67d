"""Temp images that are no raw files: qcow2 files, and exports of NBD servers, are made here."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING

from fleecenbd.engine.disk import Disk
from fleecenbd.server.temp_place import TempPlace

if TYPE_CHECKING:
    from fleecenbd.storage.temp_qcow2 import TempQcow2
    from fleecenbd.storage.temp_remote import TempExport

_used: set[str] = set()
"""URIs of exports that hold a temp image of this process's."""


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


async def make_export(place: TempPlace, session: str, disk: Disk, cluster_size: int) -> TempExport:
    """At an NBD server. Raises OSError: EBUSY where another session here has the export."""
    from fleecenbd.storage.temp_remote import open_temp_export

    uri = place.uri(disk.name, session)
    if uri in _used or uri == disk.device.name:
        raise OSError(
            errno.EBUSY,
            "each temp image needs an export of its own, and this one is in use; with {disk} and "
            "{session} in the URI, names stand there",
            uri,
        )
    _used.add(uri)
    try:
        export = await open_temp_export(
            uri, disk.size, cluster_size=cluster_size, overwrite=place.overwrite
        )
    except BaseException:
        _used.discard(uri)
        raise
    export.on_closed = partial(_used.discard, uri)
    return export
