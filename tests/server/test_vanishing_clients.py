"""A client that dies at any byte leaves nothing behind, and nothing half done."""

import asyncio
import errno

import pytest

from fleecenbd.engine.session import SessionOptions
from fleecenbd.server.limits import ServerLimits
from tests.nbd import wire
from tests.server.room import CLUSTER, MODES, SIZE, pattern, room

OLD, NEW = b"o" * 512, b"n" * 512


def conversation(export: str, mode: str) -> bytes:
    """Everything a client says, from its flags to DISC."""
    extended = mode == wire.EXTENDED
    said = wire.client_flags()
    if mode != wire.SIMPLE:
        said += wire.option(11 if extended else 8)
        said += wire.option(10, wire.meta_data(export, "base:allocation"))
    said += wire.option(3) + wire.option(7, wire.info_data(export, 3))
    requests: list[tuple[int, int, int, int, bytes]] = [
        (wire.READ, 0, 4096, 0, b""),
        (wire.WRITE, 100, 64, 0, b"w" * 64),
        (wire.WRITE, 8192, 64, wire.FUA, b"f" * 64),
        (wire.TRIM, CLUSTER * 4, CLUSTER, 0, b""),
        (wire.WRITE_ZEROES, CLUSTER * 5, CLUSTER, 0, b""),
        (wire.FLUSH, 0, 0, 0, b""),
        (wire.READ, CLUSTER * 7, CLUSTER * 2, 0, b""),
    ]
    if mode != wire.SIMPLE:
        requests.append((wire.BLOCK_STATUS, 0, SIZE, 0, b""))
    requests.append((wire.DISC, 0, 0, 0, b""))
    for cookie, (command, offset, length, flags, payload) in enumerate(requests):
        said += wire.request(
            command, cookie, offset, length, flags=flags, payload=payload, extended=extended
        )
    return said


@pytest.mark.parametrize("export", ["vda", "vda@n"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
async def test_a_client_may_die_at_any_byte(export: str, mode: str, later: bool) -> None:
    said = conversation(export, mode)
    async with room(session="n", shared=0) as served:
        tasks = asyncio.all_tasks()
        for first in range(0, len(said) + 1, 24):
            if later:
                for device in served.devices.values():
                    device.gate("read", "write", "zero", "trim", "flush", "extents")
            for length in range(first, min(first + 24, len(said) + 1)):
                client = served.dial()
                await client.send(said[:length])
                if length % 2 and length < len(said):
                    client.vanish()  # before the server has seen it, perhaps
            await served.settled()
            for client in served.clients:
                client.vanish()
            served.clients.clear()
            await served.settled()
            for device in served.devices.values():
                device.open()
            await served.gone()
            await served.tasks_ended(tasks)
            assert served.charged == (0, 0)
            survivor = await served.client(export)
            assert await survivor.read(SIZE - 16, 16) == pattern(SIZE)[-16:]
        device = served.devices["vda"]
        if export == "vda":
            # The whole conversation was heard in the end, and every write in it is whole.
            assert device.content[100:164] == b"w" * 64
            assert device.content[8192 : 8192 + 64] == b"f" * 64
            assert device.content[CLUSTER * 5 : CLUSTER * 6] == bytes(CLUSTER)
            assert "flush 0+0" in device.log
        else:
            assert device.content == pattern(SIZE)


async def test_a_write_in_flight_ends_whole_though_its_guest_is_gone() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write", "flush")
        guest = await served.client("vda")
        await guest.post(wire.WRITE, 0, payload=NEW, flags=wire.FUA)
        write = await device.reached("write")
        guest.vanish()
        await served.gone()
        write.go()
        (await device.reached("flush")).go()
        assert device.content[:512] == NEW
        assert device.log == ["write 0+512", "flush 0+0"]


@pytest.mark.parametrize("shared", [1, 0])
async def test_a_guests_old_write_does_not_land_after_a_new_one_that_was_acknowledged(
    shared: int,
) -> None:
    async with room(shared=shared) as served:
        device = served.devices["vda"]
        device.gate("write")
        before = await served.client("vda")
        await before.post(wire.WRITE, 0, payload=OLD)
        old = await device.reached("write")
        before.vanish()
        await served.gone()

        after = await served.client("vda")
        await after.post(wire.WRITE, 0, payload=NEW)
        await served.settled()
        assert device.log == ["write 0+512"], "the new write waits for the old one"
        old.go()
        (await device.reached("write")).go()
        assert (await after.reply()).error == 0
        assert device.content[:512] == NEW


async def test_a_write_that_waits_for_a_copy_is_a_predecessor_too() -> None:
    async with room(session="n") as served:
        temp = served.devices["vda@n"]
        temp.gate("write")
        before = await served.client("vda")
        await before.post(wire.WRITE, 0, payload=OLD)
        copy = await temp.reached("write")
        before.vanish()
        await served.gone()
        after = await served.client("vda")
        await after.post(wire.WRITE, 0, payload=NEW)
        await served.settled()
        assert after.is_quiet()
        copy.go()
        assert (await after.reply()).error == 0
        assert served.devices["vda"].content[:512] == NEW


@pytest.mark.parametrize("shared", [1, 0])
async def test_what_a_dead_guest_sent_and_was_not_let_in_is_never_served(shared: int) -> None:
    limits = ServerLimits(requests_max=1)
    async with room(shared=shared, limits=limits) as served:
        device = served.devices["vda"]
        device.gate("write")
        before = await served.client("vda")
        await before.post(wire.WRITE, 0, payload=OLD)
        old = await device.reached("write")
        # The limit is reached, so the server does not read on, and does not see the end.
        await before.post(wire.WRITE, 0, payload=OLD)
        await before.post(wire.WRITE, 512, payload=OLD)
        await served.settled()
        assert served.connection("vda").channel.read_paused
        before.vanish()

        after = await served.client("vda")
        await after.post(wire.WRITE, 512, payload=NEW)
        old.go()
        (await device.reached("write")).go()
        assert (await after.reply()).error == 0
        device.open()
        await served.settled()
        assert device.content[:1024] == OLD + NEW
        assert device.log == ["write 0+512", "write 512+512"]


async def test_a_guest_that_dies_while_it_waits_for_its_predecessor_is_in_nobodys_way() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        first = await served.client("vda")
        await first.post(wire.WRITE, 0, payload=OLD)
        old = await device.reached("write")
        first.vanish()
        await served.gone()
        second = await served.client("vda")
        await second.post(wire.WRITE, 0, payload=OLD)
        await served.settled()
        second.vanish()
        third = await served.client("vda")
        await third.post(wire.WRITE, 0, payload=NEW)
        await served.settled()
        old.go()
        (await device.reached("write")).go()
        assert (await third.reply()).error == 0
        assert device.content[:512] == NEW
        assert device.log == ["write 0+512"] * 2


async def test_a_vanished_guests_reads_hold_up_nobody_for_ever() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("read")
        before = await served.client("vda")
        await before.post(wire.READ, 0, 512)
        read = await device.reached("read")
        before.vanish()
        await served.gone()
        after = await served.client("vda")
        await after.post(wire.WRITE, 0, payload=NEW)
        read.go()
        assert (await after.reply()).error == 0


async def test_a_vanished_backups_trim_still_frees() -> None:
    async with room(session="n") as served:
        temp = served.devices["vda@n"]
        guest = await served.client("vda")
        await guest.write(0, NEW)
        temp.gate("trim")
        backup = await served.client("vda@n")
        await backup.post(wire.TRIM, 0, CLUSTER)
        punch = await temp.reached("trim")
        connection = served.connection("vda@n")
        backup.vanish()
        await served.gone([connection])
        assert temp.holds(0, CLUSTER)
        punch.go()
        again = await served.client("vda@n")
        refused = await again.ask(wire.READ, 0, 512)
        assert refused.error == errno.EINVAL
        assert not temp.holds(0, CLUSTER)


async def test_a_vanished_backups_trim_that_waits_for_a_read_still_frees() -> None:
    async with room(session="n") as served:
        temp = served.devices["vda@n"]
        guest = await served.client("vda")
        await guest.write(0, NEW)
        temp.gate("read")
        reader, trimmer = await served.client("vda@n"), await served.client("vda@n")
        await reader.post(wire.READ, 0, 512)
        read = await temp.reached("read")
        await trimmer.post(wire.TRIM, 0, CLUSTER)
        await served.settled()
        reader.vanish()
        trimmer.vanish()
        await served.gone([served.connection("vda@n"), served.connection("vda@n", 1)])
        assert temp.holds(0, CLUSTER)
        read.go()
        await served.settled()
        assert not temp.holds(0, CLUSTER)


async def test_a_vanished_backups_reads_thaw() -> None:
    async with room(session="n", options=SessionOptions(cbw_timeout_s=0)) as served:
        device = served.devices["vda"]
        guest = await served.client("vda")
        backup = await served.client("vda@n")
        device.gate("read", where=lambda offset, length: length == 1024)
        await backup.post(wire.READ, 0, 1024)
        read = await device.reached("read")
        await guest.post(wire.WRITE, 0, payload=NEW)
        await served.settled()
        assert guest.is_quiet(), "the write waits for the frozen read"
        connection = served.connection("vda@n")
        backup.vanish()
        await served.gone([connection])
        read.go()
        assert (await guest.reply()).error == 0
