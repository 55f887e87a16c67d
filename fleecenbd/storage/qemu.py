"""Images that are no raw files: kept by a qemu-storage-daemon of ours, one for each image.

    RemoteDevice ──NBD──▶ private socket ──▶ qemu-storage-daemon ──▶ qcow2 file
                              QMP ──────────────────┘

QEMU knows the format: internal snapshots, compression, backing files. It is told over QMP what to
open, which says in a sentence what is wrong, and at the end to let go of it and to quit. When we
are gone, however that happens, the kernel sends it SIGTERM, upon which it writes out what it holds
and ends. It locks its files as QEMU does: the next server waits for it (``LOCK_WAIT_S``).

A child that ends by itself takes with it what it held and no flush had covered; so it is not
started again: every request fails until the server is.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO, Any
from urllib.parse import quote

from qemu.qmp import ExecuteError, QMPClient, QMPError

from fleecenbd.storage.backing import Backing, who_builds_on
from fleecenbd.storage.children import start_child
from fleecenbd.storage.losing import Losing
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.remote import ALLOCATION, CONNECTIONS_MAX, RemoteDevice

logger = logging.getLogger(__name__)

PROGRAM = "qemu-storage-daemon"
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 300.0
"""Seconds that it may take to write out what it holds."""
LOCK_WAIT_S = 10.0
"""Seconds that the last server's child may take to end, and to let go of its locks."""
LOOK_S = 0.02
HUNG_UP_S = 2.0
"""Seconds that one whose connections are lost has to end, and to say why."""
SAID_MAX = 500
"""Bytes of its messages that an error shows, the last ones."""

CLUSTER = 64 << 10
"""Bytes: of a qcow2 image, unless it was made otherwise. TRIM frees whole ones."""

NODE = "image"
"""Name of the node that a child exports."""

_LOCKED = ("Failed to get", "lock")
"""What QEMU says of a file that another process has."""


class QemuChild:
    """The process, and the line to it."""

    def __init__(self, name: str) -> None:
        """``name``: of the image, for messages."""
        self.name = name
        self.folder = tempfile.mkdtemp(prefix="fleecenbd-")
        """Private, for its sockets, until somebody has connected to them."""
        self._log = _open_log()
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp = QMPClient(name)
        self.ended = asyncio.Event()

    @property
    def socket(self) -> str:
        """Of its NBD server."""
        return os.path.join(self.folder, "nbd")

    async def start(self) -> None:
        """Start it, and connect. Raises OSError."""
        monitor = os.path.join(self.folder, "qmp")
        ready = os.path.join(self.folder, "pid")
        starting = asyncio.ensure_future(
            start_child(
                (
                    *(PROGRAM, "--pidfile", ready),
                    *("--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off"),
                    *("--monitor", "chardev=qmp"),
                ),
                stderr=self._log,
            )
        )
        try:
            await asyncio.shield(starting)
        finally:  # cancelled, too: only who knows it can end it
            self._process = await starting
            self._watch()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await asyncio.to_thread(os.path.exists, ready):
                    if self.ended.is_set():
                        raise OSError(errno.EIO, f"{PROGRAM} could not start: {self.said()}")
                    await asyncio.sleep(LOOK_S)
                await self._qmp.connect(monitor)
        except TimeoutError:
            raise OSError(
                errno.ETIMEDOUT, f"{PROGRAM} did not start within {START_TIMEOUT_S:g} s"
            ) from None
        except QMPError as error:
            raise OSError(errno.EIO, f"{PROGRAM} does not answer: {error}") from error

    def _watch(self) -> None:
        assert self._process is not None, "it has started"
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()  # nobody would know of its end
            self._process.wait()
            self.ended.set()
            raise

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            assert self._process is not None, "it had started"
            self._process.wait()
            self.ended.set()

        loop.add_reader(descriptor, ended)

    def said(self) -> str:
        """The last of what it has said on standard error; one line."""
        length = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), SAID_MAX, max(0, length - SAID_MAX))
        status = None if self._process is None else self._process.returncode
        said = " ".join(text.decode(errors="replace").split())
        if said or status is None:
            return said or "nothing was said"
        return f"status {status}" if status >= 0 else f"killed by signal {-status}"

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What it answers. Raises OSError, with QEMU's own sentence."""
        try:
            return await self._qmp.execute(command, arguments)
        except ExecuteError as error:
            number = errno.EBUSY if all(word in str(error) for word in _LOCKED) else errno.EINVAL
            text = f"QEMU: {error}"
            if number == errno.EBUSY:
                text += ": another process has it open; end that first"
            raise OSError(number, text, self.name) from None
        except QMPError as error:
            raise OSError(errno.EIO, f"{PROGRAM} is gone: {self.said()}", self.name) from error

    def forget_folder(self) -> None:
        """Nobody else is to connect."""
        shutil.rmtree(self.folder, ignore_errors=True)

    async def quit(self) -> None:
        """Let it write out what it holds, and end. Raises OSError where it did not end well."""
        if self._process is None:
            self._close()
            return
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                with suppress(Exception):  # it may have gone; what counts is its status
                    await self._qmp.execute("quit")
                await self.ended.wait()
        except TimeoutError:
            self._process.kill()
            raise OSError(
                errno.ETIMEDOUT, f"{PROGRAM} has not ended within {END_TIMEOUT_S:g} s", self.name
            ) from None
        finally:
            said = self.said()
            with suppress(Exception):
                await self._qmp.disconnect()
            self._close()
        if self._process.returncode != 0:
            raise OSError(errno.EIO, f"{PROGRAM} ended badly: {said}", self.name)

    def _close(self) -> None:
        self.forget_folder()
        self._log.close()

    async def kill(self) -> None:
        """It could not be made use of."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self.ended.wait()
        with suppress(Exception):
            await self._qmp.disconnect()
        self._close()


def _open_log() -> IO[bytes]:
    return tempfile.TemporaryFile()


class QemuDevice(Losing, RemoteDevice):
    """storage.device.Device: the export of a child, which ends with it."""

    def __init__(
        self, client: NbdClient, child: QemuChild, name: str, *, cluster: int, **facts: Any
    ) -> None:
        super().__init__(client, name, cluster=cluster, **facts)
        self.on_closed: Callable[[], Awaitable[None] | None] | None = None
        """Called once the child has ended; what it returns is waited for."""
        self.backing: Backing | None = None
        """What must not change while the child has the image open."""
        self._child = child
        self._quit: Callable[[], Awaitable[None]] = child.quit
        """What ends it; raises OSError."""
        client.when_lost(self._hung_up)
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name=f"end {name}")

    async def _watch(self) -> None:
        await self._child.ended.wait()
        if not self._is_closed:
            self._has_ended(f"{PROGRAM} has ended: {self._child.said()}")

    def _hung_up(self, error: OSError) -> None:
        """No request succeeds any more. As a rule it ends, and will say why."""
        if not self._is_closed and not self.is_lost:
            loop = asyncio.get_running_loop()
            loop.call_later(HUNG_UP_S, self._still_there, error)

    def _still_there(self, error: OSError) -> None:
        if not self._is_closed and not self.is_lost:
            self._has_ended(f"{PROGRAM} does not serve it any more: {error.strerror}")

    def _has_ended(self, why: str) -> None:
        """The child has, and nobody had asked it to."""
        logger.error("%s: %s", self.name, why)
        self._lose(why)

    async def _hang_up(self) -> None:
        await super()._hang_up()
        try:
            await self._quit()
        except OSError as error:
            logger.error("%s: %s", self.name, error.strerror)
        finally:
            if self.backing is not None:
                self.backing.close()
            self._watching.cancel()
        if self.on_closed is not None and (left := self.on_closed()) is not None:
            await left


async def open_qcow2(
    path: str, *, read_only: bool = False, name: str | None = None, locks: bool = True
) -> QemuDevice:
    """Open a qcow2 image, with all that it builds on. Raises OSError.

    ``locks``: nobody may write to what it builds on, either.
    """
    return await open_image(
        {
            "driver": "qcow2",
            "discard": "unmap",
            "file": {"driver": "file", "filename": path, "discard": "unmap"},
        },
        name=name or f"qcow2:{path}",
        read_only=read_only,
        locks=locks,
        hole_size=CLUSTER,
    )


async def open_image(
    block_device: Mapping[str, object],
    *,
    name: str,
    read_only: bool = False,
    locks: bool = True,
    **facts: Any,
) -> QemuDevice:
    """Open what ``blockdev-add`` is told. Raises OSError: EBUSY where another process has it."""
    backing = Backing()

    async def add(child: QemuChild) -> None:
        await _add(child, {"node-name": NODE, "read-only": read_only, **block_device})
        if locks:
            nodes = await child.execute("query-named-block-nodes", {"flat": True})
            await backing.lock(name, nodes)

    try:
        child, client = await serve_node(name, add, read_only=read_only)
    except BaseException:
        backing.close()
        raise
    cluster = facts.pop("cluster", 2 << 20)
    device = QemuDevice(client, child, name, cluster=cluster, read_only=read_only, **facts)
    device.backing = backing
    return device


async def serve_node(
    name: str, make: Callable[[QemuChild], Awaitable[None]], *, read_only: bool = False
) -> tuple[QemuChild, NbdClient]:
    """Start a child that exports the node ``NODE``, which ``make`` has it open. Raises OSError."""
    if shutil.which(PROGRAM) is None:
        raise OSError(
            errno.ENOENT,
            f"{PROGRAM} is not installed (Debian: qemu-system-common); it keeps images that are "
            "no raw files",
            name,
        )
    child = QemuChild(name)
    try:
        await child.start()
        await make(child)
        await child.execute(
            "nbd-server-start", {"addr": {"type": "unix", "data": {"path": child.socket}}}
        )
        await child.execute(
            "block-export-add",
            {
                **{"type": "nbd", "id": "export", "node-name": NODE, "name": ""},
                "writable": not read_only,
            },
        )
        client = await NbdClient.open(
            f"nbd+unix:///?socket={quote(child.socket)}",
            contexts=(ALLOCATION,),
            connections=CONNECTIONS_MAX,
            retries=0,
        )
    except BaseException as error:
        await child.kill()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, name) from error
        raise
    child.forget_folder()
    return child, client


def _who_builds_on(block_device: Mapping[str, object]) -> str | None:
    """Of an image that is given by its file: QEMU has just looked at it."""
    file = block_device.get("file")
    return who_builds_on(str(file["filename"])) if isinstance(file, Mapping) else None


async def _add(child: QemuChild, block_device: Mapping[str, object]) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + LOCK_WAIT_S
    is_told = False
    while True:
        try:
            await child.execute("blockdev-add", block_device)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or loop.time() > end:
                raise
            if not is_told and (other := _who_builds_on(block_device)) is not None:
                raise OSError(
                    errno.EBUSY, f"{other} builds on it, and is open here", child.name
                ) from None
        if not is_told:
            is_told = True
            logger.info("%s is in use; waiting for %g s at most", child.name, LOCK_WAIT_S)
        await asyncio.sleep(0.2)
