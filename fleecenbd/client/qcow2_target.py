"""A target that is a qcow2 file: made by qemu-img, written through a qemu-nbd of its own.

    pull ──NBD──▶ private socket ──▶ qemu-nbd ──▶ PATH.part, which becomes PATH

The socket's folder goes once we are connected, and qemu-nbd ends when we hang up, or die: it serves
one client (no --persistent). Between its start and our connection it is the kernel that ends it
with us (setpriv --pdeathsig), and qemu-img at any time. A backing file's name is stored as given: a
relative one is relative to the folder of PATH.

Compressed clusters are written whole, and once (QEMU's filter ``compress``; its block size is the
cluster). One that an earlier pull may have begun can't be written again so: what --resume adds is
not compressed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import quote

from fleecenbd.client.file_target import check_file, give_name
from fleecenbd.client.journal_file import sync_folder
from fleecenbd.client.nbd_target import NbdTarget
from fleecenbd.client.options import PART_SUFFIX, Backing
from fleecenbd.storage.device import Buffer, Data
from fleecenbd.storage.nbd_client import NbdClient

SECTOR = 512
"""Bytes: a qcow2 image's size is a multiple of it."""
CLUSTER = 64 << 10
"""Bytes: while it is written compressed, of this too."""
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 300.0
"""Seconds that qemu-nbd may take to write out what it holds when we hang up."""
SAID_MAX = 500
"""Bytes of qemu-nbd's messages that an error shows, the last ones."""
LOOK_S = 0.01
"""Seconds between two looks for qemu-nbd's pid file, which comes once it listens."""


class Qcow2Target:
    """endpoints.Target: an NbdTarget, and the process and the file behind it."""

    def __init__(
        self,
        path: str,
        nbd: NbdTarget,
        child: _Child,
        *,
        is_zero: bool,
        shrinks_to: int | None,
        force: bool,
    ) -> None:
        self.name = path
        self._force = force
        self._shrinks_to = shrinks_to
        """Bytes; None: it has its size."""
        self.is_zero = is_zero
        self.requests = nbd.requests
        self.write_unit = nbd.write_unit
        self._nbd = nbd
        self._child = child
        self._part = f"{path}{PART_SUFFIX}"

    async def pwrite(self, offset: int, data: Data) -> None:
        """WRITE."""
        with self._child.blamed(self.name):
            await self._nbd.pwrite(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """WRITE_ZEROES: a cluster of zeroes takes no space."""
        with self._child.blamed(self.name):
            await self._nbd.zero(offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        """What a guest would see, through qemu-nbd."""
        with self._child.blamed(self.name):
            return await self._nbd.pread(offset, length)

    async def flush(self) -> None:
        """FLUSH: data and metadata."""
        with self._child.blamed(self.name):
            await self._nbd.flush()

    async def complete(self) -> None:
        """End qemu-nbd, which writes out its metadata, and give the file its name."""
        await self._end()
        if self._shrinks_to is not None:
            size = str(self._shrinks_to)
            command = ("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", self._part, size)
            await _run(self.name, *command)
        await asyncio.to_thread(self._rename)

    def _rename(self) -> None:
        descriptor = os.open(self._part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        give_name(self._part, self.name, force=self._force)

    async def keep(self) -> None:
        """End qemu-nbd."""
        with suppress(OSError):
            await self._end()

    async def discard(self) -> None:
        """End qemu-nbd; the file goes."""
        await self.keep()
        with suppress(FileNotFoundError):
            os.unlink(self._part)

    async def _end(self) -> None:
        await self._nbd.keep()
        await self._child.end(self.name)


class _Child:
    """A qemu-nbd, the private folder where its socket is at first, and its messages."""

    def __init__(self, process: asyncio.subprocess.Process, folder: str, log: BinaryIO) -> None:
        self.process = process
        self._folder = folder
        self._log = log
        self._said = ""
        """Once the log is closed."""

    def said(self) -> str:
        """What it has said on standard error; one line."""
        if self._log.closed:
            return self._said
        length = os.fstat(self._log.fileno()).st_size
        # Not where we are in it: that is where it writes.
        text = os.pread(self._log.fileno(), SAID_MAX, max(0, length - SAID_MAX))
        return " ".join(text.decode(errors="replace").split())

    def blamed(self, name: str) -> _Blame:
        """Errors inside are told with what it said."""
        return _Blame(self, name)

    async def end(self, name: str) -> None:
        """Wait until it has ended by itself. Raises OSError where it did not end well."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                status = await self.process.wait()
        except TimeoutError:
            await self.kill()
            raise OSError(
                errno.ETIMEDOUT, f"qemu-nbd has not ended within {END_TIMEOUT_S:g} s", name
            ) from None
        said = self._ended()
        if status != 0:
            raise OSError(errno.EIO, f"qemu-nbd ended with status {status}: {said}", name)

    async def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        self._ended()

    def _ended(self) -> str:
        self._said = self.said()
        self._log.close()
        self.forget_folder()
        return self._said

    def forget_folder(self) -> None:
        """Nobody else is to come, and a kill leaves nothing there."""
        shutil.rmtree(self._folder, ignore_errors=True)


class _Blame:
    """Adds the child's own words to an OSError."""

    def __init__(self, child: _Child, name: str) -> None:
        self._child = child
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            said = self._child.said()
            text = f"{error.strerror or error}" + (f" ({said})" if said else "")
            raise type(error)(error.errno, text, self._name) from error


async def open_qcow2(
    path: str,
    size: int,
    *,
    force: bool,
    resume: bool,
    compress: bool,
    backing: Backing | None,
    tell: Callable[[str], None],
) -> Qcow2Target:
    """Make PATH.part, or open what an earlier pull left. Raises OSError."""
    check_file(path, force=force, resume=resume)
    for program in ("qemu-img", "qemu-nbd"):
        if shutil.which(program) is None:
            raise OSError(
                errno.ENOENT, f"{program} is not installed (Debian: qemu-utils); a qcow2 target "
                "is written by it", path
            )  # fmt: skip
    part = f"{path}{PART_SUFFIX}"
    whole, rounded = (-(-size // unit) * unit for unit in (SECTOR, CLUSTER))
    if resume:
        # A kill leaves clusters that nobody refers to, at worst: what is durable is not touched.
        check = ("qemu-img", "check", "-q", "-f", "qcow2", "-r", "leaks", part)
        try:
            await _run(path, *check, good=(0, 3))
        except OSError as error:
            raise OSError(
                errno.EIO,
                f"nothing can be resumed: {part} cannot be used any more, it was changed since "
                f"({error.strerror}); begin anew with --force",
                path,
            ) from error
        if compress:
            tell("from here on it is not compressed: a cluster can be written compressed only once")
    else:
        if force:
            with suppress(FileNotFoundError):
                os.unlink(part)
        await _create(path, part, rounded if compress else whole, backing)
    try:
        nbd, child = await _serve(path, part, compress=compress and not resume)
    except BaseException:
        if not resume:
            with suppress(FileNotFoundError):
                os.unlink(part)
        raise
    return Qcow2Target(
        path,
        nbd,
        child,
        is_zero=backing is None and not resume,
        force=force,
        # One that is resumed may have been begun compressed.
        shrinks_to=whole if (compress or resume) and whole != rounded else None,
    )


async def _create(path: str, part: str, size: int, backing: Backing | None) -> None:
    words = [] if backing is None else ["-b", backing.path, "-F", backing.format]
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        await _run(path, "qemu-img", "create", "-q", "-f", "qcow2", *words, part, str(size))
        sync_folder(part)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _with_us() -> Sequence[str]:
    """What a command begins with that the kernel is to end when we die."""
    found = shutil.which("setpriv") is not None
    return ("setpriv", "--pdeathsig", "KILL", "--") if found else ()


async def _run(path: str, *command: str, good: Sequence[int] = (0,)) -> None:
    process = await asyncio.create_subprocess_exec(
        *_with_us(),
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode not in good:
        text = " ".join(said.decode(errors="replace").split())
        raise OSError(errno.EIO, text[:SAID_MAX] or f"{command[0]} failed", path)


async def _serve(path: str, part: str, *, compress: bool) -> tuple[NbdTarget, _Child]:
    folder = tempfile.mkdtemp(prefix="fleecenbd-")
    try:
        child = await _start(folder, part, compress=compress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        sock = os.path.join(folder, "sock")
        await _wait_until_it_listens(child, os.path.join(folder, "pid"), path)
        with child.blamed(path):
            client = await NbdClient.open(f"nbd+unix:///?socket={quote(sock)}", retries=0)
        child.forget_folder()
        return NbdTarget(path, client, cluster=CLUSTER), child
    except BaseException:
        await child.kill()
        raise


async def _start(folder: str, part: str, *, compress: bool) -> _Child:
    image = "file." if compress else ""
    options = {
        **({"driver": "compress"} if compress else {}),
        f"{image}driver": "qcow2",
        f"{image}discard": "unmap",
        f"{image}file.driver": "file",
        f"{image}file.filename": part.replace(",", ",,"),
    }
    command = [
        *_with_us(),
        *("qemu-nbd", "--cache=writeback", "--discard=unmap", "--export-name="),
        *("--socket", os.path.join(folder, "sock"), "--pid-file", os.path.join(folder, "pid")),
        "--image-opts",
        ",".join(f"{key}={value}" for key, value in options.items()),
    ]
    log = _open_log()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
            # A signal for the pull (Ctrl-C) is not one for it: it has something to write out.
            start_new_session=True,
        )
    except BaseException:
        log.close()
        raise
    return _Child(process, folder, log)


def _is_there(path: str) -> bool:
    return os.path.exists(path)


def _open_log() -> BinaryIO:
    return tempfile.TemporaryFile()


async def _wait_until_it_listens(child: _Child, pid_file: str, path: str) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not _is_there(pid_file):
                if child.process.returncode is not None:
                    number = child.process.returncode
                    why = child.said() or f"status {signal.strsignal(-number) or number}"
                    raise OSError(errno.EIO, f"qemu-nbd could not start: {why}", path)
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise OSError(
            errno.ETIMEDOUT, f"qemu-nbd did not start within {START_TIMEOUT_S:g} s", path
        ) from None
