"""Exports that were a temp image a moment ago are not taken again while that can matter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.server import temp_making
from fleecenbd.server.temp_making import make_export
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage import nbd_connections, remote, temp_remote
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.temp_remote import TempExport
from tests.storage.scripted_nbd import (
    WRITE,
    WRITE_ZEROES,
    Connection,
    Request,
    ScriptedServer,
    scripted,
)

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (temp_remote, remote):
        monkeypatch.setattr(module, "CLOSE_S", 0.1)
    monkeypatch.setattr(nbd_connections, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(temp_making, "ENDING_TIMEOUT_S", 0.2)


@asynccontextmanager
async def _server(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    async with asyncio.timeout(30), scripted(tmp_path) as server:
        yield server


async def _make(uri: str) -> TempExport:
    device = MemoryDevice(SIZE)
    await device.pwrite(0, b"d" * SIZE)
    return await make_export(TempPlace(uri, overwrite=True), "n", Disk("vda", device), 4096, [])


async def test_one_that_still_gives_back_its_space_is_not_taken(tmp_path: Path) -> None:
    """What it frees late would be the next session's."""
    async with _server(tmp_path) as server:
        old = await _make(server.uri)
        await old.pwrite(0, b"x" * 4096)
        going_on = asyncio.Event()

        async def slow(connection: Connection, request: Request) -> None:
            if request.kind == WRITE_ZEROES:
                await going_on.wait()
            await server.usual(connection, request)

        server.answer = slow
        old.close()
        for uri in (server.uri, server.uri.replace("///disk?", "///other?")):
            with pytest.raises(OSError, match="still gives back its space"):
                await _make(uri)
        going_on.set()
        await old.wait_closed()
        new = await _make(server.uri)
        assert not any(server.disk)
        new.close()
        await new.wait_closed()


async def test_one_whose_server_may_still_write_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _server(tmp_path) as server:
        old = await _make(server.uri)

        async def hang(connection: Connection, request: Request) -> None:
            if request.kind == WRITE:
                await asyncio.Event().wait()
            await server.usual(connection, request)

        server.answer = hang
        server.requests.clear()
        writing = asyncio.ensure_future(old.pwrite(0, b"x" * 4096))
        await server.seen(1)
        old.close()
        await old.wait_closed()
        with pytest.raises(OSError, match="closed"):
            await writing
        server.answer = server.usual
        with pytest.raises(OSError, match="may still write what that had asked for"):
            await _make(server.uri)
        other = await _make(server.uri.replace("///disk?", "///other?"))
        other.close()
        await other.wait_closed()
        monkeypatch.setattr(temp_making, "UNANSWERED_S", 0.0)
        new = await _make(server.uri)
        new.close()
        await new.wait_closed()
