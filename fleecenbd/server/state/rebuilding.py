"""From a description, and the files that it names, to bitmaps, sessions and fleeces again.

On the loop's thread: files are mapped and open already, and their faults known (looking.py); the
engine puts sessions together (engine/resume.py). What is lost is told once the server is whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import msgspec

from fleecenbd.engine import recording
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import KEEP, RecordingBitmap
from fleecenbd.engine.resume import FleeceRemains, OwnRemains, resume_session
from fleecenbd.engine.session import Session, SessionOptions
from fleecenbd.engine.store import FleeceBits, MemoryFleeceBits
from fleecenbd.server.events import BITMAP_LOST, SESSION_BROKEN
from fleecenbd.server.server import Server
from fleecenbd.server.state.description import (
    BitmapEntry,
    FleeceEntry,
    OwnEntry,
    SessionEntry,
    Since,
)
from fleecenbd.server.state.looking import Found
from fleecenbd.server.state.names import Unserved
from fleecenbd.server.state.store import FileStore

logger = logging.getLogger(__name__)


class Rebuilding:
    """From a description, and files, to the engine's objects."""

    def __init__(self, server: Server, store: FileStore, found: Found) -> None:
        self._server = server
        self._store = store
        self._found = found
        self._news: list[Callable[[], None]] = []
        """What to tell once the server is whole."""
        self._spoilt: dict[str, str] = {}
        """Id of a recording bitmap to why it is lost: a session's own bits of it are."""

    async def run(self) -> list[Session]:
        """Bitmaps are added to their disks, fleeces to theirs; the sessions, oldest first."""
        description, disks = self._found.description, self._server.disks
        for session in description.sessions:
            for fleece in session.fleeces:
                self._look_for_spoilt_bits(session, fleece)
        unserved_bitmaps = []
        for entry in description.bitmaps:
            if entry.disk in disks:
                self._add_bitmap(disks[entry.disk], entry)
            else:
                why = self._spoilt.get(entry.id)
                if why is not None and entry.lost is None:
                    self._tell_lost(entry.disk, entry.name, why)
                    entry = msgspec.structs.replace(entry, file=None, lost=why)
                unserved_bitmaps.append(entry)
        sessions = [await self._session(entry) for entry in description.sessions]
        names = {bitmap.disk for bitmap in unserved_bitmaps}
        self._store.unserved = Unserved(
            tuple(disk for disk in description.disks if disk.name in names), tuple(unserved_bitmaps)
        )
        for entry in unserved_bitmaps:
            if entry.lost is None:
                logger.warning(
                    "bitmap %s of %s stays, and does not record: %s is not served now",
                    entry.name,
                    entry.disk,
                    entry.disk,
                )
        return [session for session in sessions if session is not None]

    def tell(self) -> None:
        """Say what is lost: in the log, and as events."""
        for tell in self._news:
            tell()

    def _look_for_spoilt_bits(self, session: SessionEntry, fleece: FleeceEntry) -> None:
        own = fleece.own
        if own is None or own.mode == KEEP:
            return
        if fleece.disk not in self._server.disks:
            self._spoilt[own.bitmap_id] = (
                f"session {session.name} had taken its bits, and {fleece.disk} is not served any "
                "more"
            )
        elif fleece.bits in self._found.faults:
            self._spoilt[own.bitmap_id] = (
                f"session {session.name} had taken its bits, and they cannot be read: "
                f"{self._found.faults[fleece.bits]}"
            )

    def _tell_lost(self, disk: str, name: str, why: str) -> None:
        def tell() -> None:
            logger.error(
                "bitmap %s of %s is lost: %s. What changed is not known any more: a full backup "
                "is needed",
                name,
                disk,
                why,
            )
            self._server.events.tell(BITMAP_LOST, disk=disk, bitmap=name, reason=why)

        self._news.append(tell)

    def _add_bitmap(self, disk: Disk, entry: BitmapEntry) -> None:
        lost = entry.lost
        if lost is None:
            lost = self._found.distrust[disk.name] or self._spoilt.get(entry.id)
            file = self._found.mapped.get(entry.file or "")
            if lost is None and file is not None:
                lost = file.broken
            if lost is None and (file is None or entry.file is None):
                lost = self._found.faults.get(entry.file or "", "its bits are gone")
            if lost is not None:
                self._tell_lost(disk.name, entry.name, lost)
        bits = None
        if lost is None:
            assert file is not None, "else it is lost"
            assert entry.file is not None, "else there is no file"
            bits = self._store.adopt_recording_bits(entry.id, file, entry.file)
        disk.add_bitmap(
            RecordingBitmap(
                entry.name,
                disk.size,
                entry.granularity,
                bitmap_id=entry.id,
                bits=bits,
                since=_since(entry.since),
                lost=lost,
            )
        )

    async def _session(self, entry: SessionEntry) -> Session | None:
        disks = self._server.disks
        gone = [fleece.disk for fleece in entry.fleeces if fleece.disk not in disks]
        why: str | None = None
        if gone:
            why = f"{', '.join(gone)}, which it is over too, is not served any more"
        if len(gone) == len(entry.fleeces):
            self._news.append(
                partial(
                    logger.error,
                    "session %s is lost (--forget-missing): %s is not served now, nor is any "
                    "other disk of it. Its backup must be begun anew",
                    entry.name,
                    ", ".join(gone),
                )
            )
            return None
        try:
            options = SessionOptions(**entry.options)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            options, why = SessionOptions(), why or f"its options are not understood: {error}"
        session = await resume_session(
            entry.name,
            options,
            [self._fleece(entry, part, why) for part in entry.fleeces if part.disk in disks],
            session_id=entry.id,
            armed_at=entry.armed_at,
            pause_s=entry.pause_s,
            owner=entry.owner,
        )
        self._store.adopt_session(session)
        self._store.extras[session.name] = entry.extra
        return session

    def _fleece(self, session: SessionEntry, entry: FleeceEntry, why: str | None) -> FleeceRemains:
        disk, found = self._server.disks[entry.disk], self._found
        file = found.mapped.get(entry.bits)
        had_broken = file.broken if file is not None else None
        why = (
            why
            or had_broken
            or found.distrust[disk.name]
            or found.faults.get(entry.bits)
            or found.faults.get(entry.temp.file)
        )
        bits: FleeceBits
        if file is not None:
            bits = self._store.adopt_fleece_bits(session.id, disk.name, file, entry.bits)
        else:
            assert why is not None, "a file that is not there has its fault"
            granularity = entry.own.granularity if entry.own is not None else None
            bits = MemoryFleeceBits(disk.size, entry.cluster_size, granularity)
        own = self._own(disk, entry.own) if entry.own is not None else None
        if entry.own is not None and own is None:
            why = why or f"its bitmap {entry.own.name} is gone"
        temp = found.temps.get(entry.temp.file)
        if temp is not None and why is None:
            self._store.temps.adopt(session.id, disk.name, temp, entry.temp.file)
        else:
            if temp is not None:
                temp.close()
            temp = None
            self._store.temps.adopt_void(session.id, disk.name, entry)
        if why is not None and had_broken is None:
            self._tell_broken(session, disk.name, why)
        return FleeceRemains(disk, entry.cluster_size, bits, temp, why, own)

    def _tell_broken(self, session: SessionEntry, disk: str, why: str) -> None:
        def tell() -> None:
            logger.error(
                "session %s is broken: %s@%s: %s. Finish it; its backup must be begun anew",
                session.name,
                disk,
                session.name,
                why,
            )
            self._server.events.tell(SESSION_BROKEN, session=session.name, disk=disk, reason=why)

        self._news.append(tell)

    def _own(self, disk: Disk, entry: OwnEntry) -> OwnRemains | None:
        """None: the bitmap that they would have to be given back to is gone."""
        bitmap = disk.bitmaps.get(entry.name)
        if bitmap is None or bitmap.id != entry.bitmap_id:
            if entry.mode != KEEP:
                return None
            bitmap = RecordingBitmap(
                entry.name, disk.size, entry.granularity, bitmap_id=entry.bitmap_id
            )
        replaced = None
        if entry.replaced is not None:
            replaced = RecordingBitmap(
                entry.replaced.name,
                disk.size,
                entry.replaced.granularity,
                bitmap_id=entry.replaced.id,
                since=_since(entry.replaced.since),
                lost=entry.replaced.lost or "its bits are gone",
            )
        return OwnRemains(
            entry.name,
            entry.mode,
            bitmap,
            _since(entry.since),
            reason=entry.reason,
            made=entry.made,
            replaced=replaced,
        )


def _since(since: Since | None) -> recording.Since | None:
    if since is None:
        return None
    return recording.Since(since.session, since.session_id, since.armed_at)
