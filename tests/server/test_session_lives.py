"""Around a session's arming: freeze and thaw commands; and how it ends when nobody ends it."""

import asyncio
import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import MakeTemp, Session
from fleecenbd.engine.store import MEMORY
from fleecenbd.server import events as events_module
from fleecenbd.server.asks import Ask
from fleecenbd.server.events import EVENTS_LOST, HOOK_FAILED, SESSION_FINISHED, Events
from fleecenbd.server.hooks import Hooks
from fleecenbd.server.temp_place import TempPlace
from fleecenbd.storage.device import Device
from tests.nbd import wire
from tests.server.controlled import Control, RoomPlaces, controlled


def _noting(path: Path) -> str:
    """A hook that notes that it ran, and for what."""
    return f'echo "$FLEECENBD_HOOK $FLEECENBD_SESSION $FLEECENBD_DISKS" >> {path}'


async def _finished(control: Control, name: str) -> str:
    """Wait until the session is finished; its result."""
    listener = control.served.server.events.listen()
    async with asyncio.timeout(10):
        while name in control.served.server.sessions:
            event = await listener.next()
            assert event is not None
            if event["event"] == SESSION_FINISHED and event["session"] == name:
                break
    control.served.server.events.forget(listener)
    return str(control.sessions.find(name).result)


async def test_hooks_run_around_arming(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks(_noting(log), _noting(log)), disks=("vda", "vdb")) as control:
        await control.put("sessions/n")
    assert log.read_text().splitlines() == ["freeze n vda vdb", "thaw n vda vdb"]


async def test_a_begin_s_own_hooks_take_the_place_of_the_server_s(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks("exit 1", "exit 1")) as control:
        own = {"freeze_cmd": _noting(log), "thaw_cmd": None}
        assert (await control.put("sessions/n", own))["warnings"][1:] == []
        await control.put("sessions/m", {"freeze_cmd": "", "thaw_cmd": ""})
        assert (await control.refused("PUT", "sessions/k"))[0] == 500
    assert log.read_text().splitlines() == ["freeze n vda"]


async def test_a_guest_that_cannot_be_frozen_is_thawed_and_has_no_session(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks("echo no agent; exit 7", _noting(log))) as control:
        listener = control.served.server.events.listen()
        assert await control.refused("PUT", "sessions/n") == (
            500,
            "cannot begin session n: session n: the freeze command failed with status 7: no agent",
        )
        event = await listener.next()
        assert event is not None
        assert (event["event"], event["hook"]) == (HOOK_FAILED, "freeze")
        assert control.served.server.sessions == {}
        assert control.served.devices["vda@n"].closed, "nothing is left"
    assert log.read_text().splitlines() == ["thaw n vda"]


async def test_a_freeze_that_hangs_is_killed_and_the_guest_is_thawed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks("sleep 1000", _noting(log), timeout_s=0.2)) as control:
        status, message = await control.refused("PUT", "sessions/n")
        assert status == 504
        assert "the freeze command had not ended after 0.2 s, and was killed" in message
    assert log.read_text().splitlines() == ["thaw n vda"]


async def test_a_session_that_cannot_be_armed_leaves_the_guest_thawed(tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    freeze = f"{_noting(log)}; until [ -e {go} ]; do sleep 0.01; done"
    async with controlled(Hooks(freeze, _noting(log))) as control:
        await control.put("disks/vda/bitmaps/b")
        body = {"bitmap": "b", "bitmap_mode": "keep"}
        begin = asyncio.ensure_future(control.refused("PUT", "sessions/n", body))
        while not log.exists():
            await control.served.settled()
        await control.delete("disks/vda/bitmaps/b")
        go.touch()
        assert (await begin)[0] == 404
    assert log.read_text().splitlines() == ["freeze n vda", "thaw n vda"]


async def test_a_session_whose_temp_image_cannot_be_made_freezes_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks(_noting(log), _noting(log))) as control:
        body = {"temp_limit": 1}
        assert (await control.refused("PUT", "sessions/n", body))[0] == 422
    assert not log.exists()


async def test_nobody_is_frozen_while_temp_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    asked, answer = asyncio.Event(), asyncio.Event()
    async with controlled(Hooks(_noting(log), _noting(log))) as control:
        make_temp = RoomPlaces.make_temp

        def slow(places: RoomPlaces, session: str, place: TempPlace) -> MakeTemp:
            make = make_temp(places, session, place)

            async def made(disk: Disk, cluster_size: int, session_id: str) -> Device:
                asked.set()
                await answer.wait()
                return await make(disk, cluster_size, session_id)

            return made

        monkeypatch.setattr(RoomPlaces, "make_temp", slow)
        begin = asyncio.ensure_future(control.put("sessions/n"))
        async with asyncio.timeout(10):
            await asked.wait()
        assert not log.exists()
        answer.set()
        await begin
    assert log.read_text().splitlines() == ["freeze n vda", "thaw n vda"]


async def test_a_guest_is_thawed_before_what_a_failed_arming_leaves_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    hangs, answer = asyncio.Event(), asyncio.Event()

    class Store(type(MEMORY)):  # type: ignore[misc]
        extras: ClassVar[dict[str, object]] = {}

        async def commit(
            self, *, adding: Session | None = None, removing: Session | None = None
        ) -> None:
            if adding is not None:
                raise OSError(errno.ENOSPC, "a test")
            hangs.set()
            await answer.wait()

    async with controlled(Hooks(_noting(log), _noting(log))) as control:
        store: Any = Store()
        monkeypatch.setattr(control.served.server, "store", store)
        begin = asyncio.ensure_future(control.refused("PUT", "sessions/n"))
        async with asyncio.timeout(10):
            await hangs.wait()
            while not (log.exists() and "thaw" in log.read_text()):
                await control.served.settled()
        answer.set()
        assert (await begin)[0] == 507
        monkeypatch.undo()


async def test_a_guest_that_cannot_be_thawed_is_told_loudly_and_the_session_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with controlled(Hooks(None, "echo agent gone; exit 1")) as control:
        begun = await control.put("sessions/n")
        assert begun["warnings"][1:] == [
            "session n: the thaw command failed with status 1: agent gone; "
            "the guest may still be frozen"
        ]
        assert list(control.served.server.sessions) == ["n"]
    assert any(
        "may still be frozen" in record.getMessage()
        for record in caplog.records
        if record.levelname == "ERROR"
    )


async def test_an_unknown_disk_freezes_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks(_noting(log), _noting(log))) as control:
        assert (await control.refused("PUT", "sessions/n", {"disks": ["vdz"]}))[0] == 404
    assert not log.exists()


async def test_a_client_that_goes_while_the_guest_is_frozen_changes_nothing(
    tmp_path: Path,
) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    freeze = f"{_noting(log)}; until [ -e {go} ]; do sleep 0.01; done"
    async with controlled(Hooks(freeze, _noting(log))) as control:
        asked = asyncio.ensure_future(control.put("sessions/n", {"owner": "me"}))
        while not control.sessions._beginning:
            await control.served.settled()
        asked.cancel()
        await asyncio.wait({asked})
        go.touch()
        assert await control.put("sessions/n", {"owner": "me"}, status=200)
    assert log.read_text().splitlines() == ["freeze n vda", "thaw n vda"]


async def test_who_asks_again_gets_no_session_that_was_finished_meanwhile(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with controlled(Hooks(None, f"until [ -e {go} ]; do sleep 0.01; done")) as control:
        server = control.served.server
        first = asyncio.ensure_future(control.put("sessions/n", {"owner": "me"}))
        while "n" not in server.sessions:
            await control.served.settled()
        again = asyncio.ensure_future(
            control.sessions.begin("n", control.sessions._beginning["n"][0])
        )
        await control.served.settled()
        finished = await control.delete("sessions/n")
        go.touch()
        assert (await first)["id"] == finished["id"]
        begun = await again
        assert begun.is_new
        assert server.sessions["n"] is begun.session
        assert begun.session.id != finished["id"]


async def test_a_server_that_stops_while_the_guest_is_frozen_thaws_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with controlled(Hooks(f"{_noting(log)}; sleep 1000", _noting(log))) as control:
        asked = asyncio.ensure_future(control.call("PUT", "sessions/n"))
        while not log.exists():
            await control.served.settled()
        async with asyncio.timeout(10):
            await control.sessions.close()
        with pytest.raises(OSError, match="session m cannot begin: the server is stopping"):
            await control.sessions.begin("m", Ask())
        asked.cancel()
    assert log.read_text().splitlines()[-1] == "thaw n vda"


async def test_a_session_that_outlives_the_server_is_not_finished_while_that_stops() -> None:
    async with controlled() as control:
        await control.put("sessions/n")
        control.served.server.stop_listening()
        status, message = await control.refused("DELETE", "sessions/n")
        assert (status, "the server is stopping; ask the next one" in message) == (503, True)
        assert control.served.server.sessions["n"].state == "active"


async def test_a_session_past_its_ttl_is_finished_as_failed() -> None:
    async with controlled() as control:
        await control.put("sessions/n", {"ttl": 0.05})
        assert await _finished(control, "n") == "failed"
        assert (await control.get("sessions/n"))["reason"] == "its ttl is over"
        assert "vda@n" not in control.served.server.exports


async def test_a_session_that_was_finished_in_time_is_not_finished_again() -> None:
    async with controlled() as control:
        await control.put("sessions/n", {"ttl": 0.05})
        await control.delete("sessions/n")
        await control.put("sessions/n")
        await control.put("sessions/clock", {"ttl": 0.1})
        assert await _finished(control, "clock") == "failed"
        assert list(control.served.server.sessions) == ["n"]


@pytest.mark.parametrize("command", [wire.READ, wire.TRIM, wire.BLOCK_STATUS])
async def test_requests_keep_a_session_with_an_idle_ttl_alive(command: int) -> None:
    async with controlled() as control:
        seen = await control.put("sessions/n", {"idle_ttl": 0.3})
        assert seen["warnings"] is not None
        backup = await control.served.client("vda@n", wire.STRUCTURED, "base:allocation")
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.6
        while loop.time() < until:
            await backup.ask(command, 0, 4096)
        view = await control.get("sessions/n")
        assert view["state"] == "active"
        assert 0 <= view["idle_ttl_left"] <= 0.3
        assert await _finished(control, "n") == "failed"
        assert (await control.get("sessions/n"))["reason"] == "its idle ttl is over"
        assert await backup.ended() == b""


async def test_how_long_a_session_may_still_live_is_shown() -> None:
    async with controlled() as control:
        await control.put("sessions/n", {"ttl": 1000, "idle_ttl": 100})
        seen = await control.get("sessions/n")
        assert (seen["ttl"], seen["idle_ttl"]) == (1000, 100)
        assert 990 < seen["ttl_left"] <= 1000
        assert 90 < seen["idle_ttl_left"] <= 100


async def test_the_disk_s_image_that_went_is_told_by_its_cause() -> None:
    async with controlled() as control:
        with pytest.raises(OSError, match="cannot open disk vdb: /x: No such file") as missing:
            await control.sessions.add_disk("vdb", "/x")
        assert missing.value.errno == errno.EINVAL


async def test_a_listener_that_does_not_keep_up_is_told_what_it_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events_module, "WAITING_MAX", 3)
    events = Events()
    listener = events.listen()
    for number in range(5):
        events.tell(SESSION_FINISHED, number=number)
    lost = await listener.next()
    assert lost is not None
    assert (lost["event"], lost["count"]) == (EVENTS_LOST, 2)
    left = [await listener.next() for _ in range(3)]
    assert [event and event["number"] for event in left] == [2, 3, 4]
    events.end()
    assert await listener.next() is None
    assert await events.listen().next() is None
