"""The description: which disks, bitmaps and sessions the files of a state directory belong to.

One small JSON document, replaced whole. Bits are not in it, but in the mapped files it names: what
changes with every write must not need a new description.

``version`` changes when an older server would misunderstand it; fields that an older one can do
without may come at any time. A document that is none, or has been cut off, is damaged; one without
our ``format`` is somebody else's, and is not touched.
"""

from __future__ import annotations

import msgspec

FORMAT = "fleecenbd state"
VERSION = 1


class Since(msgspec.Struct, frozen=True):
    """The session from whose moment a bitmap records."""

    session: str
    session_id: str
    armed_at: float


class Clean(msgspec.Struct, frozen=True):
    """The image's times (nanoseconds) when a server let go of it in good order."""

    mtime_ns: int
    ctime_ns: int


class DiskEntry(msgspec.Struct, frozen=True):
    """A disk that bitmaps or sessions are of. ``kind``: of the image: file, block or other."""

    name: str
    image: str
    kind: str
    device: int
    inode: int
    size: int
    stamps: str | None = None
    """Name of the mapped file with the stamps."""
    clean: Clean | None = None
    """Nobody of us has had the image open since."""


class BitmapEntry(msgspec.Struct, frozen=True):
    """A recording bitmap. ``file`` None: its bits are lost, and ``lost`` says why."""

    disk: str
    name: str
    id: str
    granularity: int
    file: str | None = None
    since: Since | None = None
    lost: str | None = None


class OwnEntry(msgspec.Struct, frozen=True):
    """What a session's fleece took from a recording bitmap (engine.recording.OwnBits)."""

    name: str
    mode: str
    bitmap_id: str
    granularity: int
    reason: str | None = None
    since: Since | None = None
    made: bool = False
    replaced: BitmapEntry | None = None


class TempEntry(msgspec.Struct, frozen=True):
    """A temp image: its file's name, and its sizes in bytes. ``kind``: raw, qcow2, or nbd (then
    there is no file): only a raw one is good for another server."""

    file: str
    size: int
    hole_size: int
    kind: str = "raw"
    preallocated: bool = False


class FleeceEntry(msgspec.Struct, frozen=True):
    """One disk within a session. ``bits``: name of the mapped file."""

    disk: str
    cluster_size: int
    bits: str
    temp: TempEntry
    own: OwnEntry | None = None


class SessionEntry(msgspec.Struct, frozen=True):
    """A session that is not finished. ``options``: those of engine.session.SessionOptions.

    ``extra``: what else the server knows of it, such as its time-to-live.
    """

    name: str
    id: str
    armed_at: float
    pause_s: float
    options: dict[str, str | int | float | bool | None]
    fleeces: list[FleeceEntry]
    owner: str | None = None
    extra: dict[str, str | int | float | bool | None] = {}


class Description(msgspec.Struct, frozen=True):
    """Everything in a state directory, by name."""

    boot: str
    """Boot id of the machine when it was written."""
    disks: list[DiskEntry] = []
    bitmaps: list[BitmapEntry] = []
    sessions: list[SessionEntry] = []
    version: int = VERSION
    format: str = FORMAT

    def files(self) -> set[str]:
        """The names of all files that it speaks of."""
        names = {disk.stamps for disk in self.disks}
        names |= {bitmap.file for bitmap in self.bitmaps}
        for session in self.sessions:
            for fleece in session.fleeces:
                names |= {fleece.bits, fleece.temp.file}
        return {name for name in names if name is not None}


class Foreign(Exception):
    """The document is none of ours."""


class Newer(Exception):
    """The document is of a version that this server does not know; the argument."""


class Damaged(Exception):
    """The document is ours, or was, and cannot be read; the argument says why."""


class _Head(msgspec.Struct):
    format: str | None = None
    version: int | None = None


def encode(description: Description) -> bytes:
    """The document."""
    return msgspec.json.format(msgspec.json.encode(description), indent=1) + b"\n"


def decode(document: bytes) -> Description:
    """The reverse of ``encode``. Raises Foreign, Newer, Damaged."""
    try:
        head = msgspec.json.decode(document, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from None
    if head.format != FORMAT:
        raise Foreign
    if head.version is None or head.version < 1:
        raise Damaged("it has no version")
    if head.version > VERSION:
        raise Newer(head.version)
    try:
        description = msgspec.json.decode(document, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from None
    units = [bitmap.granularity for bitmap in description.bitmaps]
    for session in description.sessions:
        for fleece in session.fleeces:
            units += [fleece.cluster_size, fleece.temp.hole_size]
    for unit in units:
        if unit < 1 or unit & (unit - 1):
            raise Damaged(f"{unit} is no power of two")
    for name in description.files():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise Damaged(f"{name!r} is no name of a file")
    return description
