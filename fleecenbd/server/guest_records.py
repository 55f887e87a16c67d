"""A guest export never comes back different: what guests were served, for the next server to see.

A guest that loses its server reconnects and goes on as if nothing had been. QEMU does not notice
another size, and meets a read-only disk with hundreds of connections a second. So while a guest
is connected to a disk that it may write, a small file in the state directory says what it was
given; it goes when the guest leaves by itself, and stays when the server goes first, killed or
not. The next server compares, and refuses to start. (docs/semantics.md, section 9)

A guest on a Unix socket is known by its process, a number and the moment when it was started:
once that has ended, or the machine was started again, the file means nothing.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fleecenbd.server.state.trust import real_path
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc")

_ANOTHER = "; give another folder with --state-dir"
_OF_THE_FOLDER = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
"""Errnos that another folder is a way out of."""


class GuestRecords:
    """The files of one state directory, one for each image that a guest has."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # One thread: what is asked for first is done first.
        self._pool = ThreadPool(str(directory), "guest records", size_max=1)
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, disk: str, image: str, size: int, *, writable: bool) -> None:
        """Raise OSError(EBUSY) if a guest may come back to the image and find it different.

        Blocks: call it before serving.
        """
        path = self._path(image)
        try:
            text = path.read_text()
            import json  # only where there is a record: a server is to start fast

            record = json.loads(text)
            was, pid, boot = int(record["size"]), record["pid"], record["boot"]
            started = record.get("started")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            logger.warning(
                "%s, on guests that were connected, cannot be read (%s), and is ignored%s",
                path,
                error.strerror,
                _ANOTHER if error.errno in _OF_THE_FOLDER else "",
            )
            return
        except (ValueError, KeyError, TypeError):
            logger.warning(
                "%s is no record of a guest that was connected, and is ignored; remove it", path
            )
            return
        if pid is not None and (boot != _boot_id() or not _is_running(int(pid), started)):
            return
        guest = f"its guest (pid {pid})" if pid is not None else "its guest"
        if was != size:
            change = f"had {was} bytes, and has {size} now"
        elif not writable:
            change = "could be written, and would be read-only now"
        else:
            return
        raise OSError(
            errno.EBUSY,
            f"disk {disk} {change}; {guest} was connected when the server ended, would come "
            f"back and not notice: end the guest first, or remove {path} if it is gone",
            image,
        )

    def came(self, image: str, size: int, pid: int | None) -> None:
        """A guest has connected, and may write. ``pid`` None: it is on another machine."""

        def note() -> None:
            import json

            record = {
                "image": str(image),
                "size": size,
                "pid": pid,
                "started": _started(pid) if pid is not None else None,
                "boot": _boot_id(),
            }
            self._write(self._path(image), json.dumps(record))

        self._do(note)

    def left(self, image: str) -> None:
        """The guest has left by itself."""
        self._do(lambda: self._path(image).unlink(missing_ok=True))

    async def settle(self) -> None:
        """Return when the files are as they should be."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def close(self) -> None:
        """Take no more calls; the thread ends."""
        self._pool.close()

    def _do(self, call: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(self._in_the_pool(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_the_pool(self, call: Callable[[], None]) -> None:
        try:
            await self._pool.run(call)
        except OSError as error:
            logger.warning(
                "it cannot be noted which guests are connected: %s: %s%s",
                error.filename if error.filename is not None else self._directory,
                error.strerror,
                _ANOTHER if error.errno in _OF_THE_FOLDER else "",
            )

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(text)
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise

    def _path(self, image: str) -> Path:
        digest = hashlib.sha256(os.fsencode(real_path(image))).hexdigest()
        return self._directory / "guests" / f"{digest[:32]}.json"


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


def _is_running(pid: int, started: int | None) -> bool:
    """Whether the process runs that had this number, and was started then (None: not known)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # What cannot be told (hidepid of proc(5)) is taken for the guest: it loses nothing by that.
    return started is None or _started(pid) in (started, None)


def _started(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot; None where that is not told."""
    try:
        text = (PROCESSES / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # proc(5): field 22; the second one, the name, is in parentheses and may hold anything.
    return int(text.rpartition(b")")[2].split()[22 - 3])
