"""What a job is asked for: checked before anything starts, and turned into its command."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from dataclasses import dataclass

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")
_FORMAT = re.compile(r"^(raw|qcow2):")

TARGET_LENGTH_MAX = 4096


@dataclass(frozen=True)
class JobAsk:
    """A backup of one disk of a session to a target, as ``fleecenbd pull`` makes it.

    ``target``: an absolute path, as this server sees it, ``raw:PATH``, ``qcow2:PATH``, or an NBD
    URI. ``rate``: bytes per second; None: no limit. ``finish``: the session is finished with it.
    The rest as ``fleecenbd pull --help`` has it; None: its default.
    """

    session: str
    disk: str
    target: str
    finish: bool = False
    force: bool = False
    resume: bool = False
    trim: bool = True
    read_once: bool = False
    verify: bool = False
    compress: bool = False
    checksum: str | None = None
    bitmap: str | None = None
    rate: int | None = None
    connections: int | None = None
    requests: int | None = None
    retries: int | None = None
    journal: str | None = None
    keep: bool = True
    """What is durable stays for ``resume`` where it fails; never with ``finish``."""
    backing: str | None = None
    """The backing file that a qcow2 target names, seen from its folder: an increment."""
    backing_format: str | None = None

    @property
    def export(self) -> str:
        """The fleecing export that it reads."""
        return f"{self.disk}@{self.session}"

    @property
    def place(self) -> str:
        """The target without its format: two jobs with the same place are in each other's way."""
        if _URI.match(self.target):
            return self.target
        return os.path.normpath(_FORMAT.sub("", self.target))

    def check(self) -> None:
        """Whether it makes sense by itself. Raises OSError(EINVAL)."""
        if not _URI.match(self.target):
            _check_path(_FORMAT.sub("", self.target), "target")
        elif "\0" in self.target:
            raise _wrong("target has a NUL byte")
        if self.journal is not None:
            _check_path(self.journal, "journal")
        if self.compress and not self.target.startswith("qcow2:"):
            raise _wrong(f"compress is for qcow2: targets, and {self.target} is none")
        if (self.backing is None) != (self.backing_format is None):
            raise _wrong("backing and backing_format belong together; give both, or none")
        if self.backing is not None:
            if not self.target.startswith("qcow2:"):
                raise _wrong(f"backing is for qcow2: targets, and {self.target} is none")
            if not self.backing or "\0" in self.backing:
                raise _wrong(f"backing: {self.backing!r} is no file's name")
        if self.read_once and not self.trim:
            raise _wrong("read_once releases, and trim: false does not; give one of them")
        if self.read_once and self.resume:
            raise _wrong("what was read once cannot be resumed; leave out read_once or resume")
        if self.checksum is not None and self.checksum not in checksum_algorithms():
            known = ", ".join(checksum_algorithms())
            raise _wrong(f"checksum is one of {known}, not {self.checksum!r}")

    def arguments(self, uri: str, session_id: str) -> list[str]:
        """The arguments of ``fleecenbd pull``, of that session alone."""
        words = ["--progress", "json", "--commands", f"--session-id={session_id}"]
        flags = (
            ("--force", self.force),
            ("--resume", self.resume),
            ("--no-trim", not self.trim),
            ("--read-once", self.read_once),
            ("--verify", self.verify),
            ("--compress", self.compress),
            # Where it fails the session ends: nothing could go on with what is kept.
            ("--no-keep", self.finish or not self.keep),
        )
        words += [option for option, is_set in flags if is_set]
        values = (
            ("--checksum", self.checksum),
            ("--bitmap", self.bitmap),
            ("--rate", self.rate),
            ("--connections", self.connections),
            ("--requests", self.requests),
            ("--retries", self.retries),
            ("--journal", self.journal),
            ("--backing", self.backing),
            ("--backing-format", self.backing_format),
        )
        words += [f"{option}={value}" for option, value in values if value is not None]
        return [*words, "--", uri, self.target]


def checksum_algorithms() -> list[str]:
    """Those that a pull knows (client.checksums.algorithms)."""
    names = {name.replace("-", "_").lower() for name in hashlib.algorithms_guaranteed}
    return sorted(name for name in names if not name.startswith("shake"))


def _check_path(path: str, what: str) -> None:
    if not os.path.isabs(path) or "\0" in path:
        raise _wrong(
            f"{what}: {path!r} is no absolute path and no NBD URI; "
            "the server has a folder of its own"
        )
    if path.endswith("/") or len(path) > TARGET_LENGTH_MAX:
        raise _wrong(f"{what}: {path[:100]!r} is no file's name")


def _wrong(text: str) -> OSError:
    return OSError(errno.EINVAL, text)
