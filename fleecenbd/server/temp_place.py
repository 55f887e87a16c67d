"""Where the temp images of a session are, and of what kind: as it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

RAW = "raw"
QCOW2 = "qcow2"
NBD = "nbd"

DISK = "{disk}"
SESSION = "{session}"

_BRACES = re.compile(r"\{[^{}]*\}")
_NBD_URI = re.compile(r"nbds?(\+unix|\+vsock)?://.")


@dataclass(frozen=True)
class TempPlace:
    """``temp``: ``raw`` and ``qcow2`` for files, else the URI of an NBD export, in which ``{disk}``
    and ``{session}`` stand for their names.

    ``directory``: absolute path, of the files; None: the server's own. ``preallocated``: a raw
    file's space is taken at the start. ``overwrite``: an export may hold data, which goes.
    """

    temp: str = RAW
    directory: str | None = None
    preallocated: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, in the words of the API: ``temp_dir`` is --temp-dir."""
        if self.temp not in (RAW, QCOW2) and not _NBD_URI.match(self.temp):
            raise ValueError(f"temp is {RAW}, {QCOW2} or an NBD URI, not {self.temp!r}")
        try:
            _ = urlsplit(self.temp).port
        except ValueError as error:
            raise ValueError(f"temp: {self.temp}: {error}") from None
        for name in _BRACES.findall(self.temp):
            if name not in (DISK, SESSION):
                raise ValueError(f"temp: {name} stands for nothing; {DISK} and {SESSION} do")
        if self.directory is not None:
            if self.kind == NBD:
                raise ValueError("temp_dir is for files, and temp is an NBD URI")
            if not os.path.isabs(self.directory) or "\0" in self.directory:
                raise ValueError(f"temp_dir is an absolute path, not {self.directory!r}")
        if self.preallocated and self.kind != RAW:
            raise ValueError(f"temp_prealloc is for {RAW} temp images only")
        if self.overwrite and self.kind != NBD:
            raise ValueError("temp_overwrite is for temp images at an NBD URI only")

    @property
    def kind(self) -> str:
        """RAW, QCOW2 or NBD."""
        return self.temp if self.temp in (RAW, QCOW2) else NBD

    @property
    def is_one_export(self) -> bool:
        """Whether it is the same for all disks."""
        return self.kind == NBD and DISK not in self.temp

    def uri(self, disk: str, session: str) -> str:
        """Of the export for this disk's temp image."""
        return self.temp.replace(DISK, quote(disk)).replace(SESSION, quote(session))

    def lasting(self) -> dict[str, str | int | float | bool | None]:
        """What the next server must know, for a repeated ask; ``place_of`` is the reverse."""
        return {
            "temp": self.temp,
            "temp_dir": self.directory,
            "temp_prealloc": self.preallocated,
            "temp_overwrite": self.overwrite,
        }


OWN_FILES = TempPlace()
"""Sparse files in the server's own folder."""


def place_of(extra: Mapping[str, Any]) -> TempPlace:
    """From what ``lasting`` gave; what is not there is as it was before there was a choice, and so
    is what a later version has, and this one does not know."""
    try:
        return TempPlace(
            extra.get("temp", RAW),
            extra.get("temp_dir"),
            extra.get("temp_prealloc", False),
            extra.get("temp_overwrite", False),
        )
    except ValueError:
        return OWN_FILES
