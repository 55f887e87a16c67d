"""NbdClient as long as no connection is lost: every call, every limit, every error."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from fleecenbd.storage import nbd_connections, nbd_handshake
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.nbd_connection import BYTES_MAX, REQUESTS_MAX
from fleecenbd.storage.nbd_errors import NbdErrorReply, NbdRefused
from tests.storage.scripted_nbd import (
    ALLOCATION,
    BLOCK_STATUS,
    ERR_POLICY,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    EVERYTHING,
    FAST_ZERO,
    FLUSH,
    HAS_FLAGS,
    MULTI_CONN,
    NO_HOLE,
    READ,
    READ_ONLY,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Connection,
    Request,
    scripted,
)

KIB, MIB = 1 << 10, 1 << 20


async def close(client: NbdClient) -> None:
    client.close()
    await client.wait_closed()


# -- calls -----------------------------------------------------------------------------------------


async def test_what_is_written_is_read(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri)
        await client.pwrite(4096, b"abc" * 1000)
        data = await client.pread(4095, 3002)
        assert isinstance(data, bytearray)
        assert data == b"\0" + b"abc" * 1000 + b"\0"
        await client.zero(4096, 1500)
        await client.trim(5596, 600)
        await client.flush()
        assert await client.pread(4096, 3000) == bytes(2100) + b"abc" * 300
        assert await client.pread(7, 0) == b""
        await client.pwrite(7, b"")
        await close(client)
        assert server.said_goodbye == 1
    assert {request.length for request in server.requests} == {3000, 3002, 1500, 600, 0}


async def test_the_facts_are_the_servers(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        server.description = "a disk"
        server.block_sizes = 512, 8192, MIB
        client = await NbdClient.open(server.uri, contexts=[ALLOCATION, "x-other:thing"])
        facts = client.facts
        assert facts.description == "a disk"
        assert facts.size == client.size == MIB
        assert (facts.block_size_min, facts.block_size_preferred) == (512, 8192)
        assert facts.payload_max == MIB
        assert facts.contexts == {ALLOCATION}
        assert facts.can_trim
        assert facts.can_multi_conn
        assert not facts.is_read_only
        await close(client)
        server.flags = HAS_FLAGS | READ_ONLY
        client = await NbdClient.open(server.uri)
        assert client.facts.is_read_only
        assert not client.facts.can_trim
        assert client.facts.contexts == frozenset()
        await close(client)


async def test_long_ranges_are_asked_for_in_pieces(tmp_path: Path) -> None:
    async with scripted(tmp_path, MIB) as server:
        server.block_sizes = 1, 4096, 65536
        client = await NbdClient.open(server.uri)
        data = bytes(index * 7 % 251 for index in range(300_000))
        await client.pwrite(100, data)
        assert await client.pread(100, 300_000) == data
        assert max(request.length for request in server.requests) == 65536
        assert {request.kind for request in server.requests} == {READ, WRITE}
        await close(client)


async def test_blocks_are_read_whole_and_discarded_whole(tmp_path: Path) -> None:
    async with scripted(tmp_path, MIB) as server:
        server.block_sizes = 4096, 4096, 65536
        server.disk[:] = bytes(index % 253 for index in range(MIB))
        client = await NbdClient.open(server.uri, contexts=[ALLOCATION])
        assert await client.pread(5000, 3) == server.disk[5000:5003]
        assert await client.pread(MIB - 10, 10) == server.disk[-10:]
        assert await client.pread(4000, 200_000) == server.disk[4000:204_000]
        assert await client.block_status(ALLOCATION, 5000, 9000) == [(9000, 0)]
        await client.trim(5000, 9000)
        await client.trim(5000, 3000)
        trims = [request for request in server.requests if request.kind == TRIM]
        assert [(request.offset, request.length) for request in trims] == [(8192, 4096)]
        assert all((r.offset | r.length) % 4096 == 0 for r in server.requests)
        with pytest.raises(OSError, match="unaligned") as caught:
            await client.pwrite(5000, b"x")
        assert caught.value.errno == errno.EINVAL
        await close(client)


async def test_zeroes_are_made_as_the_server_can(tmp_path: Path) -> None:
    async with scripted(tmp_path, 3 * MIB) as server:
        client = await NbdClient.open(server.uri)
        await client.zero(0, 4096)
        await client.zero(0, 4096, may_trim=False)
        await client.zero(0, 4096, fast=True)
        assert [(r.kind, r.flags) for r in server.requests] == [
            (WRITE_ZEROES, 0),
            (WRITE_ZEROES, NO_HOLE),
            (WRITE_ZEROES, FAST_ZERO),
        ]
        await close(client)

        server.flags = HAS_FLAGS | MULTI_CONN
        server.requests.clear()
        server.disk[:] = b"x" * len(server.disk)
        client = await NbdClient.open(server.uri)
        with pytest.raises(OSError, match="faster") as caught:
            await client.zero(0, 4096, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        await client.zero(1, 3 * MIB - 2)
        assert server.disk == b"x" + bytes(3 * MIB - 2) + b"x"
        assert {request.kind for request in server.requests} == {WRITE}
        server.requests.clear()
        await client.trim(0, MIB)
        await client.flush()
        assert server.requests == []  # neither is offered
        await close(client)


async def test_block_status_is_asked_for_until_all_is_covered(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if request.offset < 3 << 16:
            connection.status(request, (1 << 15, 3), (1 << 15, request.offset >> 16 & 1))
        else:
            connection.status(request, (request.length + 512, 0))

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, contexts=[ALLOCATION])
        found = await client.block_status(ALLOCATION, 100, 1 << 19)
        assert found == [
            (1 << 15, 3),
            (1 << 15, 0),
            (1 << 15, 3),
            (1 << 15, 1),
            (1 << 15, 3),
            ((1 << 19) - 5 * (1 << 15), 0),
        ]
        assert {request.kind for request in server.requests} == {BLOCK_STATUS}
        with pytest.raises(OSError, match="says nothing of x-other:thing"):
            await client.block_status("x-other:thing", 0, 512)
        await close(client)


# -- errors ----------------------------------------------------------------------------------------


async def test_a_failed_request_fails_alone(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if request.kind == READ and request.offset == 8192:
            connection.error(request, errno.EIO, "not these")
        else:
            await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        results = await asyncio.gather(
            *(client.pread(at, 4096) for at in range(0, 16384, 4096)), return_exceptions=True
        )
        assert [isinstance(result, OSError) for result in results] == [False, False, True, False]
        assert isinstance(results[2], NbdErrorReply)
        assert results[2].errno == errno.EIO
        assert results[2].filename == server.uri
        server.block_sizes = 1, 4096, 4096
        await close(client)
        client = await NbdClient.open(server.uri)
        with pytest.raises(NbdErrorReply):  # one of its pieces
            await client.pread(0, 16384)
        assert client.generation == 0
        await close(client)


async def test_what_libnbd_refuses_to_send_fails_alone(tmp_path: Path) -> None:
    async with scripted(tmp_path) as server:
        server.flags = EVERYTHING | READ_ONLY
        client = await NbdClient.open(server.uri)
        for offset, length in ((MIB, 1), (MIB - 1, 2), (0, MIB + 1)):
            with pytest.raises(OSError, match="out of bounds") as caught:
                await client.pread(offset, length)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="does not support write operations") as caught:
            await client.pwrite(0, b"x")
        assert caught.value.errno == errno.EPERM
        assert server.requests == []
        assert await client.pread(0, 1) == b"\0"
        await close(client)


async def test_a_read_that_is_answered_in_part_is_an_error(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        connection.data(request, b"x" * (request.length - 1))

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        with pytest.raises(OSError, match="error") as caught:
            await client.pread(0, 4096)
        assert caught.value.errno in (errno.EIO, errno.EPROTO)  # libnbd 1.14, 1.22
        await close(client)


async def test_what_fails_is_asked_once_more_for_the_servers_words(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        connection.error(request, errno.EIO, f"the disk at {request.offset} is gone")

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, contexts=[ALLOCATION], explains=True)
        results = await asyncio.gather(
            *(client.pread(at, 512) for at in range(0, 4096, 512)),
            client.trim(512, 512),
            client.block_status(ALLOCATION, 1024, 512),
            return_exceptions=True,
        )
        texts = [result.strerror for result in results if isinstance(result, NbdErrorReply)]
        places = [*range(0, 4096, 512), 512, 1024]
        assert texts == [f"the disk at {at} is gone" for at in places]
        assert server.accepted == 2  # one asks for all
        await close(client)
        assert not server.connections


async def test_what_goes_well_when_it_is_asked_once_more_went_well(tmp_path: Path) -> None:
    told = list[str]()

    async def answer(connection: Connection, request: Request) -> None:
        if len(server.requests) == 1:
            connection.error(request, errno.ENOSPC)
        else:
            await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, explains=True, tell=told.append)
        await client.pwrite(0, b"abc")
        assert server.disk[:3] == b"abc"
        assert told == [f"{server.uri}: {os.strerror(errno.ENOSPC)}; asked once more, it went well"]
        await close(client)
        # A flush on one connection would not cover what was written on the other.
        server.flags &= ~MULTI_CONN
        server.requests.clear()
        client = await NbdClient.open(server.uri, explains=True)
        with pytest.raises(NbdErrorReply):
            await client.pwrite(0, b"abc")
        await close(client)


async def test_what_cannot_be_asked_again_fails_as_it_did(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if len(server.requests) == 2:
            connection.drop()
        else:
            connection.error(request, errno.EIO)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, explains=True)
        with pytest.raises(NbdErrorReply, match=os.strerror(errno.EIO)):
            await client.pread(0, 512)  # its second connection breaks
        server.refusal = ERR_UNKNOWN, "gone"
        with pytest.raises(NbdErrorReply, match=os.strerror(errno.EIO)):
            await client.pread(0, 512)  # there is no second connection
        assert client.generation == 0
        await close(client)


@pytest.mark.parametrize("ending", ["cancelled", "closed", "closed early"])
async def test_asking_once_more_ends_with_the_call(tmp_path: Path, ending: str) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if len(server.requests) == 1:
            connection.error(request, errno.EIO)
        elif request.offset == 512:
            connection.error(request, errno.EIO, "words")

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, explains=True)
        read = asyncio.create_task(client.pread(0, 512))
        if ending == "closed early":
            await server.taken(2)  # it is not asked on that connection yet
            await close(client)
        else:
            await server.seen(2)
        if ending == "cancelled":
            read.cancel()
            with pytest.raises(asyncio.CancelledError):
                await read
            with pytest.raises(NbdErrorReply, match="words"):
                await client.pread(512, 512)
            assert server.accepted == 3  # a late answer cannot be taken for this one's
        await close(client)
        await asyncio.wait({read})
        assert ending == "cancelled" or isinstance(read.exception(), OSError)


once = pytest.mark.asyncio(loop_factories=["uvloop"])
"""What is the same on every loop."""


# -- connecting ------------------------------------------------------------------------------------


@once
async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is the server running"):
        await NbdClient.open(f"nbd+unix:///x?socket={tmp_path}/none")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/left")
    for uri in (f"nbd+unix:///x?socket={tmp_path}/left", "nbd://127.0.0.1:1/x"):
        with pytest.raises(ConnectionRefusedError, match="is the server running") as caught:
            await NbdClient.open(uri)
        assert caught.value.filename == uri


@once
@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("ftp://host/x", "unknown NBD URI scheme: ftp"),
        ("nbd+unix:///x", "socket"),
        ("nbd://no.such.host.invalid/x", "no.such.host.invalid"),
        ("nbd+unix:///?socket=/dev/null/s", "connect: Not a directory"),
    ],
)
async def test_a_uri_that_leads_nowhere_is_named(uri: str, text: str) -> None:
    with pytest.raises(OSError, match=text) as caught:
        await NbdClient.open(uri)
    assert caught.value.filename == uri


@once
@pytest.mark.parametrize(
    ("refusal", "structured", "text"),
    [
        ((ERR_UNKNOWN, "session n is finished"), True, "session n is finished"),
        ((ERR_UNKNOWN, ""), True, "no export"),
        ((ERR_POLICY, "for backups only"), True, "for backups only"),
        ((ERR_TLS_REQD, ""), False, "the server wants TLS: connect by nbds://"),
        ((ERR_TLS_REQD, "speak TLS"), False, r"wants TLS.*\(.*speak TLS\)"),
    ],
)
async def test_a_refusal_is_told_in_the_servers_words(
    tmp_path: Path, refusal: tuple[int, str], structured: bool, text: str
) -> None:
    async with scripted(tmp_path) as server:
        server.refusal, server.structured = refusal, structured
        with pytest.raises(NbdRefused, match=text) as caught:
            await NbdClient.open(server.uri, contexts=[ALLOCATION])
        assert caught.value.filename == server.uri


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
async def test_a_disk_that_no_number_is_large_enough_for_is_refused(
    tmp_path: Path, size: int
) -> None:
    async with scripted(tmp_path) as server:
        server.size = size
        with pytest.raises(NbdRefused, match="8 EiB or more") as caught:
            await NbdClient.open(server.uri)
        assert caught.value.filename == server.uri


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
async def test_a_peer_that_speaks_no_nbd_is_told(tmp_path: Path, greeting: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "s"):
        with pytest.raises(
            OSError, match="speaks no NBD" if greeting else "disconnected"
        ) as caught:
            await NbdClient.open(f"nbd+unix:///?socket={tmp_path}/s")
        assert isinstance(caught.value, NbdRefused) == bool(greeting)


async def test_a_server_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_handshake, "CONNECT_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        with pytest.raises(TimeoutError, match=r"did not answer within 0.05 s"):
            await NbdClient.open(f"nbd+unix:///?socket={tmp_path}/s")


# -- many requests, many connections ---------------------------------------------------------------


async def test_requests_are_shared_out_among_connections(tmp_path: Path) -> None:
    seen = dict[Connection, int]()
    held = asyncio.Event()

    async def answer(connection: Connection, request: Request) -> None:
        seen[connection] = seen.get(connection, 0) + 1
        await held.wait()
        await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, connections=3)
        assert client.connections == server.accepted == 3
        reads = [asyncio.create_task(client.pread(0, 4096)) for _ in range(9)]
        await server.seen(9)
        assert sorted(seen.values()) == [3, 3, 3]
        held.set()
        await asyncio.gather(*reads)
        await close(client)
        assert server.said_goodbye == 3

        server.flags &= ~MULTI_CONN
        client = await NbdClient.open(server.uri, connections=3)
        assert client.connections == 1
        assert server.accepted == 4
        await close(client)


async def test_a_connection_carries_so_many_requests_and_no_more(tmp_path: Path) -> None:
    held = asyncio.Event()
    replies = list[int]()

    async def answer(connection: Connection, request: Request) -> None:
        await held.wait()
        replies.append(request.offset)
        await server.usual(connection, request)

    async with scripted(tmp_path, 40 * MIB) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        reads = [asyncio.create_task(client.pread(at, 1)) for at in range(2 * REQUESTS_MAX)]
        await server.seen(REQUESTS_MAX)
        later = asyncio.create_task(client.pread(0, 1))
        await asyncio.sleep(0.01)  # time in which one more would come
        assert len(server.requests) == REQUESTS_MAX
        held.set()
        await asyncio.gather(*reads, later)
        assert replies[:REQUESTS_MAX] == list(range(REQUESTS_MAX))

        held.clear()
        server.requests.clear()
        length = BYTES_MAX // 4
        reads = [asyncio.create_task(client.pread(0, length)) for at in range(6)]
        reads.append(asyncio.create_task(client.pread(0, 20 * MIB)))  # more than fits: alone
        await server.seen(4)
        await asyncio.sleep(0.01)
        assert len(server.requests) == 4
        held.set()
        await asyncio.gather(*reads)
        await close(client)


async def test_a_large_request_is_sent_while_replies_come(tmp_path: Path) -> None:
    """Neither end reads for a while: what is half written must not keep libnbd from reading."""
    async with scripted(tmp_path, 32 * MIB) as server:
        client = await NbdClient.open(server.uri)
        data = bytes(range(256)) * (4 * MIB // 256)
        calls = [client.pwrite(at * MIB, data) for at in range(0, 16, 4)]
        await asyncio.gather(*calls, *(client.pread(16 * MIB, 4 * MIB) for _ in range(4)))
        assert server.disk[: 16 * MIB] == data * 4
        await close(client)


# -- cancelled, closed -----------------------------------------------------------------------------


async def test_a_call_that_is_cancelled_has_its_buffer_until_the_reply(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(connection: Connection, request: Request) -> None:
        if request.offset == 0:
            await held.wait()
        await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        server.disk[:] = b"x" * MIB
        client = await NbdClient.open(server.uri)
        read = asyncio.create_task(client.pread(0, 512 * KIB))
        written = bytearray(b"y" * 4096)
        write = asyncio.create_task(client.pwrite(0, written))
        await server.seen(2)
        read.cancel()
        write.cancel()
        await asyncio.wait({read, write})
        del read, write  # their tracebacks refer to the data
        with pytest.raises(BufferError):  # libnbd has it
            written.extend(b"z")
        gc.collect()
        held.set()
        assert await client.pread(4096, 4096) == b"x" * 4096
        await client.flush()
        while True:  # its reply may come after that of the flush
            try:
                written.extend(b"z")
                break
            except BufferError:
                await client.pread(4096, 1)
                gc.collect()
        assert client.generation == 0
        await close(client)


async def test_a_call_that_is_cancelled_before_it_was_sent_is_not_sent(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(connection: Connection, request: Request) -> None:
        await held.wait()
        await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        reads = [asyncio.create_task(client.pread(0, 1)) for _ in range(REQUESTS_MAX)]
        await server.seen(REQUESTS_MAX)
        waiting = [asyncio.create_task(client.pwrite(0, b"no")) for _ in range(3)]
        await asyncio.sleep(0)
        for write in waiting:
            write.cancel()
        held.set()
        await asyncio.gather(*reads)
        await client.flush()
        assert {request.kind for request in server.requests} == {READ, FLUSH}
        await close(client)


async def test_closing_waits_for_what_is_written_and_for_nothing_else(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(connection: Connection, request: Request) -> None:
        if request.kind == READ:
            return  # never
        await held.wait()
        await server.usual(connection, request)

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, connections=2)
        read = asyncio.create_task(client.pread(0, 4096))
        write = asyncio.create_task(client.pwrite(0, b"abc"))
        await server.seen(2)
        client.close()
        with pytest.raises(OSError, match="closed") as caught:
            await client.pread(0, 1)
        assert caught.value.errno == errno.EBADF
        assert not write.done()
        held.set()
        await client.wait_closed()
        await write
        assert server.disk[:3] == b"abc"
        with pytest.raises(OSError, match="closed"):
            await read
        assert server.said_goodbye == 1  # where nothing was in flight


async def test_what_was_read_is_nobodys_but_the_callers(tmp_path: Path) -> None:
    """libnbd 1.14 and 1.22 keep what they are handed in an nbd.Buffer."""
    async with scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri)
        await client.pread(0, MIB)
        tracemalloc.start()
        try:
            for _ in range(8):
                await client.pread(0, MIB)
            left, _peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left < 2 * MIB
        await close(client)


async def test_closing_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        """Never."""

    monkeypatch.setattr(nbd_connections, "CLOSE_TIMEOUT_S", 0.01)
    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri)
        write = asyncio.create_task(client.pwrite(0, b"abc"))
        await server.seen(1)
        await close(client)
        with pytest.raises(OSError, match="closed"):
            await write
