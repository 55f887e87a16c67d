"""Disks that come and go while guests run."""

import asyncio
import errno

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.server import server as server_module
from fleecenbd.storage.memory import MemoryDevice
from tests.nbd import wire
from tests.server.room import pattern, room
from tests.simulation.gated import GatedDevice


def _flushes(device: GatedDevice) -> int:
    return sum(call.startswith("flush") for call in device.log)


async def test_a_disk_that_was_added_is_served_at_once() -> None:
    async with room() as served:
        client = await served.connect()
        refused = await client.try_go("vdb")
        assert refused is not None
        served.add_disk("vdb")
        assert await client.try_go("vdb") is None
        assert await client.read(0, 512) == pattern(512)


async def test_a_disk_that_was_removed_is_synced_closed_and_not_served_any_more() -> None:
    async with room(disks=("vda", "vdb")) as served:
        guest = await served.client("vdb")
        await guest.write(0, b"x" * 512)
        connection = served.connection("vdb")
        guest.vanish()
        await served.gone([connection])
        await served.server.remove_disk("vdb")
        device = served.devices["vdb"]
        assert device.closed
        assert _flushes(device) == 1
        refused = await (await served.connect()).try_go("vdb")
        assert refused is not None
        assert refused.text == "there is no export called 'vdb'"
        assert await (await served.client("vda")).read(0, 512) == pattern(512)
        with pytest.raises(OSError, match="there is no disk called 'vdb'") as missing:
            await served.server.remove_disk("vdb")
        assert missing.value.errno == errno.ENOENT


async def test_a_disk_in_use_by_a_guest_is_not_removed() -> None:
    async with room() as served:
        guest = await served.client("vda")
        with pytest.raises(OSError, match=r"disk vda is in use by pid \d+; end that guest") as used:
            await served.server.remove_disk("vda")
        assert used.value.errno == errno.EBUSY
        await guest.write(0, b"x" * 512)


async def test_a_disk_in_a_session_is_not_removed_not_even_while_that_begins() -> None:
    async with room() as served:
        await served.begin("n")
        with pytest.raises(OSError, match="disk vda is in session n; finish that first"):
            await served.server.remove_disk("vda")
        served.server.finish("n")
        guest = await served.client("vda")
        device = served.devices["vda"]
        device.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"1" * 512)
        write = await device.reached("write")
        connection = served.connection("vda")
        guest.vanish()
        await served.gone([connection])
        beginning = asyncio.ensure_future(served.begin("m"))
        await served.settled()
        with pytest.raises(OSError, match="disk vda is in session m"):
            await served.server.remove_disk("vda")
        write.go()
        await beginning
        await served.settled()


async def test_what_a_vanished_guest_left_in_flight_is_waited_for() -> None:
    async with room() as served:
        guest = await served.client("vda")
        device = served.devices["vda"]
        device.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"1" * 512)
        write = await device.reached("write")
        connection = served.connection("vda")
        guest.vanish()
        await served.gone([connection])
        removing = asyncio.ensure_future(served.server.remove_disk("vda"))
        await served.settled()
        assert _flushes(device) == 0, "what the guest wrote is to be synced, too"
        write.go()
        await removing
        await served.settled()
        assert _flushes(device) == 1


async def test_a_disk_that_hangs_is_removed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STOP_DEADLINE_S", 0.05)
    async with room() as served:
        served.devices["vda"].gate("flush")
        guest = await served.client("vda")
        await guest.write(0, b"x")
        connection = served.connection("vda")
        guest.vanish()
        await served.gone([connection])
        with pytest.raises(OSError, match="its image hangs"):
            await served.server.remove_disk("vda")
        assert "vda" not in served.server.disks


async def test_no_disk_comes_to_a_server_that_stops() -> None:
    async with room() as served:
        served.server.abort()
        with pytest.raises(OSError, match="disk vdb cannot come: the server is stopping"):
            served.server.add_disk(Disk("vdb", MemoryDevice(4096, name="vdb")))


async def test_a_session_over_no_disk_or_over_one_twice_is_refused() -> None:
    async with room() as served:
        with pytest.raises(OSError, match="session n would be over no disk"):
            await served.begin("n", [])
        with pytest.raises(OSError, match="a disk is named twice"):
            await served.begin("n", ["vda", "vda"])
        assert served.server.sessions == {}
