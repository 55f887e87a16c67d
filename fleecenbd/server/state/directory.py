"""The state directory: whose it is, and how what is in it is replaced, synced and set aside.

    state.lock     locked whole by the live server, whose pid it holds
    state.json     the description (description.py), replaced by a rename
    state.clean    the clean mark: the SHA-256 of the description that it vouches for; there after
                   a clean stop only
    files/         mapped files and temp images, each under a name that is used once
    damaged/       what could not be read, set aside for whoever wants to look

The lock is an open-file-description lock: it comes free with the last system call of a server
that was killed, and so nothing is read before it is held.

A rename without fsync is enough against a kill, since the page cache outlives it; a crash of the
whole machine costs everything but what a clean mark vouches for, and that was synced.

Description and mark are imported where they are needed: their library takes as long to import as
half a server to start, and most servers find nothing, and begin nothing yet.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fleecenbd.server.state.elsewhere import Elsewhere
from fleecenbd.storage.filesystem import stores_may_fail, type_of
from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.mapped import lock_file

if TYPE_CHECKING:
    from fleecenbd.server.state.description import Description

logger = logging.getLogger(__name__)

LOCK = "state.lock"
DESCRIPTION = "state.json"
CLEAN = "state.clean"
FILES = "files"
DAMAGED = "damaged"

DAMAGED_MAX = 20
"""Files set aside that are kept; the oldest go first."""
DESCRIPTION_LENGTH_MAX = 16 << 20
"""Bytes. What is longer is none of ours."""


class StateDirectory:
    """A locked state directory. Every call raises OSError, with the path, and blocks."""

    def __init__(self, path: Path, lock: int) -> None:
        """Use ``open``."""
        self.path = path
        self.files = path / FILES
        self.elsewhere = Elsewhere()
        """Asks folders of temp images that are not here."""
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> StateDirectory:
        """Make it if need be, and lock it. Raises OSError: EBUSY while another server has it."""
        path = Path(os.path.abspath(path))
        (path / FILES).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_path = path / LOCK
        try:
            lock = lock_file(lock_path)
        except BlockingIOError:
            raise OSError(
                errno.EBUSY,
                f"another live server{_pid_in(lock_path)} uses this state directory; stop it, or "
                "give another folder with --state-dir",
                str(path),
            ) from None
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(lock)
            raise OSError(error.errno, error.strerror, str(lock_path)) from None
        if stores_may_fail(type_of(lock)):
            logger.warning(
                "%s is on btrfs: when that is full, this version of Linux may end the server where "
                "it marks a bit there; keep space free, or give another --state-dir",
                path,
            )
        return cls(path, lock)

    def close(self) -> None:
        """Let others have it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- the description -------------------------------------------------------------------

    def has_description(self) -> bool:
        """Whether there is one, whatever it holds."""
        return os.path.lexists(self.path / DESCRIPTION)

    def read(self) -> Description | None:
        """The description; None where there is none, or it was damaged and is set aside now.

        Raises OSError: EEXIST where the file is somebody else's, ENOTSUP where it is of a newer
        version. Both leave everything as it is.
        """
        path = self.path / DESCRIPTION
        try:
            document = _read(path, DESCRIPTION_LENGTH_MAX)
        except FileNotFoundError:
            return None
        from fleecenbd.server.state.description import VERSION, Damaged, Foreign, Newer, decode

        try:
            return decode(document)
        except Foreign:
            raise OSError(
                errno.EEXIST,
                "this file is none of fleecenbd's; give another folder with --state-dir",
                str(path),
            ) from None
        except Newer as error:
            raise OSError(
                errno.ENOTSUP,
                f"this state is of version {error.args[0]}, and this fleecenbd knows {VERSION} at "
                "most; run the newer one, or give another folder with --state-dir",
                str(path),
            ) from None
        except Damaged as error:
            aside = self.set_aside(DESCRIPTION)
            logger.error(
                "%s is damaged (%s) and is set aside as %s: all bitmaps and sessions that it "
                "named are lost; a full backup is needed",
                path,
                error,
                aside,
            )
            return None

    def write(self, description: Description, *, durable: bool) -> str:
        """Replace the description; its SHA-256. ``durable``: not before it is on the disk."""
        from fleecenbd.server.state.description import encode

        document = encode(description)
        self._replace(DESCRIPTION, document, durable=durable)
        return hashlib.sha256(document).hexdigest()

    # -- the clean mark --------------------------------------------------------------------

    def is_marked(self) -> bool:
        """Whether there is a clean mark that vouches for this description."""
        try:
            content = _read(self.path / CLEAN, 1 << 16)
            document = _read(self.path / DESCRIPTION, DESCRIPTION_LENGTH_MAX)
        except FileNotFoundError:
            return False
        return content.decode("ascii", "replace").strip() == hashlib.sha256(document).hexdigest()

    def mark(self, description: str) -> None:
        """Leave the clean mark, durably. ``description``: what ``write`` returned."""
        self._replace(CLEAN, f"{description}\n".encode(), durable=True)

    def unmark(self) -> None:
        """Remove the clean mark, durably: before the first guest write."""
        try:
            os.unlink(self.path / CLEAN)
        except FileNotFoundError:
            return
        sync_folder(self.path)

    # -- files -----------------------------------------------------------------------------

    def sync_files(self) -> None:
        """Make the names of the files durable."""
        sync_folder(self.files)

    def sweep(self, keep: set[str]) -> list[str]:
        """Remove every file that is not to be kept; their names. What can't be removed is told."""
        swept: list[str] = []
        for entry in os.scandir(self.files):
            if entry.name in keep or entry.is_dir(follow_symlinks=False):
                continue
            try:
                if entry.is_symlink():
                    target = os.readlink(entry.path)
                    self.elsewhere.ask(target, partial(self.unlink, entry.name), bool)
                else:
                    self.unlink(entry.name)
                swept.append(entry.name)
            except OSError as error:
                logger.warning("%s is left over, and stays: %s", entry.path, error.strerror)
        for draft in self.path.glob("state.*.draft"):
            with suppress(OSError):
                draft.unlink()
        return swept

    def unlink(self, name: str) -> None:
        """Remove one of ``files``, if it is there, and what it leads to elsewhere (temps.py).
        Raises OSError."""
        path = self.files / name
        try:
            elsewhere = path.readlink()
        except OSError:
            pass  # it is no link
        else:
            # Links are ours alone to make, and lead to nothing of another name.
            if elsewhere.name == f"fleecenbd-{name}":
                _unlink_unused(elsewhere)
        path.unlink(missing_ok=True)

    def set_aside(self, name: str) -> Path:
        """Move a file, the description or one of ``files``, out of the way; its new path."""
        source = self.path / name if name == DESCRIPTION else self.files / name
        folder = self.path / DAMAGED
        folder.mkdir(mode=0o700, exist_ok=True)
        kept = sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime_ns)
        for old in kept[: max(0, len(kept) - DAMAGED_MAX + 1)]:
            with suppress(OSError):
                old.unlink()
        target = folder / name
        number = 1
        while target.exists():
            number += 1
            target = folder / f"{name}.{number}"
        source.rename(target)
        return target

    def _replace(self, name: str, content: bytes, *, durable: bool) -> None:
        path = self.path / name
        draft = self.path / f"{name}.draft"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(draft, flags, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                if durable:
                    os.fsync(descriptor)
            draft.replace(path)
            if durable:
                sync_folder(self.path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from None


def _read(path: Path, length_max: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:
        return file.read(length_max)


def _unlink_unused(path: Path) -> None:
    """Remove a temp image. Raises OSError: EBUSY where somebody has it, who may have the original
    of a state directory that was copied; ENOENT where its folder is not there, or not mounted."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise
        return
    try:
        lock_image(descriptor, str(path), LockMode.EXCLUSIVE)
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in it durable. Raises OSError, with its path. Blocks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def _pid_in(path: Path) -> str:
    """The pid of whoever has the lock, as " (pid 12)"."""
    try:
        text = _read(path, 32).strip()
    except OSError:
        return ""
    return f" (pid {int(text)})" if text.isdigit() else ""
