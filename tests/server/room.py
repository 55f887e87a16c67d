"""A server in this process, its devices, and clients that speak the wire by themselves.

    async with room() as served:
        client = await served.client("vda")
        reply = await client.ask(wire.READ, 0, 4096)

The active image and each temp image are GatedDevices (tests/simulation/gated.py), so that a test
says when their calls end. Leaving the block lets all calls go and all clients vanish, and then
looks at what must be left: no connection, no task, no byte in a budget.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import Session, SessionOptions
from fleecenbd.server.connection import Connection
from fleecenbd.server.limits import ServerLimits
from fleecenbd.server.server import Server
from fleecenbd.storage.device import Device
from tests.nbd import wire
from tests.simulation.gated import GatedDevice

WAIT_S = 10.0
"""Seconds after which whatever is waited for has not come."""
TEST_S = 30.0
"""Seconds after which a test is taken to hang."""
SIZE = 64 << 10
MODES = (wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED)
CLUSTER = 4096


@functools.cache
def pattern(length: int) -> bytes:
    """Bytes without zeroes in which neighbouring places do not look alike."""
    return bytes((index * 7 + (index >> 8) * 13) % 255 + 1 for index in range(length))


def tight(**limits: Any) -> ServerLimits:
    """Limits under which the kernel holds little of what a client does not read."""
    return ServerLimits(**{"unix_send_buffer": 32 << 10, **limits})


class Client:
    """One connection, seen from the client's end. It reads only when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.mode = wire.SIMPLE
        self.export = wire.ExportSeen()
        self.contexts: dict[str, int] = {}
        self.replies = wire.ReplyReader(self.mode)
        self._socket = sock
        self._complete: list[wire.Reply] = []
        self._cookies = itertools.count(1)
        self._loop = asyncio.get_running_loop()

    # bytes

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._loop.sock_sendall(self._socket, data)

    async def receive(self, length_max: int = 1 << 20) -> bytes:
        """What has come; b"" at the end of the connection."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self._loop.sock_recv(self._socket, length_max)
            except ConnectionResetError:
                return b""

    async def receive_exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = await self.receive(length - len(data))
            assert piece, f"the server closed the connection after {data!r}"
            data += piece
        return data

    async def ended(self) -> bytes:
        """Everything up to the end of the connection, which the server makes."""
        data = b""
        while piece := await self.receive():
            data += piece
        return data

    def vanish(self) -> None:
        """The client dies: its kernel closes the socket."""
        self._socket.close()

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    @property
    def socket(self) -> socket.socket:
        return self._socket

    # the handshake

    async def greet(self, *, no_zeroes: bool = True) -> Client:
        wire.parse_greeting(await self.receive_exactly(18))
        await self.send(wire.client_flags(no_zeroes=no_zeroes))
        return self

    async def option(self, number: int, data: bytes = b"") -> list[wire.OptionReply]:
        """Ask, and take all replies up to the final one."""
        await self.send(wire.option(number, data))
        answer = b""
        while True:
            header = await self.receive_exactly(20)
            answer += header + await self.receive_exactly(int.from_bytes(header[16:], "big"))
            replies = wire.parse_option_replies(answer)
            if replies[-1].kind == wire.ACK or replies[-1].is_error:
                return replies

    async def try_go(
        self, name: str, mode: str = wire.SIMPLE, *contexts: str
    ) -> wire.OptionReply | None:
        """Enter an export; the error reply if that is refused."""
        if mode != wire.SIMPLE:
            (reply,) = await self.option(8 if mode == wire.STRUCTURED else 11)
            assert not reply.is_error, reply
            found = wire.parse_contexts(await self.option(10, wire.meta_data(name, *contexts)))
            self.contexts = {context: number for number, context in found}
        replies = await self.option(7, wire.info_data(name, 1, 2, 3))
        if replies[-1].is_error:
            return replies[-1]
        self.mode = mode
        self.export = wire.parse_infos(replies)
        self.replies = wire.ReplyReader(mode, data_max=64 << 20)
        return None

    # requests

    async def post(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> int:
        """Send a request; its cookie."""
        cookie, data = self.prepare(command, offset, length, flags=flags, payload=payload)
        await self.send(data)
        return cookie

    def prepare(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> tuple[int, bytes]:
        """(cookie, bytes) of a request whose reply will be understood; the caller sends it."""
        cookie = next(self._cookies)
        length = length or len(payload)
        self.replies.asked(
            command,
            cookie,
            offset,
            length,
            flags=flags,
            contexts=tuple(self.contexts.values()) if command == wire.BLOCK_STATUS else (),
        )
        extended = self.mode == wire.EXTENDED
        return cookie, wire.request(
            command, cookie, offset, length, flags=flags, payload=payload, extended=extended
        )

    async def reply(self) -> wire.Reply:
        """The next reply that is complete."""
        while not self._complete:
            data = await self.receive()
            assert data, "the server closed the connection"
            self._complete += self.replies.feed(data)
        return self._complete.pop(0)

    async def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> wire.Reply:
        """One request and its reply; nothing else may be in flight."""
        cookie = await self.post(command, offset, length, flags=flags, payload=payload)
        reply = await self.reply()
        assert reply.cookie == cookie
        return reply

    async def read(self, offset: int, length: int) -> bytes:
        reply = await self.ask(wire.READ, offset, length)
        assert reply.error == 0, reply
        assert reply.data is not None
        return reply.data

    async def write(self, offset: int, payload: bytes, *, flags: int = 0) -> None:
        reply = await self.ask(wire.WRITE, offset, payload=payload, flags=flags)
        assert reply.error == 0, reply

    def is_quiet(self) -> bool:
        """There is nothing to read now, and the connection is open."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._complete
        return False


class Room:
    """A server, its devices, and the clients that came."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.devices: dict[str, GatedDevice] = {}
        """Active images by disk, temp images by DISK@SESSION."""
        self.clients: list[Client] = []
        self._directory = directory
        self._backlog = 200

    # what is served

    def add_disk(self, name: str, size: int = SIZE, content: bytes | None = None) -> GatedDevice:
        device = GatedDevice(name, size, pattern(size) if content is None else content)
        self.devices[name] = device
        self.server.add_disk(Disk(name, device))
        return device

    async def begin(
        self,
        name: str = "n",
        disks: Sequence[str] | None = None,
        options: SessionOptions | None = None,
    ) -> Session:
        async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
            key = f"{disk.name}@{name}"
            size = -(-disk.size // cluster_size) * cluster_size
            self.devices[key] = GatedDevice(key, size)
            return self.devices[key]

        return await self.server.begin(name, disks, options or SessionOptions(), make_temp)

    def listen(self, name: str = "s", *, backup_only: bool = False) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self._directory / name))
        sock.listen(self._backlog)
        self.server.listen(sock, backup_only=backup_only)

    # clients

    def dial(self, listener: str = "s") -> Client:
        """Connected, and nothing said yet."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(str(self._directory / listener))
        return self.adopt(sock)

    def adopt(self, sock: socket.socket) -> Client:
        """A client on a socket that is connected, and does not block."""
        client = Client(sock)
        self.clients.append(client)
        return client

    async def connect(self, listener: str = "s") -> Client:
        """Connected, and in the middle of the handshake."""
        return await self.dial(listener).greet()

    async def client(
        self, export: str, mode: str = wire.STRUCTURED, *contexts: str, listener: str = "s"
    ) -> Client:
        """Past the handshake."""
        client = await self.connect(listener)
        refused = await client.try_go(export, mode, *contexts)
        assert refused is None, refused
        return client

    def connection(self, export: str, index: int = 0) -> Connection:
        """The server's end of a client's connection, by age."""
        return self.server.clients.of(self.server.exports[export])[index]

    async def gone(self, connections: Sequence[Connection] | None = None) -> None:
        """Return when these connections (all, if none are given) have gone."""
        if connections is None:
            connections = list(self.server.clients.connections)
        async with asyncio.timeout(WAIT_S):
            for connection in connections:
                await connection.closed()

    async def settled(self) -> None:
        """Return when the server has seen all that was sent: a stranger has come and gone."""
        stranger = await self.connect()
        (reply,) = await stranger.option(2)
        assert reply.kind == wire.ACK
        assert await stranger.ended() == b""
        self.clients.remove(stranger)
        stranger.vanish()

    @property
    def charged(self) -> tuple[int, int]:
        """Bytes in the guests' budget, and in the fleecing exports'."""
        clients = self.server.clients
        return clients._guest_budget.taken, clients._fleecing_budget.taken

    # the end

    async def close(self, tasks_before: set[asyncio.Task[object]]) -> None:
        for device in self.devices.values():
            device.open()
        for client in self.clients:
            client.vanish()
        await self.gone()
        await self.tasks_ended(tasks_before)
        assert self.charged == (0, 0)
        for budget in (self.server.clients._guest_budget, self.server.clients._fleecing_budget):
            assert not budget._waiting
        assert not self.server.clients.connections
        self.server.abort()

    async def tasks_ended(self, before: set[asyncio.Task[object]]) -> None:
        async with asyncio.timeout(WAIT_S):
            while tasks := asyncio.all_tasks() - before:
                await asyncio.wait(tasks)


@asynccontextmanager
async def room(
    *,
    limits: ServerLimits | None = None,
    shared: int = 1,
    read_only: bool = False,
    default_export: str | None = None,
    disks: Sequence[str] = ("vda",),
    session: str | None = None,
    size: int = SIZE,
    content: bytes | None = None,
    options: SessionOptions | None = None,
) -> AsyncIterator[Room]:
    """A server on a Unix socket, with disks of ``content``, and a session if one is named.

    ``content`` None: ``pattern(size)``.
    """
    before = asyncio.all_tasks()
    failures: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: failures.append(context))
    with tempfile.TemporaryDirectory() as directory:
        server = Server(
            limits=limits, shared=shared, read_only=read_only, default_export=default_export
        )
        served = Room(server, Path(directory))
        try:
            for name in disks:
                served.add_disk(name, size, content)
            served.listen()
            if session is not None:
                await served.begin(session, options=options)
            async with asyncio.timeout(TEST_S):
                yield served
            await served.close(before)
        finally:
            for client in served.clients:
                client.vanish()
            server.abort()
            loop.set_exception_handler(None)
    assert not failures, failures
