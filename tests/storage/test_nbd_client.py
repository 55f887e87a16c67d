"""NbdClient over one connection and over several: every call, every limit, every error."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from fleecenbd.storage.nbd_client import NbdClient
from tests.storage.scripted_nbd import (
    BLOCK_STATUS,
    READ,
    Connection,
    Request,
    scripted,
)


async def close(client: NbdClient) -> None:
    client.close()
    await client.wait_closed()


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
        await close(client)
        assert server.said_goodbye == 1


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
        assert isinstance(results[2], OSError)
        assert results[2].errno == errno.EIO
        assert results[2].filename == server.uri
        await close(client)


async def test_block_status_is_asked_for_until_all_is_covered(tmp_path: Path) -> None:
    async def answer(connection: Connection, request: Request) -> None:
        if request.offset < 3 << 16:
            connection.status(request, (1 << 15, 3), (1 << 15, request.offset >> 16 & 1))
        else:
            connection.status(request, (request.length + 512, 0))

    async with scripted(tmp_path) as server:
        server.answer = answer
        client = await NbdClient.open(server.uri, contexts=["base:allocation"])
        found = await client.block_status("base:allocation", 100, (1 << 19))
        assert found == [
            (1 << 15, 3),
            (1 << 15, 0),
            (1 << 15, 3),
            (1 << 15, 1),
            (1 << 15, 3),
            ((1 << 19) - 5 * (1 << 15), 0),
        ]
        assert {request.kind for request in server.requests} == {BLOCK_STATUS}
        await close(client)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is the server running"):
        await NbdClient.open(f"nbd+unix:///x?socket={tmp_path}/none")
    with pytest.raises(ConnectionRefusedError, match="is the server running"):
        await NbdClient.open("nbd://127.0.0.1:1/x")
