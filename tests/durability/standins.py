"""A source and a target for pulls that are killed, as plain as can be: blocking calls in threads.

Used as long as ``fleecenbd.client.source`` and ``targets`` are not there (``pulled.py`` looks); the
copying, the journal and the command line around them are the real ones, and so are server, sockets
and kills. What they do not do: connect anew, and refuse a target that holds something.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nbd

from fleecenbd.client.endpoints import Source, SourceLost, Target
from fleecenbd.client.plan import ACCESS, ALLOCATION
from fleecenbd.storage.device import Buffer, Data, Extent
from fleecenbd.storage.pool import ThreadPool

Result = TypeVar("Result")

CONNECTIONS = 4
STATUS_LENGTH_MAX = 1 << 30


class PlainSource:
    """endpoints.Source: one request at a time on each of a few connections."""

    def __init__(self, uri: str, contexts: tuple[str, ...]) -> None:
        self.name = uri
        asked = (ALLOCATION, ACCESS, *contexts)
        self._free: asyncio.Queue[nbd.NBD] = asyncio.Queue()
        self._pool = ThreadPool(uri, "source", size_max=CONNECTIONS)
        first: nbd.NBD | None = None
        for _ in range(CONNECTIONS):
            client = nbd.NBD()
            for context in asked:
                client.add_meta_context(context)
            client.set_full_info(True)
            try:
                client.connect_uri(uri)
            except nbd.Error:
                if first is None:
                    raise
                break  # a guest's export admits one
            self._free.put_nowait(client)
            first = first or client
        assert first is not None, "it is connected"
        self.requests = self._free.qsize()
        self.size: int = first.get_size()
        self.cluster: int = first.get_block_size(nbd.SIZE_PREFERRED)
        self.contexts = frozenset(c for c in asked if first.can_meta_context(c))
        self.can_trim = ACCESS in self.contexts and first.can_trim()
        self.session_id: str | None = None
        if ACCESS in self.contexts:
            # "vda as of MOMENT, session NAME UUID[, broken]"
            self.session_id = first.get_export_description().split(", ")[1].split()[-1]

    async def _call(self, call: Callable[[nbd.NBD], Result]) -> Result:
        client = await self._free.get()
        try:
            return await self._pool.run(call, client)
        except nbd.Error as error:
            if client.aio_is_dead() or client.aio_is_closed():
                raise SourceLost(errno.ENOTCONN, str(error), self.name) from error
            raise OSError(error.errnum or errno.EIO, str(error), self.name) from error
        finally:
            self._free.put_nowait(client)

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes."""
        return await self._call(lambda client: client.pread(length, offset))

    async def trim(self, offset: int, length: int) -> None:
        """Release."""
        await self._call(lambda client: client.trim(length, offset))

    async def extents(self, context: str, offset: int, length: int) -> list[Extent]:
        """All of it, however many replies it takes."""

        def ask(client: nbd.NBD) -> list[Extent]:
            found: list[Extent] = []
            at, end = offset, offset + length

            def collect(name: str, _start: int, entries: list[int], _error: object) -> int:
                nonlocal at
                if name == context:
                    for count, flags in zip(entries[::2], entries[1::2], strict=True):
                        if at < end:
                            found.append((min(count, end - at), flags))
                        at += count
                return 0

            while at < end:
                client.block_status(min(STATUS_LENGTH_MAX, end - at), at, collect)
            return found

        return await self._call(ask)

    async def close(self) -> None:
        """The kernel closes the connections, with the process."""


class PlainTarget:
    """endpoints.Target: a raw file, PATH.part until it is complete."""

    requests = 4
    is_zero = True

    def __init__(self, path: str, size: int, *, resume: bool) -> None:
        self.name = path
        self._part = f"{path}.part"
        flags = os.O_RDWR | (0 if resume else os.O_CREAT | os.O_TRUNC)
        self._descriptor = os.open(self._part, flags, 0o600)
        os.truncate(self._descriptor, size)
        self._pool = ThreadPool(path, "target", size_max=4)

    async def pwrite(self, offset: int, data: Data) -> None:
        """In a thread."""
        assert await self._pool.run(os.pwrite, self._descriptor, data, offset) == len(data)

    async def zero(self, offset: int, length: int) -> None:
        """Nobody asks: it is zero."""
        raise NotImplementedError

    async def pread(self, offset: int, length: int) -> Buffer:
        """In a thread."""
        return await self._pool.run(os.pread, self._descriptor, length, offset)

    async def flush(self) -> None:
        """In a thread."""
        await self._pool.run(os.fdatasync, self._descriptor)

    async def complete(self) -> None:
        """The final name."""
        await self.flush()
        os.rename(self._part, self.name)

    async def keep(self) -> None:
        """The kernel closes it."""

    async def discard(self) -> None:
        """It goes."""
        os.unlink(self._part)


async def open_source(uri: str, *, contexts: tuple[str, ...] = (), **_options: Any) -> Source:
    """As ``source.open_source``."""
    try:
        return PlainSource(uri, contexts)
    except nbd.Error as error:
        raise SourceLost(error.errnum or errno.EIO, str(error), uri) from error


class Qcow2Target:
    """A qcow2 file written through qemu-nbd."""

    requests = 4

    def __init__(self, path: str, size: int, backing: Any, *, resume: bool) -> None:
        self.name = path
        self.is_zero = backing is None
        self._part = f"{path}.part"
        if not resume:
            words = [] if backing is None else ["-b", backing.path, "-F", backing.format]
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", *words, self._part, str(size)],
                check=True,
            )
        sock = f"{self._part}.sock"
        self._process = subprocess.Popen(
            ["qemu-nbd", "-f", "qcow2", "-x", "", "-k", os.path.abspath(sock), "-t", self._part]
        )
        while True:
            self._client = nbd.NBD()
            try:
                self._client.connect_unix(os.path.abspath(sock))
                break
            except nbd.Error:
                time.sleep(0.01)
        self._sock = sock
        self._pool = ThreadPool(path, "target", size_max=1)

    async def pwrite(self, offset: int, data: Data) -> None:
        await self._pool.run(self._client.pwrite, bytes(data), offset)

    async def zero(self, offset: int, length: int) -> None:
        await self._pool.run(self._client.zero, length, offset)

    async def pread(self, offset: int, length: int) -> Buffer:
        return await self._pool.run(self._client.pread, length, offset)

    async def flush(self) -> None:
        await self._pool.run(self._client.flush)

    async def keep(self) -> None:
        self._client.shutdown()
        self._process.terminate()
        self._process.wait()
        with contextlib.suppress(OSError):
            os.unlink(self._sock)

    async def complete(self) -> None:
        await self.keep()
        os.rename(self._part, self.name)

    async def discard(self) -> None:
        await self.keep()
        os.unlink(self._part)


@dataclass(frozen=True)
class Backing:
    path: str
    format: str


async def open_target(
    text: str, size: int, *, resume: bool, backing: Any = None, **_options: Any
) -> Target:
    """As ``targets.open_target``."""
    if text.startswith("qcow2:"):
        return Qcow2Target(text[6:], size, backing, resume=resume)
    return PlainTarget(str(Path(text.removeprefix("raw:"))), size, resume=resume)
