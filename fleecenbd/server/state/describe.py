"""From disks, bitmaps and sessions as they are now to the description of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from fleecenbd.engine import recording
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.own_bits import OwnBits, bitmaps_with
from fleecenbd.engine.recording import RecordingBitmap
from fleecenbd.engine.session import Session
from fleecenbd.server.state.description import (
    BitmapEntry,
    Clean,
    Description,
    DiskEntry,
    FleeceEntry,
    OwnEntry,
    SessionEntry,
    Since,
)
from fleecenbd.server.state.disks import DiskFiles
from fleecenbd.server.state.names import Extra, Names, Unserved


def describe(
    boot: str,
    disks: Mapping[str, DiskFiles],
    sessions: Iterable[Session],
    names: Names,
    *,
    extras: Mapping[str, Extra],
    unserved: Unserved,
    is_clean: bool = False,
) -> Description:
    """What is true in this step, with every session armed that is being armed. ``is_clean``: nobody
    of us writes any more.
    """
    listed = list(sessions)
    bitmaps = {name: bitmaps_with(of.disk, *listed) for name, of in disks.items()}
    needed = {name for name, found in bitmaps.items() if found}
    needed |= {fleece.disk.name for session in listed for fleece in session.fleeces}
    return Description(
        boot,
        disks=[
            *(_disk(disks[name], names, is_clean) for name in sorted(needed) if name in disks),
            *unserved.disks,
        ],
        bitmaps=[
            *(
                _bitmap(disk, bitmap, since, names)
                for disk, found in bitmaps.items()
                for bitmap, since in found.values()
            ),
            *unserved.bitmaps,
        ],
        sessions=[_session(session, names, extras.get(session.name, {})) for session in listed],
    )


def _disk(files: DiskFiles, names: Names, is_clean: bool) -> DiskEntry:
    disk, image = files.disk, files.image
    return DiskEntry(
        disk.name,
        files.path,
        image.kind,
        image.device,
        image.inode,
        image.size,
        names.stamps.get(disk.name),
        Clean(image.mtime_ns, image.ctime_ns) if is_clean else None,
    )


def _bitmap(
    disk: str, bitmap: RecordingBitmap, since: recording.Since | None, names: Names
) -> BitmapEntry:
    file = names.bitmaps.get(bitmap.id) if bitmap.lost is None else None
    return BitmapEntry(
        disk, bitmap.name, bitmap.id, bitmap.granularity, file, _since(since), bitmap.lost
    )


def _since(since: recording.Since | None) -> Since | None:
    if since is None:
        return None
    return Since(since.session, since.session_id, since.armed_at)


def _session(session: Session, names: Names, extra: Extra) -> SessionEntry:
    return SessionEntry(
        session.name,
        session.id,
        session.armed_at,
        session.pause_s,
        asdict(session.options),
        [_fleece(session, fleece, names) for fleece in session.fleeces],
        session.owner,
        extra,
    )


def _fleece(session: Session, fleece: Fleece, names: Names) -> FleeceEntry:
    key = session.id, fleece.disk.name
    return FleeceEntry(
        fleece.disk.name,
        fleece.cluster_size,
        names.bits[key],
        names.temps[key],
        _own(fleece.disk.name, fleece.own, names) if fleece.own is not None else None,
    )


def _own(disk: str, own: OwnBits, names: Names) -> OwnEntry:
    replaced = own.replaced
    return OwnEntry(
        own.name,
        own.mode,
        own.bitmap_id,
        own.granularity,
        own.reason,
        _since(own.since),
        own.made,
        _bitmap(disk, replaced, replaced.since, names) if replaced is not None else None,
    )
