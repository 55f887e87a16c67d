"""What a backup is asked for, what it does disk by disk, and what has come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fleecenbd.cli.backup_places import Destination
from fleecenbd.cli.errors import CommandError
from fleecenbd.client.events import Done
from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.recording import NEW, USE


@dataclass(frozen=True)
class Ask:
    """What is asked for, beside where it goes."""

    session: str
    body: dict[str, Any]
    """For the begin: all but disks, bitmap and owner."""
    bitmap: str | None = None
    mode: str = NEW
    """One of ``use``, ``new``, ``use-or-new``."""
    or_full: bool = False
    """Make a full backup where there is nothing that an increment could be put on."""
    resume: bool = False


@dataclass
class Work:
    """One disk of a session that has begun."""

    session: str
    session_id: str
    answer: Mapping[str, Any]
    """What the server says of it."""
    destination: Destination
    is_resumed: bool = False
    """It was begun by a run that was killed."""
    has_started: bool = False
    """This run copies, or has copied, what was missing."""
    done: Done | None = None
    """None: it was whole already."""
    changed: Bitmap | None = None
    """What has changed, for an increment in place."""
    file: Path | None = None
    """The backup, once it is written down."""

    @property
    def disk(self) -> str:
        return self.destination.disk

    @property
    def uri(self) -> str:
        """Raises CommandError where nobody can connect."""
        uri = self.answer["uris"][0] if self.answer["uris"] else None
        if uri is None:
            raise CommandError(
                f"no URI leads to {self.answer['export']}: the server's socket was handed over to "
                "it; serve it with -U PATH"
            )
        return str(uri)

    @property
    def dirty_only(self) -> bool:
        return self.answer["bitmap"] is not None and self.answer["bitmap"]["mode"] == USE

    @property
    def to_copy(self) -> int:
        """Bytes, about."""
        return int(self.answer["bitmap"]["dirty"] if self.dirty_only else self.answer["size"])


class CopyDisk(Protocol):
    """How one disk is copied: by this process, or by somebody else for it."""

    def begins(self, works: Sequence[Work]) -> None:
        """These will be copied, one after the other."""

    async def __call__(self, work: Work) -> Done:
        """Return when the destination is whole and durable under its staged name. Raises OSError
        or CommandError; what is unfinished stays beside it."""

    async def changed(self, work: Work) -> Bitmap:
        """Which parts have changed, by the session's bitmap. Raises OSError."""


@dataclass
class Outcome:
    """What has come of it."""

    session: str
    session_id: str
    armed_at: float
    result: str | None
    """What the session counts as; None: it could not be finished, and ``error`` says why."""
    works: list[Work] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    elapsed_s: float = 0.0
