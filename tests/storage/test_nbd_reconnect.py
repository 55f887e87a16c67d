"""NbdClient when connections are lost: what is asked again, where, and when it is given up."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from fleecenbd.storage import nbd_connections
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.nbd_errors import NbdLost
from fleecenbd.storage.nbd_handshake import NbdFacts
from tests.storage.scripted_nbd import (
    ALLOCATION,
    ERR_SHUTDOWN,
    ERR_UNKNOWN,
    FLUSH,
    READ,
    WRITE,
    Connection,
    Request,
    scripted,
)

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the back-off."""
    monkeypatch.setattr(nbd_connections, "RETRY_FIRST_S", 0.001)
    monkeypatch.setattr(nbd_connections, "RETRY_MAX_S", 0.006)


class Told(list[str]):
    """Lines for the user, which can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._came = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.append(line)
        self._came.set()

    async def has(self, text: str) -> None:
        """Wait for a line with this text."""
        while not any(text in line for line in self):
            self._came.clear()
            await self._came.wait()


async def close(client: NbdClient) -> None:
    client.close()
    await client.wait_closed()


# -- asked again -----------------------------------------------------------------------------------


async def test_what_got_no_reply_is_asked_again(tmp_path: Path) -> None:
    told = Told()

    async def answer(connection: Connection, request: Request) -> None:
        if server.accepted > 1:
            await server.usual(connection, request)
        elif len(server.requests) == 7:
            connection.drop()

    async with scripted(tmp_path) as server:
        server.answer = answer
        server.disk[:] = bytes(index % 241 for index in range(MIB))
        client = await NbdClient.open(server.uri, contexts=[ALLOCATION], tell=told)
        connected: list[int] = []
        client.when_connected(lambda: connected.append(len(told)))
        data = b"abc" * 1000
        results = await asyncio.gather(
            *(client.pread(at * 1000, 1000) for at in range(3)),
            client.block_status(ALLOCATION, 0, MIB),
            client.trim(MIB - 512, 512),
            client.zero(MIB - 1024, 512),
            client.pwrite(4096, data),
        )
        assert results[:3] == [server.disk[at : at + 1000] for at in (0, 1000, 2000)]
        assert results[3] == [(MIB, 0)]
        assert server.disk[4096:7096] == data
        assert server.disk[-1024:] == bytes(1024)
        assert client.generation == 1
        assert len(told) == 1
        assert connected
        assert set(connected) == {1}, "after the attempt"
        assert told[0].startswith(f"{server.uri}: ")
        assert told[0].endswith("; connecting again in 0.001 s (attempt 1 of 5)")
        await close(client)


@asynccontextmanager
async def cutting(server_path: Path, path: Path, *, seed: int) -> AsyncIterator[list[int]]:
    """A proxy that cuts each connection after some bytes from the server; a list of how many."""
    dice = random.Random(seed)
    cuts = list[int]()
    tasks = set[asyncio.Task[None]]()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        while data := await reader.read(64 * KIB):
            if budget is not None:
                data, budget = data[:budget], budget - len(data)
            writer.write(data)
            await writer.drain()
            if budget is not None and budget <= 0:
                return

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(server_path)
        cuts.append(dice.randint(1, 600 * KIB))
        both = {
            asyncio.create_task(pump(reader, to_writer, None)),
            asyncio.create_task(pump(to_reader, writer, cuts[-1])),
        }
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in both:
                each.cancel()
            await asyncio.wait(both)
            to_writer.close()
            writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(ConnectionError, asyncio.CancelledError):
            await carry(reader, writer)
        tasks.discard(task)

    listener = await asyncio.start_unix_server(take, path)
    try:
        yield cuts
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        while tasks:
            await asyncio.wait(tasks)


@pytest.mark.parametrize("seed", range(3))
async def test_everything_is_read_right_through_a_line_that_breaks(
    tmp_path: Path, seed: int
) -> None:
    async with (
        scripted(tmp_path, 4 * MIB) as server,
        cutting(server.path, tmp_path / "cut", seed=seed) as cuts,
    ):
        server.disk[:] = random.Random(seed).randbytes(len(server.disk))
        uri = server.uri.replace("s.sock", "cut")
        retries = 1000  # that many times the handshake may be cut
        client = await NbdClient.open(uri, connections=2, retries=retries)
        read = await asyncio.gather(
            *(client.pread(at, 32 * KIB) for at in range(0, 4 * MIB, 32 * KIB))
        )
        assert b"".join(read) == server.disk
        assert client.generation >= 4
        assert len(cuts) > 6
        await close(client)


async def test_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    told = Told()
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, connections=2, tell=told)
        await server.stop()
        reads = [asyncio.create_task(client.pread(at, 512)) for at in range(0, 4096, 512)]
        await told.has("attempt 3 of 5")
        await server.start()
        assert await asyncio.gather(*reads) == [bytes(512)] * 8
        assert client.generation == 2
        assert client.connections == 2
        assert [line.rpartition("again in ")[2] for line in told[:3]] == [
            "0.001 s (attempt 1 of 5)",
            "0.002 s (attempt 2 of 5)",
            "0.004 s (attempt 3 of 5)",
        ]
        assert "no such socket" in told[1]
        await close(client)


async def test_a_server_that_answers_now_and_then_is_not_given_up(tmp_path: Path) -> None:
    """Attempts count in a row: a reply in between begins the count anew."""
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, connections=2, retries=2)
        for _ in range(20):
            for connection in list(server.connections):
                connection.drop()
            assert await client.pread(0, 512) == bytes(512)
        await close(client)


async def test_an_idle_connection_that_breaks_is_made_anew_at_once(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri)
        server.connections[0].drop()
        await server.taken(2)
        assert client.generation == 1
        assert await client.pread(0, 512) == bytes(512)
        assert server.accepted == 2
        await close(client)


async def test_others_carry_on_when_one_connection_breaks(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if connection is first:
            connection.drop()
        else:
            await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, connections=3)
        first = server.connections[0]
        read = await asyncio.gather(*(client.pread(at, 512) for at in range(0, 8192, 512)))
        assert read == [bytes(512)] * 16
        assert first not in server.connections
        await server.taken(4)
        assert client.generation == 1
        await close(client)


async def test_a_server_that_is_shutting_down_is_a_lost_connection(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if server.accepted == 1:
            server.refusal = ERR_SHUTDOWN, "in a moment"
            connection.error(request, errno.ESHUTDOWN)
        else:
            await server.usual(connection, request)

    def tell(line: str) -> None:
        told(line)
        if "in a moment" in line:
            server.refusal = None

    told = Told()
    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, tell=tell)
        assert await client.pread(0, 512) == bytes(512)
        assert "shutting down" in told[0]
        assert "in a moment" in told[1]
        assert len(told) == 2
        await close(client)


# -- given up --------------------------------------------------------------------------------------


async def test_a_server_that_stays_away_is_given_up(tmp_path: Path) -> None:
    told = Told()
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, retries=3, tell=told)
        await server.stop()
        results = await asyncio.gather(
            client.pread(0, 512), client.pread(0, 512), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, NbdLost)
            assert "no such socket" in result.strerror
            assert "failed 3 times" in result.strerror
        assert results[0] is not results[1]
        assert len(told) == 3
        with pytest.raises(NbdLost):
            await client.pread(0, 512)
        await server.start()
        with pytest.raises(NbdLost):  # for good
            await client.pread(0, 512)
        await close(client)


async def test_nothing_is_tried_again_with_no_retries(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, retries=0)
        server.connections[0].drop()
        with pytest.raises(NbdLost, match="the connection is lost: "):
            await client.pread(0, 512)
        assert server.accepted == 1
        await close(client)


async def test_a_server_that_dies_of_every_request_is_given_up(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        connection.drop()

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, connections=2, retries=4)
        with pytest.raises(NbdLost, match="the connection is lost"):
            await client.pread(0, 512)
        # Each connection counts for itself, and the other goes with the first that gives up.
        assert 2 + 4 <= server.accepted <= 2 + 2 * 4
        await close(client)


async def test_a_request_that_the_server_dies_of_is_given_up_alone(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if request.offset == 4096:
            answered.clear()
            await answered.wait()
            connection.drop()
        else:
            await server.usual(connection, request)
            answered.set()

    answered = asyncio.Event()
    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, retries=2)
        bad = asyncio.create_task(client.pread(4096, 512))
        while not bad.done():
            assert await client.pread(0, 512) == bytes(512)
        with pytest.raises(OSError, match="lost 13 times over one request") as caught:
            await bad
        assert not isinstance(caught.value, NbdLost)
        assert caught.value.errno == errno.EIO
        await close(client)


async def test_an_export_that_is_over_is_given_up_at_once(tmp_path: Path) -> None:
    told = Told()
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, tell=told)
        server.refusal = ERR_UNKNOWN, "session n is finished"
        server.connections[0].drop()
        with pytest.raises(NbdLost, match="session n is finished"):
            await client.pread(0, 512)
        assert len(told) == 1
        await close(client)


@pytest.mark.parametrize("what", ["size", "contexts", "accept"])
async def test_what_answers_there_must_be_the_same(tmp_path: Path, what: str) -> None:
    def accept(facts: NbdFacts) -> None:
        if facts.description == "another":
            raise NbdLost(errno.ESTALE, "another one", "it")

    async with scripted(tmp_path) as server:
        client = await NbdClient.open(
            server.uri, contexts=[ALLOCATION], accept=accept, connections=2
        )
        text = "another one"
        if what == "size":
            server.size, text = MIB // 2, f"it has {MIB // 2} bytes, and not {MIB}"
        elif what == "contexts":
            server.contexts, text = (), "knows nothing of base:allocation"
        else:
            server.description = "another"
        for connection in list(server.connections):
            connection.drop()
        with pytest.raises(NbdLost, match=text):
            await client.pread(0, 512)
        assert server.requests == []
        await close(client)


async def test_every_connection_must_lead_to_the_same(tmp_path: Path) -> None:
    """The export may be replaced while the first connections are made."""

    def accept(facts: NbdFacts) -> None:
        if server.accepted == 2:
            raise NbdLost(errno.ESTALE, "another one", "it")

    async with scripted(tmp_path) as server:
        with pytest.raises(NbdLost, match="another one"):
            await NbdClient.open(server.uri, connections=3, accept=accept)
        assert server.accepted == 2


async def test_a_server_that_takes_no_more_connections_gets_no_more(tmp_path: Path) -> None:
    told = Told()

    def accept(facts: NbdFacts) -> None:
        if server.accepted == 2:
            server.refusal = ERR_SHUTDOWN, "too many clients"

    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, connections=4, accept=accept, tell=told)
        assert client.connections == 2
        assert len(told) == 1
        assert told[0].startswith(f"{server.uri}: no more connections than 2: ")
        assert told[0].endswith("too many clients")
        first = server.connections[0]
        first.drop()
        await told.has("no more connections than 1")
        assert client.connections == 1
        assert await client.pread(0, 512) == bytes(512)
        await close(client)


# -- what was written ------------------------------------------------------------------------------


async def test_a_lost_connection_is_counted_before_a_flush_ends(tmp_path: Path) -> None:
    """Else the owner would believe durable what the old server took with it."""
    flushes = list[int]()

    async def answer(connection: Connection, request: Request) -> None:
        if request.kind == FLUSH:
            flushes.append(server.accepted)
            if server.accepted == 1:
                connection.drop()
                return
        await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        generation = client.generation
        await client.pwrite(0, b"abc")
        assert client.generation == generation
        await client.flush()
        assert client.generation == generation + 1
        assert flushes == [1, 2]
        await close(client)


# -- closing ---------------------------------------------------------------------------------------


async def test_closing_ends_the_waiting_for_a_server(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, retries=1000)
        await server.stop()
        read = asyncio.create_task(client.pread(0, 512))
        await asyncio.sleep(0.01)
        client.close()
        await client.wait_closed()
        with pytest.raises(OSError, match="closed"):
            await read


async def test_closing_is_not_kept_waiting_by_a_connection_that_breaks(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if request.kind == READ:
            connection.drop()

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        write = asyncio.create_task(client.pwrite(0, b"abc"))
        await server.seen(1)
        client.close()
        await asyncio.sleep(0)
        server.connections[0].drop()
        await client.wait_closed()
        with pytest.raises(OSError, match="closed"):
            await write
        assert {request.kind for request in server.requests} == {WRITE}
