"""Temp images at another server, beyond the contract suite: what is lost, freed, and given back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleecenbd.storage import nbd_connections, remote, temp_remote
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.temp_remote import TempExport, open_temp_export

from .scripted_nbd import (
    BLOCK_STATUS,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Connection,
    Request,
    ScriptedServer,
    scripted,
)

SIZE = 1 << 20


@asynccontextmanager
async def _export(tmp_path: Path) -> AsyncIterator[tuple[ScriptedServer, TempExport]]:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        await export.take(overwrite=True)
        server.requests.clear()
        try:
            yield server, export
        finally:
            export.close()
            await export.wait_closed()


async def test_a_trim_is_a_write_of_zeroes_that_may_punch_holes(tmp_path: Path) -> None:
    async with _export(tmp_path) as (server, export):
        await export.pwrite(8192, b"x" * 8192)
        await export.trim(8192, 4096)
        assert await export.pread(8192, 8192) == bytes(4096) + b"x" * 4096
        kinds = [request.kind for request in server.requests]
        assert TRIM not in kinds
        (zeroes,) = [request for request in server.requests if request.kind == WRITE_ZEROES]
        assert (zeroes.offset, zeroes.length, zeroes.flags & NO_HOLE) == (8192, 4096, 0)


async def test_a_trim_that_fails_is_an_error(tmp_path: Path) -> None:
    async with _export(tmp_path) as (server, export):

        async def refuse(connection: Connection, request: Request) -> None:
            connection.error(request, errno.EIO)

        usual, server.answer = server.answer, refuse
        with pytest.raises(OSError, match="Input/output"):
            await export.trim(0, 4096)
        assert not export.is_lost, "an error reply is an answer"
        server.answer = usual


async def test_one_connection_of_several_that_is_lost_is_told_at_once(tmp_path: Path) -> None:
    """What was asked there may still be done, after what is asked on another one now."""
    async with _export(tmp_path) as (server, export):
        told: list[str] = []
        is_told = asyncio.Event()
        export.on_lost = lambda why: (told.append(why), is_told.set())[1]
        await export.pwrite(0, b"x" * 4096)
        assert len(server.connections) > 1
        server.connections[0].drop()
        await is_told.wait()
        assert len(told) == 1
        assert "the connection is lost" in told[0]
        with pytest.raises(OSError, match="the connection is lost"):
            await export.pread(0, 4096)
        server.requests.clear()
    assert not server.requests, "whoever answers there is asked for nothing"
    assert not export.is_unanswered


async def test_a_connection_that_is_lost_while_others_are_made_is_told_too(tmp_path: Path) -> None:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        client = await NbdClient.open(server.uri, connections=1, retries=0, lasts=False)
        server.connections[0].drop()
        told = asyncio.Event()
        client.when_lost(lambda error: told.set())
        await told.wait()
        export = TempExport(client, server.uri, size=SIZE, hole_size=4096)
        assert export.is_lost
        export.close()
        await export.wait_closed()


async def test_what_is_lost_before_anybody_is_to_be_told_is_told_at_once(tmp_path: Path) -> None:
    async with _export(tmp_path) as (server, export):
        await server.stop()
        with pytest.raises(OSError, match="the connection is lost"):
            await export.pread(0, 4096)
        told: list[str] = []
        export.on_lost = told.append
        assert len(told) == 1
        with pytest.raises(OSError, match="the connection is lost"):
            await export.pwrite(0, b"x" * 4096)
        assert len(told) == 1
        assert "the connection is lost" in told[0]
        await server.start()
        with pytest.raises(OSError, match="the connection is lost"):
            await export.pread(0, 4096)
        assert not server.connections, "whoever answers now may have lost all of it"


async def test_at_the_end_what_holds_data_is_given_back(tmp_path: Path) -> None:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        await export.take(overwrite=True)
        await export.pwrite(8192, b"x" * 8192)

        async def tell(connection: Connection, request: Request) -> None:
            if request.kind == BLOCK_STATUS:
                connection.status(request, (8192, 3), (8192, 0), (request.length - 16384, 3))
            else:
                await server.usual(connection, request)

        server.answer = tell
        server.requests.clear()
        export.close()
        await export.wait_closed()
        zeroes = [r for r in server.requests if r.kind == WRITE_ZEROES]
        assert [(r.offset, r.length) for r in zeroes] == [(8192, 8192)]
        assert not any(server.disk)
        with pytest.raises(OSError, match="closed"):
            await export.pread(0, 4096)


async def test_a_server_that_does_not_answer_at_the_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(temp_remote, "WIPE_S", 0.1)
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        await export.take(overwrite=True)

        async def hang(connection: Connection, request: Request) -> None:
            await asyncio.Event().wait()

        server.answer = hang
        export.close()
        await server.seen(len(server.requests) + 1)
        await server.stop()
        await export.wait_closed()
    assert "what the temp image held could not be freed" in caplog.text


@pytest.mark.parametrize("end", ["answer", "error", "hang", "drop"])
async def test_who_was_never_answered_says_so_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(temp_remote, "WIPE_S", 0.1)
    for module in (temp_remote, remote):
        monkeypatch.setattr(module, "CLOSE_S", 0.1)
    monkeypatch.setattr(nbd_connections, "CLOSE_TIMEOUT_S", 0.1)
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        await export.take(overwrite=True)

        async def answer(connection: Connection, request: Request) -> None:
            if request.kind != WRITE:
                await server.usual(connection, request)
            elif end == "hang":
                await asyncio.Event().wait()
            elif end == "error":
                connection.error(request, 5)
            elif end == "drop":
                connection.drop()
            else:
                await asyncio.sleep(0.05)
                await server.usual(connection, request)

        server.answer = answer
        server.requests.clear()
        writing = asyncio.ensure_future(export.pwrite(0, b"x" * 4096))
        await server.seen(1)
        export.close()
        await export.wait_closed()
        if end == "answer":
            await writing
        else:
            with pytest.raises(OSError, match=r"Input/output|closed|lost"):
                await writing
        assert export.is_unanswered == (end in ("hang", "drop"))


async def test_a_wipe_that_was_never_answered_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temp_remote, "WIPE_S", 0.1)
    monkeypatch.setattr(nbd_connections, "CLOSE_TIMEOUT_S", 0.1)
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        await export.take(overwrite=True)

        async def hang(connection: Connection, request: Request) -> None:
            if request.kind == WRITE_ZEROES:
                await asyncio.Event().wait()
            await server.usual(connection, request)

        server.answer = hang
        export.close()
        await export.wait_closed()
        assert export.is_unanswered


async def test_nothing_else_is_asked_while_it_is_looked_at(tmp_path: Path) -> None:
    async with _export(tmp_path) as (server, export):
        await export.pwrite(0, b"x" * 4096)
        async with export.alone():
            others = [
                asyncio.ensure_future(call)
                for call in (export.pread(0, 4096), export.pwrite(0, b"y" * 4096))
            ]
            cancelled = asyncio.ensure_future(export.zero(8192, 4096))
            await asyncio.sleep(0)
            cancelled.cancel()
            server.requests.clear()
            assert await export.besides.pread(0, 4096) == b"x" * 4096
            assert await export.besides.extents(0, 8192) == [(8192, 0)]
            assert {request.kind for request in server.requests} == {READ, BLOCK_STATUS}
            assert not any(other.done() for other in others)
        await asyncio.gather(*others)
        assert await export.pread(0, 4096) == b"y" * 4096


async def test_who_does_not_answer_is_not_looked_at_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temp_remote, "ALONE_S", 0.05)
    async with _export(tmp_path) as (server, export):

        async def hang(connection: Connection, request: Request) -> None:
            await goes_on.wait()
            await server.usual(connection, request)

        goes_on = asyncio.Event()
        server.answer = hang
        reading = asyncio.ensure_future(export.pread(0, 4096))
        await server.seen(1)
        with pytest.raises(OSError, match="does not answer"):
            async with export.alone():
                pass
        goes_on.set()
        await reading
        await export.pread(0, 4096)


async def test_what_may_hold_data_is_read_by_nobody_and_kept(tmp_path: Path) -> None:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        server.disk[5000] = 1
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        with pytest.raises(OSError, match=r"it holds data.*--temp-overwrite") as refused:
            await export.take(overwrite=False)
        assert refused.value.errno == errno.EBUSY
        export.close()
        await export.wait_closed()
        server.contexts = ()
        export = await open_temp_export(server.uri, SIZE, cluster_size=4096)
        with pytest.raises(OSError, match=r"does not tell whether.*--temp-overwrite"):
            await export.take(overwrite=False)
        export.close()
        await export.wait_closed()
        assert server.disk[5000] == 1
        assert READ not in [request.kind for request in server.requests]
        while server.connections:
            await server.change()


async def test_an_export_must_hold_whole_clusters_of_its_own_blocks(tmp_path: Path) -> None:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        server.block_sizes = (512, 65536, 32 << 20)
        with pytest.raises(OSError, match=f"has {SIZE} bytes, and .* needs {SIZE + 65536}"):
            await open_temp_export(server.uri, SIZE + 1, cluster_size=4096)
        export = await open_temp_export(server.uri, SIZE - 1, cluster_size=4096)
        assert (export.size, export.hole_size) == (SIZE, 65536)
        export.close()
        await export.wait_closed()
