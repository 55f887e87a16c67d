"""A server in the place of the last one: what goes on, and what is lost, by name."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.resizing import resized
from fleecenbd.engine.session import MakeTemp, SessionOptions
from fleecenbd.server.server import Server
from fleecenbd.server.state import directory as directory_module
from fleecenbd.server.state import elsewhere as elsewhere_module
from fleecenbd.server.state import files as files_module
from fleecenbd.server.state import store as store_module
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.names import DisksMissing
from fleecenbd.server.state.recovery import recover
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.temp import TempImage
from tests.descriptors import descriptors_of

SIZE = 1 << 20
OLD = b"old!" * (SIZE // 4)


class Place:
    """A folder with images and state, and one server after the other in it."""

    def __init__(self, folder: Path, names: Sequence[str] = ("vda",)) -> None:
        self.folder = folder
        self.boot = "boot-1"
        for name in names:
            self.image(name).write_bytes(OLD)
        self.names = list(names)

    def image(self, name: str = "vda") -> Path:
        return self.folder / f"{name}.raw"

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder / "state" / "files"))

    async def start(
        self, *, trust_offline: frozenset[str] = frozenset(), forget_missing: bool = False
    ) -> Server:
        server = Server()
        for name in self.names:
            server.add_disk(Disk(name, FileDevice.open(self.image(name))))
        directory = StateDirectory.open(self.folder / "state")
        try:
            await recover(
                server,
                directory,
                self.boot,
                trust_offline=trust_offline,
                forget_missing=forget_missing,
            )
        except BaseException:
            server.abort()
            for disk in server.disks.values():
                await disk.device.wait_closed()
            raise
        return server

    async def kill(self, server: Server) -> None:
        """As a kill leaves it: nothing is saved, and nothing is unlinked."""
        assert server.store is not None
        temps = [fleece.temp for session in server.sessions.values() for fleece in session.fleeces]
        server.abort()
        await server.store.wait_closed()
        for temp in temps:
            await temp.wait_closed()  # its lock goes with it
        for disk in server.disks.values():
            await disk.device.wait_closed()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _temps(server: Server, session: str) -> MakeTemp:
    assert server.store is not None
    return server.store.temps.maker(session)


async def _begin(server: Server, name: str = "s1", mode: str = "new") -> None:
    request = BitmapRequest("chain", mode, 65536)
    await server.begin(
        name, None, SessionOptions(), _temps(server, name), bitmap=request, owner="job"
    )


async def _read(server: Server, offset: int, length: int, name: str = "s1") -> bytes:
    fleece = server.sessions[name].fleeces[0]
    return bytes(await fleece.read(offset, length))


@pytest.mark.parametrize("way", ["kill", "stop", "reboot"])
async def test_a_session_and_its_bitmap_go_on(place: Place, way: str) -> None:
    server = await place.start()
    await _begin(server)
    before = server.sessions["s1"]
    await server.disks["vda"].write(8192, b"new" * 1000)
    await before.fleeces[0].trim(65536, 65536)
    await (place.kill(server) if way == "kill" else server.stop())
    if way == "reboot":
        place.boot = "boot-2"
    server = await place.start()
    session = server.sessions["s1"]
    assert (session.id, session.owner, session.armed_at) == (
        before.id,
        before.owner,
        before.armed_at,
    )
    assert session.state == "active"
    assert await _read(server, 0, 65536) == OLD[:65536]
    with pytest.raises(OSError, match="released") as caught:
        await _read(server, 65536, 4096)
    assert caught.value.errno == errno.EINVAL
    await server.disks["vda"].write(131072, b"newer")
    assert await _read(server, 131072, 4096) == OLD[:4096]
    bitmap = server.disks["vda"].bitmaps["chain"]
    assert bitmap.lost is None
    assert bitmap.since is not None
    assert bitmap.since.session_id == before.id
    assert [bool(bit) for bit in bitmap.bitmap.bits[:4]] == [True, False, True, False]
    await server.stop()


async def test_a_server_that_has_stopped_has_let_go_of_its_temp_images(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await place.start()
    await _begin(server)
    temps = place.folder / "state" / "files" / "temp-"
    assert descriptors_of(temps)
    close = os.close

    def slow_close(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(temps)):
            time.sleep(0.1)
        close(descriptor)

    monkeypatch.setattr(os, "close", slow_close)
    await server.stop()
    assert descriptors_of(temps) == []


async def test_what_is_finished_leaves_no_file_but_its_bitmap(place: Place) -> None:
    server = await place.start()
    await _begin(server)
    assert len(place.files) == 4
    server.finish("s1")
    assert server.store is not None
    await server.store.wait_ended()
    assert [name.partition("-")[0] for name in place.files] == ["bitmap", "stamps"]
    await place.kill(server)
    server = await place.start()
    assert server.sessions == {}
    assert server.disks["vda"].bitmaps["chain"].since is not None
    await server.stop()


async def test_a_failed_session_gives_its_bits_back_over_a_kill(place: Place) -> None:
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await server.disks["vda"].write(0, b"x")
    await _begin(server, "s1", "use")
    await place.kill(server)
    server = await place.start()
    bitmap = server.disks["vda"].bitmaps["chain"]
    assert not bitmap.bitmap.any(0, SIZE)
    assert bitmap.used_by == "s1"
    server.finish("s1", failed=True)
    assert bitmap.bitmap.all(0, 1)
    assert bitmap.since is not None
    assert bitmap.since.session == "full"
    await server.stop()


async def test_a_session_that_was_failing_when_the_kill_came_can_only_fail(place: Place) -> None:
    server = await place.start()
    await _begin(server)
    assert server.store is not None
    server.store.before_end(server.sessions["s1"], failed=True)
    await place.kill(server)
    server = await place.start()
    assert server.sessions["s1"].state == "broken"
    assert server.finish("s1").failed
    assert server.disks["vda"].bitmaps == {}
    await server.stop()


async def test_after_a_crash_of_the_machine_everything_is_lost_by_name(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await _begin(server, "s1", "use-or-new")
    await place.kill(server)
    place.boot = "boot-2"
    server = await place.start()
    session = server.sessions["s1"]
    assert session.state == "broken"
    assert "the machine went down" in (session.fleeces[0].broken or "")
    assert "the machine went down" in (server.disks["vda"].bitmaps["chain"].lost or "")
    assert "bitmap chain of vda is lost" in caplog.text
    assert "a full backup is needed" in caplog.text
    assert "session s1 is broken: vda@s1" in caplog.text
    with pytest.raises(OSError, match="went down") as caught:
        await _read(server, 0, 4096)
    assert caught.value.errno == errno.EIO
    # It is told once, and stays so.
    caplog.clear()
    await place.kill(server)
    server = await place.start()
    assert server.sessions["s1"].state == "broken"
    assert server.disks["vda"].bitmaps["chain"].lost is not None
    assert "lost" not in caplog.text
    server.finish("s1")
    await _begin(server, "s2", "use-or-new")
    own = server.sessions["s2"].fleeces[0].own
    assert own is not None
    assert own.mode == "new"
    assert "went down" in (own.reason or "")
    await server.stop()


@pytest.mark.parametrize("way", ["kill", "stop"])
async def test_an_image_that_somebody_else_changed_loses_its_session_and_bitmap(
    place: Place, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.start()
    await _begin(server)
    await server.disks["vda"].write(0, b"x")
    await (place.kill(server) if way == "kill" else server.stop())
    status = place.image().stat()
    os.utime(place.image(), ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    server = await place.start()
    assert server.sessions["s1"].state == "broken"
    assert "somebody else" in (server.disks["vda"].bitmaps["chain"].lost or "")
    assert "somebody else" in caplog.text
    await server.stop()


async def test_a_broken_session_stays_broken_and_holds_no_space(place: Place) -> None:
    server = await place.start()
    await _begin(server)
    fleece = server.sessions["s1"].fleeces[0]
    await server.disks["vda"].write(0, b"x")
    fleece.state.break_session("the temp image is full")
    await fleece.temp.wait_closed()
    assert not [name for name in place.files if name.startswith("temp")]
    await place.kill(server)
    server = await place.start()
    assert server.sessions["s1"].fleeces[0].broken == "the temp image is full"
    await server.stop()


@pytest.mark.parametrize("kind", ["bitmap", "fleece", "temp", "stamps"])
@pytest.mark.parametrize("fault", ["missing", "damaged"])
async def test_a_file_that_is_gone_or_damaged_costs_what_it_held(
    place: Place, kind: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await _begin(server, "s1", "use")
    assert server.store is not None
    await server.store.wait_ended()
    await place.kill(server)
    (name,) = [name for name in place.files if name.startswith(kind)]
    path = place.folder / "state" / "files" / name
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * 100)
    server = await place.start()
    bitmap = server.disks["vda"].bitmaps["chain"]
    # The session's own bits are in the fleece's file: what they were of is lost with them.
    assert (bitmap.lost is not None) == (kind != "temp")
    assert (server.sessions["s1"].state == "broken") == (kind != "bitmap")
    assert "s1" in caplog.text or "chain" in caplog.text
    server.finish("s1", failed=True)
    await server.stop()
    await (await place.start()).stop()


async def test_a_damaged_description_is_no_crash_loop(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.start()
    await _begin(server)
    await place.kill(server)
    (place.folder / "state" / "state.json").write_bytes(b"\0" * 100)
    server = await place.start()
    assert server.sessions == {}
    assert "state.json is damaged" in caplog.text
    assert place.files == []
    await _begin(server)
    await server.stop()


async def test_a_session_over_a_disk_that_is_missing_keeps_a_server_from_starting(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path, ["vda", "vdb"])
    server = await place.start()
    await _begin(server)
    await server.disks["vdb"].write(0, b"x")
    await server.stop()
    state = place.folder / "state"
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    place.names = ["vda"]
    with pytest.raises(DisksMissing, match="session s1 is over vdb, not served now") as caught:
        await place.start()
    assert caught.value.images == {"vdb": str(place.image("vdb"))}
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    place.names = ["vda", "vdb"]
    server = await place.start()
    session = server.sessions["s1"]
    assert session.state == "active"
    assert bytes(await session.fleeces[1].read(0, 4096)) == OLD[:4096]
    await server.stop()


async def test_a_session_that_was_forgotten_takes_a_missing_disk_s_bitmap_with_it_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, ["vda", "vdb"])
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await _begin(server, "s1", "use")
    await server.stop()
    place.names = ["vda"]
    server = await place.start(forget_missing=True)
    assert server.sessions["s1"].state == "broken"
    assert "bitmap chain of vdb is lost: session s1 had taken its bits" in caplog.text
    assert "stays" not in caplog.text
    await server.stop()
    # What is left of it is over vda alone: no word is needed any more.
    server = await place.start()
    assert server.sessions["s1"].state == "broken"
    server.finish("s1")
    await server.stop()


async def test_a_disk_that_is_forgotten_breaks_its_session_and_keeps_its_bitmap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, ["vda", "vdb"])
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await server.begin("s1", None, SessionOptions(), _temps(server, "s1"))
    await server.disks["vdb"].write(0, b"x")
    await server.stop()
    place.names = ["vda"]
    server = await place.start(forget_missing=True)
    assert "vdb, which it is over too" in (server.sessions["s1"].fleeces[0].broken or "")
    assert "bitmap chain of vdb stays, and does not record: vdb is not served now" in caplog.text
    server.finish("s1")
    await place.kill(server)
    place.names = ["vda", "vdb"]
    server = await place.start()
    for disk in server.disks.values():
        assert disk.bitmaps["chain"].lost is None, disk.name
    assert server.disks["vdb"].bitmaps["chain"].bitmap.all(0, 1)
    await server.stop()


async def test_the_clean_mark_is_gone_before_the_first_write_of_the_next_run(place: Place) -> None:
    server = await place.start()
    await _begin(server)
    await server.stop()
    assert (place.folder / "state" / "state.clean").exists()
    server = await place.start()
    assert not (place.folder / "state" / "state.clean").exists()
    await place.kill(server)
    place.boot = "boot-2"
    server = await place.start()
    assert server.sessions["s1"].state == "broken"
    await server.stop()


async def test_a_stop_that_could_not_sync_leaves_no_mark(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.start()
    await _begin(server)

    async def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", "temp")

    monkeypatch.setattr(server.sessions["s1"].fleeces[0].temp, "flush", fail)
    await server.stop()
    assert not (place.folder / "state" / "state.clean").exists()
    assert "no clean mark is left: temp: Input/output error" in caplog.text
    server = await place.start()  # as after a kill
    assert server.sessions["s1"].state == "active"
    await server.stop()


async def test_a_stop_syncs_no_temp_image_that_goes_with_the_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who keeps it may hang, and others' sessions would pay for it."""
    server = await place.start()
    await _begin(server)
    temp = server.sessions["s1"].fleeces[0].temp
    monkeypatch.setattr(temp, "on_lost", None, raising=False)

    async def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", "temp")

    monkeypatch.setattr(temp, "flush", fail)
    await server.stop()
    assert (place.folder / "state" / "state.clean").exists()


async def test_a_bitmap_that_was_lost_is_so_even_if_that_could_not_be_written_down(
    place: Place,
) -> None:
    server = await place.start()
    await _begin(server)
    server.finish("s1")
    assert server.store is not None
    await server.store.wait_ended()
    disk = server.disks["vda"]
    (bitmap,) = resized(disk, SIZE // 2)
    assert resized(disk, SIZE) == []
    await disk.write(0, b"later than the change")
    await place.kill(server)
    server = await place.start()
    assert server.disks["vda"].bitmaps["chain"].lost == bitmap.lost
    await _begin(server, "s2", "use-or-new")
    assert server.disks["vda"].bitmaps["chain"].lost is None
    await place.kill(server)
    server = await place.start()
    assert server.disks["vda"].bitmaps["chain"].lost is None
    await server.stop()


async def test_a_stop_does_not_wait_for_what_others_keep_of_an_ended_session(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await place.start()
    await _begin(server)
    temp = server.sessions["s1"].fleeces[0].temp
    monkeypatch.setattr(temp, "on_lost", None, raising=False)

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(temp, "wait_closed", hang)
    server.finish("s1")
    async with asyncio.timeout(5):
        await server.stop()
    assert (place.folder / "state" / "state.clean").exists()


async def _begin_elsewhere(server: Server, name: str, folder: Path) -> None:
    assert server.store is not None
    make_temp = server.store.temps.maker(name, TempPlace(directory=str(folder)))
    await server.begin(name, None, SessionOptions(temp_reserve=0), make_temp)


def _wait_until_empty(folder: Path) -> None:
    end = time.monotonic() + 30
    while os.listdir(folder):
        assert time.monotonic() < end
        time.sleep(0.01)


async def test_a_stop_syncs_the_names_of_temp_images_elsewhere(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder / "elsewhere"
    folder.mkdir()
    server = await place.start()
    await _begin(server)
    await _begin_elsewhere(server, "s2", folder)
    synced: list[Path] = []
    monkeypatch.setattr(store_module, "sync_folder", synced.append)
    await server.stop()
    assert synced == [folder]
    assert (place.folder / "state" / "state.clean").exists()
    server = await place.start()
    assert server.sessions["s2"].state == "active"
    server.finish("s2")
    assert server.store is not None
    await server.store.wait_ended()
    await asyncio.to_thread(_wait_until_empty, folder)
    await server.stop()


async def test_a_folder_that_hangs_keeps_no_server_from_starting(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place.folder / "elsewhere"
    folder.mkdir()
    server = await place.start()
    await _begin(server)
    await _begin_elsewhere(server, "s2", folder)
    await _begin_elsewhere(server, "s3", folder)
    await place.kill(server)
    left = place.folder / "state" / "files" / "temp-left"
    left.symlink_to(folder / "fleecenbd-temp-left")
    goes_on = threading.Event()
    reopen, unlink = TempImage.reopen, directory_module._unlink_unused

    def slow_reopen(path: str, *args: object, **facts: object) -> TempImage:
        if path.startswith(str(folder)):
            goes_on.wait()
        return reopen(path, *args, **facts)  # type: ignore[arg-type]

    def slow_unlink(path: Path) -> None:
        goes_on.wait()
        unlink(path)

    monkeypatch.setattr(TempImage, "reopen", slow_reopen)
    monkeypatch.setattr(directory_module, "_unlink_unused", slow_unlink)
    monkeypatch.setattr(elsewhere_module, "ANSWER_S", 0.2)
    started = time.monotonic()
    server = await place.start()
    assert time.monotonic() - started < 5
    assert [server.sessions[name].state for name in ("s1", "s2", "s3")] == [
        "active",
        "broken",
        "broken",
    ]
    assert "its folder has not answered in 0.2 s" in caplog.text
    assert "temp-left is left over, and stays" in caplog.text
    goes_on.set()
    await server.stop()
    server = await place.start()
    assert not left.is_symlink()
    for name in ("s2", "s3"):
        server.finish(name, failed=True)
    await asyncio.to_thread(_wait_until_empty, folder)
    await server.stop()


async def test_a_folder_that_hangs_holds_up_nothing_elsewhere(place: Place) -> None:
    folder = place.folder / "elsewhere"
    folder.mkdir()
    server = await place.start()
    await _begin_elsewhere(server, "s1", folder)
    store = server.store
    assert store is not None
    goes_on = threading.Event()
    for _ in range(2):  # as its calls do
        store._files.pool_of(str(folder)).run(goes_on.wait)
    begins = asyncio.ensure_future(_begin_elsewhere(server, "hung", folder))
    server.finish("s1")
    try:
        async with asyncio.timeout(10):
            await _begin(server, "s2")
            server.finish("s2")
            await store.wait_ended()
        assert not begins.done()
        begins.cancel()
        async with asyncio.timeout(10):
            await server.stop()
    finally:
        goes_on.set()
    assert (place.folder / "state" / "state.clean").exists()


async def test_sessions_end_where_that_is_asked_for(place: Place) -> None:
    server = await place.start()
    await _begin(server, "full")
    server.finish("full")
    await _begin(server, "s1", "use")
    server.end_sessions = True
    await server.stop()
    server = await place.start()
    assert server.sessions == {}
    bitmap = server.disks["vda"].bitmaps["chain"]
    assert bitmap.since is not None
    assert bitmap.since.session == "full"
    await server.stop()


@pytest.mark.parametrize("way", ["kill", "stop"])
async def test_a_disk_that_comes_at_run_time_has_lost_the_bitmaps_that_did_not_record(
    tmp_path: Path, way: str
) -> None:
    place = Place(tmp_path, ("vda", "vdb"))
    server = await place.start()
    await _begin(server)
    server.finish("s1")
    await server.stop()
    place.names = ["vda"]
    server = await place.start()
    vdb = Disk("vdb", FileDevice.open(place.image("vdb")))
    server.add_disk(vdb)
    await vdb.write(0, b"unrecorded")
    assert vdb.bitmaps["chain"].lost is not None
    assert "started without it" in vdb.bitmaps["chain"].lost
    await _begin(server, "s2", "use-or-new")
    modes = [fleece.own.mode for fleece in server.sessions["s2"].fleeces if fleece.own is not None]
    assert modes == ["use", "new"]
    server.finish("s2")
    assert server.store is not None
    await server.store.wait_ended()
    assert [name.partition("-")[0] for name in place.files] == ["bitmap"] * 2 + ["stamps"] * 2
    await (place.kill(server) if way == "kill" else server.stop())
    place.names = ["vda", "vdb"]
    server = await place.start()
    for disk in server.disks.values():
        bitmap = disk.bitmaps["chain"]
        assert bitmap.lost is None
        assert bitmap.since is not None
        assert bitmap.since.session == "s2"
    await server.stop()


async def test_a_description_that_cannot_be_written_fails_the_session_and_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await place.start()

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "write", full)
        with pytest.raises(OSError, match="No space left"):
            await _begin(server)
    assert server.sessions == {}
    assert server.disks["vda"].fleeces == []
    assert server.disks["vda"].bitmaps == {}
    await _begin(server)
    server.finish("s1", failed=True)
    assert server.store is not None
    await server.store.wait_ended()
    assert [name.partition("-")[0] for name in place.files] == ["stamps"]
    await server.stop()


async def test_a_description_that_hangs_ends_the_wait_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await place.start()
    await _begin(server, "full")
    go = threading.Event()
    write = StateDirectory.write

    def hang(self: StateDirectory, *arguments: object, **options: object) -> str:
        go.wait(30)
        return write(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(files_module, "COMMIT_DEADLINE_S", 0.05)
    monkeypatch.setattr("fleecenbd.server.state.store.COMMIT_DEADLINE_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "write", hang)
        assert server.store is not None
        with pytest.raises(OSError, match="not written within"):
            await server.store.commit()
        go.set()
    await asyncio.sleep(0)
    await server.stop()
