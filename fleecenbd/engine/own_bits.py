"""A session's own bits: what it takes from a recording bitmap, and what then becomes of that.

The own bits are a copy of the recording bitmap's bits at the moment of arming, which nothing
changes afterwards.

    mode         the export reads      the recording bitmap       may run beside another's
    use          what is dirty         starts anew                no: one at a time resets it
    new          everything            starts anew, or is made    no
    use-or-new   one of these two      starts anew                no
    keep         what is dirty         goes on unchanged          yes

    armed        own bits written, description replaced, recording bits cleared
    success      own bits dropped
    failed       own bits merged into the recording bitmap, whose old ``since`` returns

So at every moment, a kill included, every cluster that changed since the last good backup is in
the recording bitmap, or in the own bits of a session that the description on disk names.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.ids import random_uuid
from fleecenbd.engine.recording import (
    KEEP,
    NEW,
    USE,
    USE_OR_NEW,
    BitmapRequest,
    RecordingBitmap,
    Since,
    merge_bits,
)
from fleecenbd.engine.store import FleeceBits, Store

if TYPE_CHECKING:
    from fleecenbd.engine.disk import Disk
    from fleecenbd.engine.session import Session


@dataclass(eq=False)
class OwnBits:
    """What a session's fleece took from a recording bitmap, and what is to become of that."""

    name: str
    mode: str
    """``use``, ``new`` or ``keep``: what was really done."""
    reason: str | None
    """Why ``use-or-new`` came to ``new``; None: nothing has to be explained."""
    recording: RecordingBitmap
    """The bitmap that records from this session's moment on (``keep``: goes on recording)."""
    bitmap: Bitmap
    """What was dirty at the moment of arming; constant from then on. Where this session made the
    recording bitmap: clear."""
    since: Since | None = None
    """From where ``bitmap`` records: the recording bitmap's ``since`` as it was before."""
    made: bool = False
    """This session made the recording bitmap; if it fails that is removed again."""
    replaced: RecordingBitmap | None = None
    """The lost bitmap in whose place it was made."""

    @property
    def bitmap_id(self) -> str:
        return self.recording.id

    @property
    def granularity(self) -> int:
        return self.recording.granularity

    @property
    def resets(self) -> bool:
        """Does the recording bitmap start anew with this session?"""
        return self.mode != KEEP

    @property
    def dirty_only(self) -> bool:
        """Does the export read only what is dirty?"""
        return self.mode != NEW

    def take(self, disk: Disk) -> None:
        """Arming: copy the recording bits, while no active write is in flight.

        Raises OSError(ENOENT or EINVAL) if the bitmap went, or was lost, since it was chosen.
        """
        if self.made:
            return
        recording = self.recording
        if disk.bitmaps.get(self.name) is not recording:
            raise OSError(
                errno.ENOENT,
                f"bitmap {self.name} of {disk.name} was removed while the session was being armed",
            )
        if recording.lost is not None:
            raise _lost(disk, recording)
        clusters = self.bitmap.clusters
        self.bitmap.bits[:clusters] = recording.bitmap.bits[:clusters]
        self.since = recording.since

    def begin(self, disk: Disk, since: Since) -> None:
        """The session is armed, in this step: the recording bitmap starts anew."""
        if not self.resets:
            return
        if self.made:
            disk.put_bitmap(self.name, self.recording)
        else:
            self.recording.bitmap.bits.setall(0)
        self.recording.since = since

    def discard(self) -> None:
        """The arming failed: let go of the buffers, and of what was made for it."""
        self.bitmap.detach()
        if self.made:
            self.recording.close()

    def end(self, disk: Disk, *, failed: bool) -> None:
        """The session ends, in this step: commit, or roll back."""
        if not self.resets:
            return
        recording = self.recording
        recording.used_by = None
        if not failed:
            if self.replaced is not None:
                self.replaced.close()
        elif self.made:
            disk.put_bitmap(self.name, self.replaced)
            if self.replaced is not None:
                self.replaced.used_by = None
            recording.close()
        else:
            # The bits first: until the description is replaced, a kill finds them in both places.
            merge_bits(self.bitmap, recording.bitmap)
            recording.since = self.since


class BitmapClaim:
    """A bitmap of one disk, chosen by a session that is being armed.

    From here on nobody else may reset, clear or remove it; ``drop`` gives it back.
    """

    def __init__(self, disk: Disk, request: BitmapRequest, session: str) -> None:
        """Raises OSError: ENOENT, EBUSY, EINVAL for one that is lost."""
        self.disk = disk
        self.request = request
        self.mode = request.mode
        self.reason: str | None = None
        name = request.name
        self.existing = existing = disk.bitmaps.get(name)
        user = disk.bitmaps_begun.get(name) or (existing.used_by if existing else None)
        if user is not None and self.mode != KEEP:
            raise OSError(
                errno.EBUSY,
                f"bitmap {name} of {disk.name} is used by session {user}: one session at a time "
                "can reset it",
            )
        if self.mode == USE_OR_NEW:
            self.reason = _why_new(existing)
            self.mode = USE if self.reason is None else NEW
        if self.mode in (USE, KEEP):
            if existing is None:
                raise OSError(errno.ENOENT, f"{disk.name} has no bitmap called {name}")
            if existing.lost is not None:
                raise _lost(disk, existing)
        self.makes = existing is None or (self.mode == NEW and existing.lost is not None)
        if self.mode != KEEP:
            if existing is not None:
                existing.used_by = session
            else:
                disk.bitmaps_begun[name] = session
        self._session = session

    @property
    def granularity(self) -> int:
        """Bytes; that of the own bits, too."""
        if self.makes or self.existing is None:
            return self.request.granularity
        return self.existing.granularity

    async def own_bits(self, bits: FleeceBits, store: Store) -> OwnBits:
        """The session's own bits in the buffer made for them, and its recording bitmap, which is
        made if it has to be. Raises OSError."""
        name, disk = self.request.name, self.disk
        assert bits.own is not None, "own bits were asked for"
        existing = self.existing
        if not self.makes:
            assert existing is not None, "it would be made"
            bitmap = Bitmap(disk.size, self.granularity, buffer=bits.own)
            return OwnBits(name, self.mode, self.reason, existing, bitmap)
        bitmap_id = random_uuid()
        recording_bits = await store.make_recording_bits(
            disk.name, bitmap_id, disk.size, self.granularity
        )
        made = RecordingBitmap(
            name, disk.size, self.granularity, bitmap_id=bitmap_id, bits=recording_bits
        )
        made.used_by = self._session
        bitmap = Bitmap(disk.size, self.granularity, buffer=bits.own)
        return OwnBits(name, self.mode, self.reason, made, bitmap, made=True, replaced=existing)

    def armed(self) -> None:
        """The session is armed: what was to be made is there, and used by it."""
        self.disk.bitmaps_begun.pop(self.request.name, None)

    def drop(self) -> None:
        """The arming failed."""
        if self.mode == KEEP:
            return
        self.disk.bitmaps_begun.pop(self.request.name, None)
        if self.existing is not None:
            self.existing.used_by = None


def _why_new(existing: RecordingBitmap | None) -> str | None:
    """Why ``use-or-new`` must begin a chain; None: it can go on."""
    if existing is None:
        return "there was no such bitmap"
    if existing.lost is not None:
        return f"the bitmap was lost: {existing.lost}"
    if existing.since is None:
        return "no backup has begun its chain yet"
    return None


def _lost(disk: Disk, bitmap: RecordingBitmap) -> OSError:
    return OSError(
        errno.EINVAL,
        f"bitmap {bitmap.name} of {disk.name} is lost ({bitmap.lost}): a full backup is needed, "
        "with mode new or use-or-new",
    )


def bitmaps_with(
    disk: Disk, *sessions: Session | None
) -> dict[str, tuple[RecordingBitmap, Since | None]]:
    """The disk's recording bitmaps and their ``since`` as they will be, or are, once these sessions
    are armed: what a description that names them must say.

    A session that is armed already changes nothing here, one that has ended must not be given.
    """
    bitmaps = {name: (bitmap, bitmap.since) for name, bitmap in disk.bitmaps.items()}
    for session in sessions:
        for fleece in session.fleeces if session is not None else ():
            if fleece.disk is disk and fleece.own is not None and fleece.own.resets:
                assert session is not None, "it has fleeces"
                bitmaps[fleece.own.name] = (fleece.own.recording, session.since)
    return bitmaps
