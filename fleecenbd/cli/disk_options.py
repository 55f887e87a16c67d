"""How disks are opened, and what becomes of discards: --cache and --discard, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.values import DiskSpec

NONE = "none"
WRITEBACK = "writeback"
CACHES = (NONE, WRITEBACK)

UNMAP = "unmap"
IGNORE = "ignore"
DISCARDS = (UNMAP, IGNORE)


@dataclass(frozen=True)
class DiskOptions:
    """What the server's disks have in common: those of its command line, and those added later."""

    direct: bool = False
    """Raw images are opened with O_DIRECT (--cache none)."""
    discards: bool = True
    """What guests discard is freed, where ``by_name`` does not say otherwise."""
    by_name: Mapping[str, bool] = field(default_factory=dict)

    def of(self, disk: DiskSpec) -> DiskSpec:
        """The disk, with what holds for it."""
        discards = self.by_name.get(disk.name, self.discards)
        return replace(disk, direct=self.direct, discards=discards)


def parse_disk_options(
    cache: str | None, discard: Sequence[str], disks: Sequence[DiskSpec]
) -> DiskOptions:
    """The options as typed, where ``disks`` will be served. Raises UsageError."""
    discards: bool | None = None
    by_name: dict[str, bool] = {}
    known = [disk.name for disk in disks]
    for text in discard:
        # From the right: a disk's name has no equals sign, and neither have the words.
        name, equals, word = text.rpartition("=")
        if word not in DISCARDS:
            raise UsageError(
                f"--discard: {text!r} is neither {UNMAP} nor {IGNORE}; write one of these for all "
                f"disks, or NAME={IGNORE} for one"
            )
        if not equals:
            if discards is not None:
                raise UsageError("--discard is given twice for all disks; give it once")
            discards = word == UNMAP
            continue
        if name not in known:
            raise UsageError(
                f"--discard: there will be no disk called {name!r}; there will be "
                f"{', '.join(known)}"
            )
        if name in by_name:
            raise UsageError(f"--discard is given twice for {name}; give it once")
        by_name[name] = word == UNMAP
    if cache is not None and cache not in CACHES:
        raise UsageError(f"--cache: {cache!r} is neither {NONE} nor {WRITEBACK}")
    return DiskOptions(cache == NONE, discards is not False, by_name)
