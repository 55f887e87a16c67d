"""What the log tells an admin: clients seldom show the text that the server sends them."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from fleecenbd.server.failures import FAILURES_LOGGED
from tests.nbd import wire

from .room import room


async def test_a_guests_failed_requests_are_logged_with_their_cause_and_not_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with room() as served:
        served.devices["vda"].gate("write")
        guest = await served.client("vda")
        for _ in range(FAILURES_LOGGED + 3):
            await guest.post(wire.WRITE, 4096, payload=b"x" * 512)
            (await served.devices["vda"].reached("write")).fail(errno.ENOSPC)
            assert (await guest.reply()).error == errno.ENOSPC
    told = [record for record in caplog.records if "failed" in record.getMessage()]
    assert len(told) == FAILURES_LOGGED
    assert all(record.levelno == logging.WARNING for record in told)
    first, last = told[0].getMessage(), told[-1].getMessage()
    assert "WRITE of 512 bytes at 4096 of vda failed: write failed by the test" in first
    assert "further ones are not logged" in last


async def test_a_backups_refused_read_is_logged_with_the_reason_under_run_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    async with room(session="n") as served:
        backup = await served.client("vda@n")
        assert (await backup.ask(wire.TRIM, 0, 4096)).error == 0
        assert (await backup.ask(wire.READ, 0, 512)).error == errno.EINVAL
    assert "released, by a TRIM" in caplog.text


async def test_a_refused_client_is_logged_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with room() as served:
        first = await served.client("vda")
        assert await (await served.connect()).try_go("vda") is not None
        assert await (await served.connect()).try_go("nothing") is not None
        assert "in use by" in caplog.text
        assert "no export called 'nothing'" in caplog.text
        assert (await first.ask(wire.FLUSH)).error == 0


async def test_any_number_of_clients_may_read_what_nobody_can_write() -> None:
    async with room(read_only=True) as served:
        clients = [await served.client("vda") for _ in range(3)]
        for client in clients:
            assert len(await client.read(0, 512)) == 512


async def test_a_broken_sessions_export_is_listed_as_broken() -> None:
    async with room(session="n") as served:
        fleece = served.server.sessions["n"].fleeces[0]
        fleece.state.break_session("a test")
        listed = dict(served.server.clients.list_exports(False))
        assert listed["vda@n"].endswith(", broken")


async def test_a_stop_tells_which_image_could_not_be_synced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with room(disks=("vda", "vdb")) as served:
        device = served.devices["vdb"]
        device.gate("flush")
        stopping = asyncio.ensure_future(served.server.stop())
        (await device.reached("flush")).fail(errno.EIO)
        assert await stopping is False
    assert "vdb is not synced" in caplog.text
    assert "vda is not synced" not in caplog.text


async def test_a_stop_that_synced_all_is_a_good_one() -> None:
    async with room(disks=("vda", "vdb")) as served:
        assert await served.server.stop() is True
