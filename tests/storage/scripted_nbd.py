"""An NBD server on the test's own loop, that does what the test says: for what no server does.

    async with scripted(tmp_path) as server:
        server.answer = my_answer            # async (connection, request) -> None
        client = await NbdClient.open(server.uri)

By itself it is a disk in memory. It knows structured replies and meta contexts, and refuses
extended headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from struct import pack, unpack

READ, WRITE, DISC, FLUSH, TRIM, _, WRITE_ZEROES, BLOCK_STATUS = range(8)
NO_HOLE, FAST_ZERO = 2, 16

ACK, INFO, META_CONTEXT = 1, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = (
    1 << 31 | number for number in (1, 2, 5, 6, 7)
)

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, _, SEND_TRIM, SEND_ZEROES, _, MULTI_CONN = (
    1 << bit for bit in range(9)
)
SEND_FAST_ZERO = 1 << 11
EVERYTHING = HAS_FLAGS | SEND_FLUSH | SEND_TRIM | SEND_ZEROES | SEND_FAST_ZERO | MULTI_CONN
ALLOCATION = "base:allocation"


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


class Connection:
    """One client. What is written may be cut anywhere, by ``drop``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.is_entered = False
        """The handshake is over."""

    def chunk(self, request: Request, kind: int, payload: bytes, *, done: bool = True) -> None:
        """A chunk of a structured reply."""
        self.writer.write(
            pack(">IHHQI", 0x668E33EF, done, kind, request.cookie, len(payload)) + payload
        )

    def ok(self, request: Request) -> None:
        """It is done."""
        self.chunk(request, 0, b"")

    def data(self, request: Request, data: bytes, offset: int | None = None) -> None:
        """The answer to a READ, or what there is of it."""
        self.chunk(request, 1, pack(">Q", request.offset if offset is None else offset) + data)

    def status(self, request: Request, *extents: tuple[int, int], last: bool = True) -> None:
        """The answer to a BLOCK_STATUS: lengths and flags of context 1."""
        payload = pack(">I", 1) + b"".join(pack(">II", *extent) for extent in extents)
        self.chunk(request, 5, payload, done=last)

    def error(self, request: Request, number: int, text: str = "") -> None:
        """An error, with a text of the server's own."""
        raw = text.encode()
        self.chunk(request, 0x8001, pack(">IH", number, len(raw)) + raw)

    def drop(self) -> None:
        """The connection breaks."""
        self.writer.transport.abort()


class ScriptedServer:
    """Everything may be changed at any time."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.disk = bytearray(size)
        self.size = size
        self.flags = EVERYTHING
        self.description = ""
        self.contexts = (ALLOCATION,)
        self.block_sizes: tuple[int, int, int] | None = None
        self.structured = True
        self.refusal: tuple[int, str] | None = None
        """What NBD_OPT_GO is answered with."""
        self.answer: Callable[[Connection, Request], Awaitable[None]] = self.usual
        self.is_deaf = False
        """Nothing is read behind the handshake."""
        self.connections: list[Connection] = []
        """Those that are open."""
        self.accepted = 0
        self.requests: list[Request] = []
        self.changed = asyncio.Event()
        """Set by each connection that comes, enters or goes, and by each request."""
        self.said_goodbye = 0
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.path}"

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """Vanish: nobody listens, and connections break."""
        assert self._server is not None
        self._server.close()
        self._server = None
        self.path.unlink(missing_ok=True)
        for connection in self.connections:
            connection.drop()
        while self.connections:
            await self.change()

    async def close(self) -> None:
        if self._server is not None:
            await self.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def seen(self, count: int) -> None:
        """Wait until so many requests have come, over all connections."""
        while len(self.requests) < count:
            await self.change()

    async def taken(self, count: int) -> None:
        """Wait until so many connections have been made."""
        while self.accepted < count:
            await self.change()

    async def change(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    async def usual(self, connection: Connection, request: Request) -> None:
        """A disk in memory, all of it data."""
        end = request.offset + request.length
        match request.kind:
            case 0:
                connection.data(request, bytes(self.disk[request.offset : end]))
            case 1:
                self.disk[request.offset : end] = request.data
                connection.ok(request)
            case 4 | 6:
                self.disk[request.offset : end] = bytes(request.length)
                connection.ok(request)
            case 7:
                connection.status(request, (request.length, 0))
            case _:
                connection.ok(request)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self.accepted += 1
        self.connections.append(connection)
        self.changed.set()
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                if await self._negotiate(connection):
                    connection.is_entered = True
                    self.changed.set()
                    await self._transmit(connection)
        finally:
            self.connections.remove(connection)
            self.changed.set()
            writer.close()

    async def _negotiate(self, connection: Connection) -> bool:
        reader, writer = connection.reader, connection.writer
        writer.write(b"NBDMAGICIHAVEOPT" + pack(">H", 3))
        await reader.readexactly(4)
        while True:
            _magic, option, length = unpack(">8sII", await reader.readexactly(16))
            data = await reader.readexactly(length)

            def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                magic = 0x3E889045565A9
                writer.write(pack(">QIII", magic, option, kind, len(payload)) + payload)

            if self.refusal is not None and option != 2 and not self.structured:
                reply(*self.refusal_reply())
            elif option == 8 and self.structured:
                reply(ACK)
            elif option == 10:
                for number, name in enumerate(self.contexts, 1):
                    if name.encode() in data:
                        reply(META_CONTEXT, pack(">I", number) + name.encode())
                reply(ACK)
            elif option == 7:
                if self.refusal is not None:
                    reply(*self.refusal_reply())
                    continue
                reply(INFO, pack(">HQH", 0, self.size, self.flags))
                if self.description:
                    reply(INFO, pack(">H", 2) + self.description.encode())
                if self.block_sizes is not None:
                    reply(INFO, pack(">HIII", 3, *self.block_sizes))
                reply(ACK)
                return True
            elif option == 2:
                reply(ACK)
                return False
            else:
                reply(ERR_UNSUP)

    def refusal_reply(self) -> tuple[int, bytes]:
        assert self.refusal is not None
        return self.refusal[0], self.refusal[1].encode()

    async def _transmit(self, connection: Connection) -> None:
        reader = connection.reader
        while True:
            if self.is_deaf:
                await asyncio.Event().wait()
            header = await reader.readexactly(28)
            _magic, flags, kind, cookie, offset, length = unpack(">IHHQQI", header)
            if kind == DISC:
                self.said_goodbye += 1
                return
            data = await reader.readexactly(length) if kind == WRITE else b""
            request = Request(kind, flags, cookie, offset, length, data)
            task = asyncio.create_task(self._answer(connection, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: Connection, request: Request) -> None:
        self.requests.append(request)
        self.changed.set()
        await self.answer(connection, request)


@asynccontextmanager
async def scripted(directory: Path, size: int = 1 << 20) -> AsyncIterator[ScriptedServer]:
    """A server that listens on ``s.sock`` in the directory."""
    server = ScriptedServer(directory / "s.sock", size)
    await server.start()
    try:
        yield server
    finally:
        await server.close()
