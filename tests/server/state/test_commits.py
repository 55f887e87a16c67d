"""Descriptions that are replaced one upon the other: none forgets a session that is being armed."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.session import Session, SessionOptions, arm
from fleecenbd.server.bitmaps import Bitmaps
from fleecenbd.server.server import Server
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.files import Files
from fleecenbd.server.state.recovery import recover
from fleecenbd.server.state.store import FileStore
from fleecenbd.server.state.trust import Image
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice

SIZE = 1 << 20


class Writer:
    """A server whose descriptions are written when the test says so."""

    def __init__(self, server: Server, store: FileStore) -> None:
        self.server = server
        self.store = store
        self._files: Files = store._files
        self._go = threading.Event()
        self._asked = asyncio.Semaphore(0)
        write = self._files.write

        async def noted(*args: Any, **options: Any) -> str:
            self._asked.release()
            return await write(*args, **options)

        self._files.write = noted  # type: ignore[method-assign]

    def stop(self) -> None:
        """From now on descriptions wait; those that wait already go on first."""
        self._go = threading.Event()
        self._asked = asyncio.Semaphore(0)
        self._files.writer.run(self._go.wait)

    def go(self) -> None:
        self._go.set()

    async def waiting(self) -> None:
        """Return when one more description waits to be written."""
        async with asyncio.timeout(10):
            await self._asked.acquire()

    def begin(self, name: str, *disks: str) -> asyncio.Task[Session]:
        bitmap = BitmapRequest("chain")
        return asyncio.ensure_future(
            self.server.begin(
                name, disks, SessionOptions(), self.store.temps.maker(name), bitmap=bitmap
            )
        )

    def described(self) -> dict[str, Any]:
        """What a server that is started now would find: sessions, and where bitmaps record."""
        found = self.store.directory.read()
        assert found is not None
        return {
            "sessions": [session.name for session in found.sessions],
            "since": {
                f"{bitmap.name} of {bitmap.disk}": bitmap.since.session if bitmap.since else None
                for bitmap in found.bitmaps
            },
        }


@asynccontextmanager
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    """A server with two disks and a state directory."""
    server = Server()
    for name in ("vda", "vdb"):
        image = tmp_path / name
        image.write_bytes(bytes(SIZE))
        server.add_disk(Disk(name, FileDevice.open(image)))
    store = await recover(server, StateDirectory.open(tmp_path / "state"), "boot")
    writing = Writer(server, store)
    try:
        yield writing
    finally:
        writing.go()
        await server.stop()


async def test_two_sessions_armed_at_once_are_both_in_every_description(tmp_path: Path) -> None:
    async with writer(tmp_path) as state:
        state.stop()
        one = state.begin("one", "vda")
        await state.waiting()
        two = state.begin("two", "vdb")
        await state.waiting()
        state.go()
        await asyncio.gather(one, two)
        assert state.described() == {
            "sessions": ["one", "two"],
            "since": {"chain of vda": "one", "chain of vdb": "two"},
        }


async def test_another_s_description_names_a_session_that_is_being_armed(tmp_path: Path) -> None:
    async with writer(tmp_path) as state:
        await state.begin("old", "vda")
        await state.store.settle()
        state.server.finish("old")
        await state.store.settle()
        state.stop()
        fresh = state.begin("fresh", "vda")
        await state.waiting()
        other = asyncio.ensure_future(state.store.commit())
        await state.waiting()
        state.go()
        await asyncio.gather(fresh, other)
        # Its recording bits are cleared now: the changes since "old" are in its own bits alone.
        assert state.described() == {"sessions": ["fresh"], "since": {"chain of vda": "fresh"}}


async def test_a_session_that_was_described_too_late_is_in_no_description_after(
    tmp_path: Path,
) -> None:
    async with writer(tmp_path) as state:
        state.stop()

        async def too_late() -> None:
            await arm(
                "late",
                [state.server.disk("vda")],
                SessionOptions(),
                state.store.temps.maker("late"),
                clock=lambda: 1.0,
                bitmap=BitmapRequest("chain"),
                store=state.store,
                deadline_s=0.05,
            )

        arming = asyncio.ensure_future(too_late())
        await state.waiting()
        await state.waiting()  # to take the first back
        state.go()
        with pytest.raises(OSError, match="was not written down within") as caught:
            await arming
        assert caught.value.errno == errno.ETIMEDOUT
        await state.store.commit()
        assert state.described() == {"sessions": [], "since": {}}
        await state.begin("next", "vda")
        assert state.described() == {"sessions": ["next"], "since": {"chain of vda": "next"}}


async def test_a_merge_into_a_bitmap_that_is_being_cleared_comes_after(tmp_path: Path) -> None:
    async with writer(tmp_path) as state:
        bitmaps = Bitmaps(state.server)
        await bitmaps.add("vda", "other", 65536)
        await state.begin("one", "vda")
        state.server.finish("one")
        await state.store.settle()
        disk = state.server.disk("vda")
        await disk.write(0, b"x" * 4096)
        state.stop()
        clear = asyncio.ensure_future(bitmaps.clear("vda", "other"))
        await state.waiting()
        merge = asyncio.ensure_future(bitmaps.merge("vda", "chain", "other"))
        await asyncio.sleep(0)
        state.go()
        await asyncio.gather(clear, merge)
        # What is described as recording since "one" must have all that was written since.
        assert state.described()["since"] == {
            "chain of vda": "one",
            "other of vda": "one",
        }
        assert disk.bitmaps["other"].bitmap.count_bytes() == 65536


@pytest.mark.parametrize("call", ["clear", "remove"])
async def test_a_bitmap_stays_in_its_chain_if_that_it_leaves_it_cannot_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async with writer(tmp_path) as state:
        await state.begin("one", "vda")
        state.server.finish("one")
        await state.store.settle()
        disk = state.server.disk("vda")
        await disk.write(0, b"x" * 4096)
        chain = disk.bitmaps["chain"]

        async def full(*_: object, **__: object) -> str:
            raise OSError(errno.ENOSPC, "a test")

        with monkeypatch.context() as patched:
            patched.setattr(state.store._files, "write", full)
            with pytest.raises(OSError, match="a test"):
                await getattr(Bitmaps(state.server), call)("vda", "chain")
        assert disk.bitmaps["chain"] is chain
        assert chain.since is not None
        assert chain.since.session == "one"
        assert chain.bitmap.count_bytes() == 65536


async def test_what_a_session_leaves_is_removed_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writer(tmp_path) as state:
        may_go = threading.Event()
        unlink = Files.unlink
        threads = set()

        def slow(files: Files, names: Iterable[str]) -> None:
            threads.add(threading.current_thread())
            assert may_go.wait(10)
            unlink(files, names)

        monkeypatch.setattr(Files, "unlink", slow)
        try:
            await state.begin("old", "vda")
            state.server.finish("old")
            async with asyncio.timeout(5):
                await state.begin("new", "vda")  # guests are held until it is described
                await state.store.settle()
        finally:
            may_go.set()
        async with asyncio.timeout(10):
            await state.store.wait_ended()
        await state.server.stop()
        assert threads
        assert threading.main_thread() not in threads
        left = sorted(path.name.partition("-")[0] for path in state.store.directory.files.iterdir())
        assert left == ["bitmap", "fleece", "stamps", "temp"]


async def test_the_loop_asks_no_image_that_may_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writer(tmp_path) as state:
        threads = set()
        of, realpath = Image.of, os.path.realpath

        def asked(device: Device) -> Image:
            threads.add(threading.current_thread())
            return of(device)

        def followed(path: str) -> str:
            threads.add(threading.current_thread())
            return realpath(path)

        monkeypatch.setattr(Image, "of", asked)
        monkeypatch.setattr(os.path, "realpath", followed)
        await state.begin("one", "vda", "vdb")
        await Bitmaps(state.server).add("vda", "other", 65536)
        state.server.finish("one")
        await state.store.wait_ended()
        assert await state.server.stop()
        monkeypatch.undo()
        assert threads
        assert threading.main_thread() not in threads
