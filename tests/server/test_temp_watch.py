"""Temp images that fill up: told once when they are low, and when they are full."""

import asyncio
import errno
from typing import Any

import pytest

from fleecenbd.server import temp_watch
from fleecenbd.server.temp_watch import TempWatch
from tests.nbd import wire
from tests.server.controlled import Control, controlled
from tests.server.room import CLUSTER

LIMIT = 10 * CLUSTER


def _told(events: Any) -> list[tuple[str, int]]:
    return [(event["event"], event["used"]) for event in events._waiting if "used" in event]


async def _fill(control: Control, first: int, end: int) -> None:
    guest = control.served.clients[0]
    for cluster in range(first, end):
        await guest.write(cluster * CLUSTER, b"x" * CLUSTER)


async def test_low_and_full_are_told_once_each() -> None:
    async with controlled() as control:
        await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": LIMIT})
        events = control.served.server.events.listen()
        watch = TempWatch(control.served.server)
        await _fill(control, 0, 7)
        watch.look()
        assert _told(events) == []
        await _fill(control, 7, 8)
        watch.look()
        watch.look()
        assert _told(events) == [("temp-low", 8 * CLUSTER)]
        await _fill(control, 8, 11)
        watch.look()
        watch.look()
        assert _told(events)[1:] == [("temp-full", 10 * CLUSTER)]


async def test_a_limit_below_what_is_held_is_full_at_once() -> None:
    async with controlled() as control:
        await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": LIMIT})
        events = control.served.server.events.listen()
        watch = TempWatch(control.served.server)
        await _fill(control, 0, 5)
        await control.call("PATCH", "sessions/n", {"temp_limit": 2 * CLUSTER})
        watch.look()
        await _fill(control, 5, 6)  # breaks it
        watch.look()
        assert _told(events)[0] == ("temp-full", 5 * CLUSTER)
        assert [kind for kind, _ in _told(events)].count("temp-low") == 0


async def test_low_is_told_again_after_a_release() -> None:
    async with controlled() as control:
        await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": LIMIT})
        events = control.served.server.events.listen()
        watch = TempWatch(control.served.server)
        await _fill(control, 0, 9)
        watch.look()
        backup = await control.served.client("vda@n")
        assert (await backup.ask(wire.TRIM, 0, 4 * CLUSTER)).error == 0
        watch.look()
        await _fill(control, 9, 13)
        watch.look()
        assert [kind for kind, _ in _told(events)] == ["temp-low", "temp-low"]


async def test_full_is_told_again_only_after_there_was_room() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        body = {"temp_limit": LIMIT, "on_cbw_error": "break-guest-write"}
        await control.put("sessions/n", body)
        events = control.served.server.events.listen()
        watch = TempWatch(control.served.server)

        async def fails(cluster: int) -> None:
            payload = b"x" * CLUSTER
            reply = await guest.ask(wire.WRITE, cluster * CLUSTER, 0, payload=payload)
            assert reply.error == errno.EIO
            watch.look()

        await _fill(control, 0, 10)
        for _ in range(3):
            await fails(10)
            watch.look()
        full = [("temp-full", 10 * CLUSTER)]
        assert _told(events) == full
        await control.call("PATCH", "sessions/n", {"temp_limit": 12 * CLUSTER})
        watch.look()
        await _fill(control, 10, 12)
        for _ in range(3):
            await fails(12)
        assert [told for told in _told(events) if told[0] == "temp-full"] == [
            *full,
            ("temp-full", 12 * CLUSTER),
        ]


async def test_it_looks_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(temp_watch, "INTERVAL_S", 0.01)
    async with controlled() as control:
        await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": LIMIT})
        events = control.served.server.events.listen()
        watch = TempWatch(control.served.server)
        watch.start()
        await _fill(control, 0, 9)
        async with asyncio.timeout(10):
            while (event := await events.next()) and event["event"] != "temp-low":
                pass
        assert event is not None
        watch.stop()
        assert watch._timer is None
