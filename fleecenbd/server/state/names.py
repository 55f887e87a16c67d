"""Which files hold what, by name; and what is kept for disks that are not served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from fleecenbd.server.state.description import BitmapEntry, DiskEntry, TempEntry


Extra: TypeAlias = dict[str, str | int | float | bool | None]
"""What else is to be known of a session after a restart."""


class DisksMissing(Exception):
    """Sessions are left over disks that are not served now: to go on would lose them."""

    def __init__(
        self, sessions: Mapping[str, Sequence[str]], images: Mapping[str, str | None]
    ) -> None:
        """``sessions``: by name, what each misses. ``images``: the path of each missing disk's."""
        over = [f"session {name} is over {', '.join(disks)}" for name, disks in sessions.items()]
        super().__init__(f"{', '.join(over)}, not served now")
        self.images = images


@dataclass
class Names:
    """The names of the files that hold what the engine's objects stand for."""

    bits: dict[tuple[str, str], str] = field(default_factory=dict)
    """(id of the session, disk) to the mapped file of a fleece."""
    temps: dict[tuple[str, str], TempEntry] = field(default_factory=dict)
    bitmaps: dict[str, str] = field(default_factory=dict)
    """Id of a recording bitmap to its mapped file."""
    stamps: dict[str, str] = field(default_factory=dict)
    """Name of a disk to its mapped file."""


@dataclass(frozen=True)
class Unserved:
    """What a description says of disks that are not served now: it stays as it is."""

    disks: tuple[DiskEntry, ...] = ()
    bitmaps: tuple[BitmapEntry, ...] = ()
