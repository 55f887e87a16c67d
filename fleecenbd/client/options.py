"""What is asked of a pull, and where its files are."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fleecenbd.client.journal_file import default_path

RETRIES = 5
PART_SUFFIX = ".part"
JOURNAL_SUFFIX = ".journal"
ONCE = "+once"
"""What an export's name ends in whose every READ releases what it has handed over."""

QCOW2 = "qcow2:"
"""What the text of a target begins with that is a qcow2 file."""

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")


@dataclass(frozen=True)
class Backing:
    """What a qcow2 overlay builds on: stored in it as given here."""

    path: str
    format: str


@dataclass(frozen=True)
class PullOptions:
    """As ``fleecenbd pull --help`` tells them."""

    source: str
    """An NBD URI."""
    target: str
    """A path, ``raw:PATH``, ``qcow2:PATH``, or an NBD URI."""
    force: bool = False
    """Write over what is there; with ``resume``: believe that a source without a session id is
    the same one."""
    resume: bool = False
    session_id: str | None = None
    """The only session that will do; None: any, or none."""
    trim: bool = True
    read_once: bool = False
    bitmap: str | None = None
    compress: bool = False
    backing: Backing | None = None
    """Of a qcow2 overlay."""
    connections: int | None = None
    requests: int | None = None
    retries: int = RETRIES
    rate: float | None = None
    """Bytes per second."""
    verify: bool = False
    checksum: str | None = None
    """An algorithm of ``checksums.algorithms``."""
    journal: str | None = None
    """Its path; None: beside a file, and in ``journal_folder`` for anything else."""
    journal_folder: Path | None = None
    keep: bool = True
    """What is durable stays for ``resume`` when the pull fails. False: nothing is left behind."""
    watch_temp: bool = True
    """Look at how full the server's temp image is."""
    progress_s: float = 0.5
    """Seconds between two events of it."""


@dataclass(frozen=True)
class Places:
    """The files that belong to one target."""

    journal: str
    file: str | None
    """The target's final name; None: it is no file."""

    @property
    def part(self) -> str | None:
        """The target's name until it is complete."""
        return None if self.file is None else f"{self.file}{PART_SUFFIX}"

    def checksum(self, algorithm: str) -> str | None:
        """Where the checksum is written."""
        return None if self.file is None else f"{self.file}.{algorithm}"


def path_of(target: str) -> str | None:
    """Where a target is; None: it is an NBD URI."""
    return None if _URI.match(target) else re.sub("^(raw|qcow2):", "", target)


def find_places(options: PullOptions) -> Places:
    """Where this target's files are. Raises OSError where the journal has no place."""
    target = options.target
    path = path_of(target)
    if path is not None and _is_special(path):
        path = None
    if options.journal is not None:
        return Places(options.journal, path)
    if path is not None:
        return Places(f"{path}{JOURNAL_SUFFIX}", path)
    if options.journal_folder is None:
        raise OSError(errno.EINVAL, "say where its journal is to be kept: --journal FILE", target)
    return Places(default_path(target, options.journal_folder), None)


def _is_special(path: str) -> bool:
    """Something else than a file: a block device, which has no other name while it is written."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def source_uri(options: PullOptions) -> str:
    """The URI to connect to: with ``read_once``, that of the export that releases by reading."""
    if not options.read_once:
        return options.source
    # Not put together anew from its parts: empty ones (nbd+unix:///) would be lost.
    address, question, query = options.source.partition("?")
    return options.source if address.endswith(ONCE) else f"{address}{ONCE}{question}{query}"
