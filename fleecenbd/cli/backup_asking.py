"""What contradicts itself on a line of ``fleecenbd backup``, and what the rest of it means."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleecenbd.cli import values
from fleecenbd.cli.backup_nights import Nights
from fleecenbd.cli.backup_pairs import Pair, Pairs
from fleecenbd.cli.errors import CommandError, UsageError
from fleecenbd.cli.pull_commands import journal_folder
from fleecenbd.cli.target_words import check_target
from fleecenbd.engine.recording import NEW, USE, USE_OR_NEW

QEMU_TOOLS = ("qemu-img", "qemu-nbd")


@dataclass
class Wishes:
    """What matters for where it goes."""

    is_incremental: bool
    bitmap: str | None
    onto: str | None
    in_place: bool
    compress: bool
    checksum: str | None
    force: bool
    journal_folder: Path | None = None
    """For targets that are no files; made when there is one."""

    def check(self) -> None:
        """Raises UsageError."""
        for option, given in (("--onto", self.onto is not None), ("--in-place", self.in_place)):
            if given and not self.is_incremental:
                raise UsageError(f"{option} goes with --incremental NAME")
        if not self.in_place:
            return
        if self.onto is not None:
            raise UsageError("--in-place builds on TARGET itself: leave --onto out")
        if self.checksum is not None:
            raise UsageError(
                "--checksum is of what is copied, and in place that is a part of TARGET: leave it "
                "out; --verify reads back what was copied"
            )


def bitmap(
    bitmap_name: str | None, incremental: str | None, *, or_full: bool
) -> tuple[str, str | None]:
    """Mode and name of the bitmap. Raises UsageError."""
    if bitmap_name is not None and incremental is not None:
        raise UsageError(
            "--bitmap makes a full backup, and --incremental one of what has changed: give one of "
            "them (--incremental NAME --or-full does what can be done)"
        )
    if incremental is not None:
        return USE_OR_NEW if or_full else USE, values.check_name(incremental, "a bitmap")
    if or_full:
        raise UsageError("--or-full goes with --incremental NAME; without it every backup is full")
    return NEW, None if bitmap_name is None else values.check_name(bitmap_name, "a bitmap")


def nights(
    words: Sequence[str], disks: list[str] | None, wishes: Wishes, *, all_disks: bool
) -> Nights:
    """One FOLDER. Raises UsageError."""
    wishes.check()
    if all_disks and disks:
        raise UsageError("--all is all disks, and --disk some of them: give one of the two")
    if len(words) != 1:
        raise UsageError(
            f"with --all or --disk there is one FOLDER, not {' '.join(words)!r}; for a target for "
            "each disk leave them out"
        )
    if wishes.onto is not None:
        raise UsageError("--onto is for one TARGET; in a FOLDER the records tell")
    if wishes.in_place:
        raise UsageError(
            "--in-place is for TARGETs, as in vda /backup/vda.raw: each run makes a folder of its "
            "own in FOLDER"
        )
    if wishes.force:
        raise UsageError("--force is for TARGETs: in a FOLDER nothing is ever in the way")
    for name in disks or ():
        values.check_name(name, "a disk")
    if disks and len(set(disks)) != len(disks):
        raise UsageError("a disk is given twice")
    return Nights(Path(words[0]), disks or None, compresses=wishes.compress)


def pairs(words: Sequence[str], wishes: Wishes) -> Pairs:
    """DISK TARGET, any number of times. Raises UsageError."""
    wishes.check()
    if len(words) % 2:
        raise UsageError(
            f"{words[-1]!r} is one too many: each DISK has a TARGET after it, as in vda "
            "/backup/vda.raw; for all disks into a folder add --all"
        )
    found = [
        Pair(values.check_name(name, "a disk"), text)
        for name, text in zip(words[::2], words[1::2], strict=True)
    ]
    if len({pair.disk for pair in found}) != len(found):
        raise UsageError("a disk is given twice")
    if wishes.onto is not None and len(found) != 1:
        raise UsageError("--onto is for one disk: leave it out, and the records tell")
    places: set[str] = set()
    for pair in found:
        _check_pair(pair, wishes)
        place = pair.text if pair.path is None else os.path.realpath(pair.path)
        if place in places:
            raise UsageError(f"two disks go to {pair.text}")
        places.add(place)
        if pair.path is None and wishes.journal_folder is None:
            wishes.journal_folder = journal_folder()
    return Pairs(
        found,
        onto=None if wishes.onto is None else Path(wishes.onto),
        is_in_place=wishes.in_place,
        force=wishes.force,
    )


def check_tools(words: Sequence[str], wishes: Wishes) -> None:
    """On the first night, and before a session begins. Raises CommandError."""
    makes_qcow2 = wishes.is_incremental and not wishes.in_place
    if not (makes_qcow2 or wishes.compress or any(word.startswith("qcow2:") for word in words)):
        return
    for program in QEMU_TOOLS:
        if shutil.which(program) is None:
            raise CommandError(
                f"{program} is not installed (Debian: qemu-utils): "
                + ("increments are qcow2 files, which are" if makes_qcow2 else "qcow2 files are")
                + " written by it"
            )


def _check_pair(pair: Pair, wishes: Wishes) -> None:
    check_target(pair.text)
    path = pair.path
    if path is None and os.path.isdir(pair.text):
        raise UsageError(f"{pair.text} is a folder; name a file in it, or give --all")
    if wishes.compress and not pair.is_qcow2:
        raise UsageError(f"--compress is for qcow2: targets, and {pair.text} is none")
    if wishes.bitmap is None:
        return
    if path is None:
        raise UsageError(
            f"{pair.text} is no file, and only files have a record beside them of what they are, "
            "which a chain needs: leave the bitmap out, or name a file"
        )
    if wishes.in_place and pair.is_qcow2:
        raise UsageError(f"--in-place is for raw files: {pair.text}")
    if wishes.is_incremental and not wishes.in_place and not pair.is_qcow2:
        raise UsageError(
            f"what has changed goes into a qcow2 file, which builds on the backup before it: "
            f"write qcow2:{pair.text}, or --in-place to have it put into that"
        )
