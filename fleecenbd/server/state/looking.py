"""What is in a state directory, and whether it can be trusted. Blocks; changes next to nothing.

A file that cannot be read is set aside, or is missing: its fault is noted, and is the loss of what
it held, never that of anything else.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from fleecenbd.server.state.description import Description, FleeceEntry, SessionEntry
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.names import DisksMissing
from fleecenbd.server.state.temps import path_of
from fleecenbd.server.state.trust import Evidence, Image, why_not
from fleecenbd.server.temp_place import RAW
from fleecenbd.storage.mapped import MappedFile
from fleecenbd.storage.stamps import stamps_of
from fleecenbd.storage.temp import TempImage

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """What is in the directory. Files that can't be read are set aside, and told why."""

    description: Description
    distrust: dict[str, str | None] = field(default_factory=dict)
    """Of each disk that is served: why what belongs to it can't be trusted; None: it can."""
    mapped: dict[str, MappedFile] = field(default_factory=dict)
    temps: dict[str, TempImage] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    """Name of a file that can't be used to the reason."""


def look(
    directory: StateDirectory,
    boot: str,
    images: Mapping[str, Image],
    *,
    trust_offline: frozenset[str] = frozenset(),
    forget_missing: bool = False,
) -> Found:
    """Read, judge, map and open. Raises OSError where the description must not be touched, and
    DisksMissing, unless ``forget_missing``.
    """
    is_marked = directory.is_marked()
    description = directory.read() or Description(boot)
    if not forget_missing:
        _refuse_missing(description, images)
    found = Found(description)
    for disk in description.disks:
        if disk.name not in images:
            continue
        stamps = None
        if disk.stamps is not None:
            file = _map(directory, found, disk.stamps, {"kind": "stamps", "disk": disk.name})
            if file is not None:
                stamps = stamps_of(file)
                file.close()
        evidence = Evidence(is_marked, description.boot == boot, stamps)
        found.distrust[disk.name] = why_not(
            disk, images[disk.name], evidence, trust_offline=disk.name in trust_offline
        )
    for name in images:
        found.distrust.setdefault(name, "the description does not say which image it was")
    for bitmap in description.bitmaps:
        if bitmap.file is not None and found.distrust.get(bitmap.disk, "") is None:
            identity: dict[str, str | int] = {
                "kind": "bitmap",
                "id": bitmap.id,
                "disk": bitmap.disk,
                "size": images[bitmap.disk].size,
                "granularity": bitmap.granularity,
            }
            _map(directory, found, bitmap.file, identity)
    for session in description.sessions:
        is_whole = all(fleece.disk in images for fleece in session.fleeces)
        for fleece in session.fleeces:
            if fleece.disk in images:
                _open_fleece(directory, found, session, fleece, images[fleece.disk], is_whole)
    return found


def _refuse_missing(description: Description, images: Mapping[str, Image]) -> None:
    """Raise DisksMissing for sessions over disks that are not served.

    Broken ones, too: a bitmap's bits may be in them.
    """
    over: dict[str, list[str]] = {}
    for session in description.sessions:
        missing = [fleece.disk for fleece in session.fleeces if fleece.disk not in images]
        if missing:
            over[session.name] = missing
    if over:
        paths = {disk.name: disk.image for disk in description.disks}
        names = sorted({disk for missing in over.values() for disk in missing})
        raise DisksMissing(over, {name: paths.get(name) for name in names})


def _open_fleece(
    directory: StateDirectory,
    found: Found,
    session: SessionEntry,
    fleece: FleeceEntry,
    image: Image,
    is_whole: bool,
) -> None:
    identity: dict[str, str | int] = {
        "kind": "fleece",
        "session": session.id,
        "disk": fleece.disk,
        "size": image.size,
        "cluster_size": fleece.cluster_size,
    }
    file = _map(directory, found, fleece.bits, identity)
    temp = fleece.temp
    if is_whole and found.distrust[fleece.disk] is None and file and file.broken is None:
        if temp.kind != RAW:
            found.faults[temp.file] = f"its temp image ({temp.kind}) went with its server"
            return
        try:
            if temp.size < -(-image.size // fleece.cluster_size) * fleece.cluster_size:
                raise OSError(errno.EINVAL, f"it has {temp.size} bytes only")
            path = path_of(directory, temp.file)
            reopen = partial(
                TempImage.reopen,
                path,
                temp.size,
                temp.hole_size,
                holds_space=temp.preallocated,
            )
            is_ours = os.path.dirname(path) == os.fspath(directory.files)
            found.temps[temp.file] = (
                reopen() if is_ours else directory.elsewhere.ask(path, reopen, TempImage.close)
            )
        except OSError as error:
            found.faults[temp.file] = f"its temp image cannot be used: {error.strerror}"


def _map(
    directory: StateDirectory, found: Found, name: str, identity: Mapping[str, str | int]
) -> MappedFile | None:
    path = directory.files / name
    try:
        file = MappedFile.open(path)
        if any(file.identity.get(key) != value for key, value in identity.items()):
            file.close()
            raise OSError(errno.EINVAL, f"it is about something else: {file.identity}", str(path))
    except FileNotFoundError:
        found.faults[name] = f"{path} is missing"
        return None
    except OSError as error:
        found.faults[name] = f"{path}: {error.strerror}"
        if error.errno == errno.EINVAL:
            aside = directory.set_aside(name)
            logger.error("%s is damaged (%s) and is set aside as %s", path, error.strerror, aside)
        return None
    found.mapped[name] = file
    return file
