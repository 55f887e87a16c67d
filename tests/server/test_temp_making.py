"""Exports that were a temp image a moment ago are not taken again while that can matter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.server import temp_making
from fleecenbd.server.temp_making import adding, make_export
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage import nbd_connections, remote, same_storage, temp_remote
from fleecenbd.storage.memory import MemoryDevice
from fleecenbd.storage.remote import open_remote
from fleecenbd.storage.temp_remote import TempExport
from tests.storage.scripted_nbd import (
    READ,
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
    monkeypatch.setattr(temp_making, "_unanswered", {})
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
    return await make_export(TempPlace(uri, overwrite=True), "n", Disk("vda", device), 4096, tuple)


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
        with pytest.raises(OSError, match="may still write what that had asked for"):
            await _make(server.uri.replace("///disk?", "///other?"))
        with pytest.raises(OSError, match="may still write what that had asked for"):
            async with adding(Disk("vdb", await open_remote(server.uri))):
                pass
        monkeypatch.setattr(temp_making, "UNANSWERED_S", 0.0)
        new = await _make(server.uri)
        new.close()
        await new.wait_closed()


async def test_one_that_ends_while_another_is_made_is_waited_for(tmp_path: Path) -> None:
    """It is not gone before its connections are: what it asked for comes late."""
    async with _server(tmp_path) as server:
        old = await _make(server.uri)
        await old.pwrite(0, b"x" * 4096)
        may_look, may_write = asyncio.Event(), asyncio.Event()
        late = b"late" * 1024

        async def slow(connection: Connection, request: Request) -> None:
            if request.data == late:
                await may_write.wait()
            elif request.kind == READ and server.connections.index(connection) >= 4:
                await may_look.wait()
            await server.usual(connection, request)

        server.answer = slow
        writing = asyncio.ensure_future(old.pwrite(8192, late))
        server.requests.clear()
        making = asyncio.ensure_future(_make(server.uri))
        while not any(request.kind == READ for request in server.requests):
            await server.change()
        old.close()
        may_look.set()
        await asyncio.sleep(0.05)
        assert not making.done()
        may_write.set()
        await writing
        new = await making
        assert old._closing is not None
        assert old._closing.done()
        await new.pwrite(0, b"y" * 4096)
        await asyncio.sleep(0.05)
        assert bytes(server.disk).strip(b"\0") == b"y" * 4096
        new.close()
        await new.wait_closed()


async def test_what_was_refused_with_a_request_unanswered_is_remembered(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:

        async def hang(connection: Connection, request: Request) -> None:
            if request.kind == WRITE_ZEROES:
                await asyncio.Event().wait()
            await server.usual(connection, request)

        server.answer = hang
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(temp_making, "TAKE_TIMEOUT_S", 0.2)
            with pytest.raises(OSError, match=r"did not answer in 0\.2 s"):
                await _make(server.uri)
        server.answer = server.usual
        with pytest.raises(OSError, match="may still write what that had asked for"):
            await _make(server.uri)


async def test_a_server_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    """Not for longer than it may be looked at."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with _server(tmp_path / "a") as hung, _server(tmp_path / "b") as fine:
        live = await _make(fine.uri)

        async def hang(connection: Connection, request: Request) -> None:
            if any(request.kind == WRITE for request in fine.requests):  # a mark is looked for
                await asyncio.Event().wait()
            await hung.usual(connection, request)

        hung.answer = hang
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(same_storage, "MARK_S", 0.2)
            making = asyncio.ensure_future(_make(hung.uri))
            while not any(request.kind == WRITE for request in fine.requests):
                await fine.change()
            loop = asyncio.get_running_loop()
            started = loop.time()
            await live.pwrite(0, b"x" * 4096)
            assert loop.time() - started < 2
            with pytest.raises(OSError, match="does not answer"):
                await making
        assert bytes(fine.disk).strip(b"\0") == b"x" * 4096
        live.close()
        await live.wait_closed()


async def test_one_that_cannot_be_looked_at_alone_goes_on(tmp_path: Path) -> None:
    """What is asked of it meanwhile is asked after its mark is gone, however late that is."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with _server(tmp_path / "a") as fine, _server(tmp_path / "b") as slow:
        live = await _make(slow.uri)
        goes_on = asyncio.Event()

        async def wait(connection: Connection, request: Request) -> None:
            if request.kind == WRITE:
                await goes_on.wait()
            await slow.usual(connection, request)

        slow.answer = wait
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(same_storage, "ANSWER_S", 0.2)
            with pytest.raises(OSError, match="does not answer"):
                await _make(fine.uri)
        reading = asyncio.ensure_future(live.pread(0, SIZE))
        await asyncio.sleep(0.05)
        assert not reading.done()
        goes_on.set()
        assert await reading == bytes(SIZE)
        live.close()
        await live.wait_closed()


async def test_an_empty_export_of_a_disk_s_size_is_not_taken_and_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the disk's storage, by another name."""
    async with _server(tmp_path) as server:
        place = TempPlace(server.uri.replace("///disk?", "///other?"), overwrite=True)
        for device in (await open_remote(server.uri), MemoryDevice(SIZE)):
            disk = Disk("vda", device)
            with pytest.raises(
                OSError, match=r"disk vda: both are empty.*; make it larger, by 1 MiB"
            ):
                await make_export(place, "n", disk, 4096, lambda disk=disk: [disk])
            device.close()
            await device.wait_closed()
        assert not any(request.kind in (WRITE, WRITE_ZEROES) for request in server.requests)
        monkeypatch.setattr(same_storage, "SIZE_APART", 4096)
        disk = Disk("vda", MemoryDevice(SIZE - 4096))
        temp = await make_export(place, "n", disk, 4096, lambda: [disk])
        temp.close()
        await temp.wait_closed()


async def test_a_disk_s_storage_is_not_taken_and_not_written_to(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        server.disk[:] = b"d" * SIZE
        first, second = (
            Disk("vda", MemoryDevice(SIZE * 4)),
            Disk("vdb", await open_remote(server.uri)),
        )
        place = TempPlace(server.uri.replace("///disk?", "///other?"), overwrite=True)
        small = Disk("vdc", MemoryDevice(SIZE))
        with pytest.raises(OSError, match="disk vdb, or to a copy of it, whatever"):
            await make_export(place, "n", small, 4096, lambda: [first, second])
        assert not any(request.kind in (WRITE, WRITE_ZEROES) for request in server.requests)
        second.device.close()
        await second.device.wait_closed()


async def test_no_mark_comes_after_a_temp_image_has_ended(tmp_path: Path) -> None:
    """It would be left there: the export is empty at the end."""
    async with _server(tmp_path) as server:
        temp = await _make(server.uri)
        await temp.pwrite(0, b"x" * 4096)
        temp.close()
        with pytest.raises(OSError, match="closed"):
            async with temp.alone():
                raise AssertionError("it has ended")
        await temp.wait_closed()
        assert not any(server.disk)


async def test_a_disk_that_is_away_cannot_be_told_from_a_temp_image(tmp_path: Path) -> None:
    """It was wiped: its server was back before its connection was."""
    async with _server(tmp_path) as server:
        server.disk[:] = b"G" * SIZE
        disk = Disk("vda", await open_remote(server.uri))
        for connection in list(server.connections):
            connection.drop()
        while disk.device.is_usable:  # type: ignore[attr-defined] # noqa: ASYNC110
            await asyncio.sleep(0)
        place = TempPlace(server.uri.replace("///disk?", "///other?"), overwrite=True)
        with pytest.raises(OSError, match="disk vda is away"):
            await make_export(place, "n", disk, 4096, lambda: [disk])
        assert server.disk == b"G" * SIZE
        disk.device.close()
        await disk.device.wait_closed()


async def test_a_disk_that_is_away_is_not_added_beside_a_temp_image(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        temp = await _make(server.uri)
        others = list(server.connections)
        disk = Disk("vdb", await open_remote(server.uri.replace("///disk?", "///other?")))
        for connection in server.connections:
            if connection not in others:
                connection.drop()
        while disk.device.is_usable:  # type: ignore[attr-defined] # noqa: ASYNC110
            await asyncio.sleep(0)
        with pytest.raises(OSError, match="disk vdb is away"):
            async with adding(disk):
                raise AssertionError("it is refused")
        for device in (disk.device, temp):
            device.close()
            await device.wait_closed()


async def test_a_disk_that_is_a_temp_image_is_not_added(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        temp = await _make(server.uri)
        for content in (b"", b"x" * 4096):
            if content:
                await temp.pwrite(0, content)
            disk = Disk("vdb", await open_remote(server.uri.replace("///disk?", "///other?")))
            with pytest.raises(OSError, match="the storage of a session's temp image"):
                async with adding(disk):
                    raise AssertionError("it is refused")
            disk.device.close()
            await disk.device.wait_closed()
            assert bytes(server.disk).strip(b"\0") == content
        device = MemoryDevice(SIZE)
        await device.pwrite(0, b"d" * SIZE)
        async with adding(Disk("vdb", device)):
            pass
        temp.close()
        await temp.wait_closed()
