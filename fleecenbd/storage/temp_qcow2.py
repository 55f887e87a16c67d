"""TempQcow2: a temp image in a qcow2 file over the active disk, kept by a qemu-storage-daemon.

    temp.qcow2 ──"backing file"──▶ active disk          what the file says, for who looks at it
    child: temp.qcow2, with no backing file             what we read and write

The child opens the file without what it is based on: it needs no lock of the active disk, reads
nothing there, and what was never written is zeroes to it, as to every temp image. So whoever opens
the chain by itself (``qemu-img -U``) sees the old data where it was copied, and today's elsewhere,
also where the old data was zeroes, for which nothing is written.

The file has clusters of the fleece's size, as far as qcow2 has them: nothing is copied for its
sake. Nothing in it has to outlive us: it is not synced, and its child is killed in the end. Once a
second the child writes to the file what it knows of it, for whoever looks.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress
from typing import Any

from fleecenbd.storage.filesystem import type_of
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.pool import ThreadPool
from fleecenbd.storage.qemu import NODE, QemuChild, QemuDevice, serve_node
from fleecenbd.storage.temp_remote import TempRemote

CLUSTER_SIZE_MAX = 2 << 20
"""Bytes, of qcow2."""
BACKING_LENGTH_MAX = 1023
"""Bytes of a name in a qcow2 header."""
JOB_TIMEOUT_S = 60.0
LOOK_S = 0.005
SHOW_INTERVAL_S = 1.0
"""Seconds after which who opens the file sees what is in it."""

_FILE = "file"
_JOB = "create"


class TempQcow2(QemuDevice, TempRemote):
    """A temp image; its file is for its maker to remove (``on_closed``)."""

    def __init__(self, client: NbdClient, child: QemuChild, name: str, **facts: Any) -> None:
        super().__init__(client, child, name, **facts)
        self._quit = child.kill
        self._has_ahead: bool | None = None
        """Known once its file system was asked."""
        self._asking = ThreadPool(name, "room", size_max=1)
        self._showing = asyncio.get_running_loop().create_task(self._show(), name=f"show {name}")

    async def room(self) -> tuple[int, int]:
        """(bytes free, bytes in all) of its file's file system. Raises OSError."""
        return await self._asking.run(self._room)

    def _room(self) -> tuple[int, int]:
        """XFS gives a file that grows space beyond its end, as much again as it has (xfs(5),
        allocsize), and takes it back where it is short of space. What is written next goes there:
        for this file it is free."""
        if self._has_ahead is None:
            self._has_ahead = _gives_ahead(self.name)
        system, file = os.statvfs(self.name), os.stat(self.name)
        ahead = max(0, file.st_blocks * 512 - file.st_size) if self._has_ahead else 0
        return system.f_bavail * system.f_frsize + ahead, system.f_blocks * system.f_frsize

    async def _show(self) -> None:
        """QEMU keeps its tables in memory; a flush (of a node that syncs nothing) writes them."""
        while not self._is_closed:
            await asyncio.sleep(SHOW_INTERVAL_S)
            if not self.flush_now() and not self._is_closed:
                with suppress(OSError):  # who writes, or reads, is told
                    await self.flush()

    async def _hang_up(self) -> None:
        self._showing.cancel()
        self._asking.close()
        await super()._hang_up()


def _gives_ahead(path: str) -> bool:
    """Whether its file system gives a file that grows space beyond its end."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return type_of(descriptor) == "xfs"
    finally:
        os.close(descriptor)


async def make_temp_qcow2(
    path: str, size: int, *, cluster_size: int, backing: tuple[str, str] | None
) -> TempQcow2:
    """Make a qcow2 image in an empty file of this path, and open it.

    ``size`` and ``cluster_size``: as ``TempImage.create`` has them. ``backing``: absolute path or
    URI, and format, of the active disk; None, or too long: the file names none. Raises OSError.
    """
    hole_size = min(cluster_size, CLUSTER_SIZE_MAX)
    size = -(-size // cluster_size) * cluster_size
    options: dict[str, object] = {
        "driver": "qcow2",
        "file": _FILE,
        "size": size,
        "cluster-size": hole_size,
    }
    if backing is not None and len(backing[0].encode(errors="surrogateescape")) <= (
        BACKING_LENGTH_MAX
    ):
        options |= {"backing-file": backing[0], "backing-fmt": backing[1]}

    async def make(child: QemuChild) -> None:
        file = {"driver": "file", "node-name": _FILE, "filename": path, "discard": "unmap"}
        await child.execute("blockdev-add", file)
        await child.execute("blockdev-create", {"job-id": _JOB, "options": options})
        await _concluded(child)
        await child.execute(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": NODE,
                "file": _FILE,
                "backing": None,
                "discard": "unmap",
                "cache": {"no-flush": True},
            },
        )

    child, client = await serve_node(path, make)
    return TempQcow2(client, child, path, size=size, hole_size=hole_size, cluster=hole_size)


async def _concluded(child: QemuChild) -> None:
    """Return when the job has ended well. Raises OSError."""
    try:
        async with asyncio.timeout(JOB_TIMEOUT_S):
            while True:
                (job,) = await child.execute("query-jobs")
                if job["status"] == "concluded":
                    break
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, "QEMU does not come to an end with making it") from None
    if "error" in job:
        raise OSError(errno.EIO, f"QEMU: {job['error']}")
    await child.execute("job-dismiss", {"id": _JOB})
