"""Sessions as their clients see them: begun, broken, finished, again and again."""

import asyncio
import errno

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions
from fleecenbd.server.limits import ServerLimits
from fleecenbd.storage.device import Device
from tests.nbd import wire
from tests.server.controlled import controlled
from tests.server.room import CLUSTER, MODES, SIZE, Client, Room, pattern, room, tight
from tests.simulation.gated import GatedDevice

in_every_mode = pytest.mark.parametrize("mode", MODES)


async def break_session(served: Room, guest: Client, offset: int = SIZE - 512) -> None:
    """A guest's write whose old data cannot be copied."""
    temp = served.devices["vda@n"]
    temp.gate("write")
    await guest.post(wire.WRITE, offset, payload=b"!" * 512)
    (await temp.reached("write")).fail(errno.EIO)
    assert (await guest.reply()).error == 0


@in_every_mode
async def test_a_break_fails_requests_in_flight_at_once_and_keeps_the_connection(mode: str) -> None:
    async with room(session="n") as served:
        guest = await served.client("vda")
        contexts = [] if mode == wire.SIMPLE else ["base:allocation"]
        backup = await served.client("vda@n", mode, *contexts)
        temp, active = served.devices["vda@n"], served.devices["vda"]
        await guest.write(0, b"!" * CLUSTER)
        temp.gate("read", "trim")
        active.gate("extents")
        in_flight = {await backup.post(wire.READ, 0, 512)}
        await temp.reached("read")
        in_flight.add(await backup.post(wire.TRIM, 0, CLUSTER))
        if contexts:
            in_flight.add(await backup.post(wire.BLOCK_STATUS, 0, SIZE))
            await active.reached("extents")
        await break_session(served, guest)
        for _ in range(len(in_flight)):
            reply = await backup.reply()
            in_flight.remove(reply.cookie)
            assert reply.error == errno.EIO
            if mode != wire.SIMPLE:
                assert reply.text == (
                    "vda@n is broken: old data could not be copied: write failed by the test"
                )
        assert temp.waiting, "the calls themselves go on"
        again = await backup.ask(wire.READ, 0, 512)
        assert again.error == errno.EIO
        assert (await backup.ask(wire.TRIM, 0, CLUSTER)).error == errno.EIO
        assert (await backup.ask(wire.FLUSH)).error == 0


async def test_what_hangs_in_a_broken_session_does_not_keep_its_client_from_the_answer() -> None:
    async with room(session="n", limits=ServerLimits(requests_max=4, bytes_max=4096)) as served:
        guest = await served.client("vda")
        backup = await served.client("vda@n")
        active = served.devices["vda"]
        active.gate("read", where=lambda offset, length: length == 1024)
        for _ in range(12):
            await backup.post(wire.READ, 0, 1024)
        await served.settled()
        assert len(active.waiting) == 4
        await break_session(served, guest)
        assert [(await backup.reply()).error for _ in range(12)] == [errno.EIO] * 12
        assert len(active.waiting) == 4
        assert served.charged == (0, 4096), "the calls still hold their memory"


@in_every_mode
async def test_finish_answers_what_is_in_flight_and_closes(mode: str) -> None:
    async with room(session="n") as served:
        active = served.devices["vda"]
        backup = await served.client("vda@n", mode)
        idle = await served.client("vda@n", mode)
        active.gate("read")
        await backup.post(wire.READ, 0, 512)
        await active.reached("read")
        served.server.finish("n")
        reply = await backup.reply()
        assert reply.error == errno.ESHUTDOWN
        if mode != wire.SIMPLE:
            assert reply.text == "vda@n: the session is finished"
        assert await backup.ended() == b""
        assert await idle.ended() == b""
        assert active.waiting, "the call itself goes on"


async def test_finish_answers_even_a_client_whose_socket_is_full() -> None:
    async with room(session="n", limits=tight(send_high_water=4096)) as served:
        active = served.devices["vda"]
        backup = await served.client("vda@n")
        active.gate("read", where=lambda offset, length: length == 1024)
        await backup.post(wire.READ, 0, 1024)
        for _ in range(30):
            _, read = backup.prepare(wire.READ, 0, 16 << 10)
            await backup.send(read)
        await served.settled()
        assert served.connection("vda@n").channel.send_paused
        served.server.finish("n")
        errors = []
        while not errors or errors[-1] == 0:
            errors.append((await backup.reply()).error)
        assert errors[-1] == errno.ESHUTDOWN
        assert len(errors) < 31, "what was not let in is not served"
        assert await backup.ended() == b""


async def test_a_finished_session_is_remembered_by_its_result() -> None:
    async with room(session="n") as served:
        served.server.finish("n", failed=True)
        refused = await (await served.connect()).try_go("vda@n")
        assert refused is not None
        assert (refused.kind, refused.text) == (
            wire.ERR_UNKNOWN,
            "'vda@n': session n is finished (failed)",
        )
        await served.begin("n")
        assert await (await served.client("vda@n")).read(0, 512) == pattern(512)
        served.server.finish("n")
        refused = await (await served.connect()).try_go("vda@n")
        assert refused is not None
        assert refused.text == "'vda@n': session n is finished (success)"


async def test_twenty_finished_sessions_are_remembered_however_many_disks_they_had() -> None:
    disks = [f"disk{number}" for number in range(25)]
    async with room(disks=disks) as served:
        for number in range(20):
            await served.begin(f"n{number}", disks if number == 0 else ["disk0"])
            served.server.finish(f"n{number}")
        client = await served.connect()
        for name in ("disk0@n0", "disk24@n0", "disk0@n19"):
            refused = await client.try_go(name)
            assert refused is not None
            assert "is finished (success)" in refused.text
        await served.begin("last")
        served.server.finish("last")
        refused = await client.try_go("disk0@n0")
        assert refused is not None
        assert refused.text == "there is no export called 'disk0@n0'"


async def test_a_broken_session_ends_as_failed() -> None:
    async with room(session="n") as served:
        guest, backup = await served.client("vda"), await served.client("vda@n")
        await break_session(served, guest)
        assert served.server.finish("n").failed
        assert await backup.ended() == b""


async def test_finish_does_not_wait_for_a_temp_image_that_hangs() -> None:
    async with room(session="n", options=SessionOptions(cbw_timeout_s=0)) as served:
        temp = served.devices["vda@n"]
        temp.gate("write", "read", "trim")
        guest, backup = await served.client("vda"), await served.client("vda@n")
        await guest.post(wire.WRITE, 0, payload=b"!" * 512)
        hung = await temp.reached("write")
        await served.settled()
        assert guest.is_quiet()
        served.server.finish("n")
        assert (await guest.reply()).error == 0, "no guest waits for a finished session"
        assert await backup.ended() == b""
        assert not hung.ended
        await served.begin("n")
        assert await (await served.client("vda@n")).read(0, 512) == b"!" * 512
        temp.open()


async def test_sessions_begin_and_finish_again_and_again_under_a_writing_guest() -> None:
    async with room() as served:
        guest = await served.client("vda")
        for number in range(1, 30):
            session = await served.begin("n")
            backup = await served.client("vda@n")
            before = await guest.read(0, 512)
            await guest.write(0, bytes([number]) * 512)
            assert await backup.read(0, 512) == before
            served.server.finish("n")
            assert await backup.ended() == b""
            await asyncio.wait_for(session.wait_closed(), 5)
            assert served.devices["vda@n"].closed
        assert served.server.sessions == {}
        assert served.server.disks["vda"].fleeces == []


async def test_two_sessions_over_two_disks_keep_their_own_moments() -> None:
    async with room(disks=("vda", "vdb")) as served:
        guests = {name: await served.client(name) for name in ("vda", "vdb")}
        await served.begin("early")
        for guest in guests.values():
            await guest.write(0, b"1" * CLUSTER)
        await served.begin("late")
        for guest in guests.values():
            await guest.write(0, b"2" * CLUSTER)
        for name in ("vda", "vdb"):
            early = await served.client(f"{name}@early")
            late = await served.client(f"{name}@late")
            assert await early.read(0, CLUSTER) == pattern(CLUSTER)
            assert await late.read(0, CLUSTER) == b"1" * CLUSTER
            assert (await early.ask(wire.TRIM, 0, CLUSTER)).error == 0
            assert await late.read(0, CLUSTER) == b"1" * CLUSTER
        left = [await served.client(f"{name}@late") for name in ("vda", "vdb")]
        served.server.finish("early")
        for backup in left:
            assert await backup.read(0, CLUSTER) == b"1" * CLUSTER
        assert await guests["vdb"].read(0, 1) == b"2"


async def test_a_name_that_is_taken_and_a_disk_that_is_not_there_are_refused() -> None:
    async with room(session="n") as served:
        with pytest.raises(OSError, match="there is a session called n already") as taken:
            await served.begin("n")
        assert taken.value.errno == errno.EEXIST
        with pytest.raises(OSError, match="there is no disk called 'vdz'") as missing:
            await served.begin("m", ["vdz"])
        assert missing.value.errno == errno.ENOENT
        with pytest.raises(OSError, match="there is no session called 'm'"):
            served.server.finish("m")
        with pytest.raises(OSError, match="there is a disk called vda already"):
            served.add_disk("vda")
        assert list(served.server.sessions) == ["n"]


async def test_of_two_sessions_of_one_name_that_begin_at_once_one_is_refused() -> None:
    async with room() as served:
        temps: list[GatedDevice] = []

        async def slow_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
            await asyncio.sleep(0)
            temps.append(GatedDevice("temp", SIZE))
            return temps[-1]

        results = await asyncio.gather(
            *(served.server.begin("n", None, SessionOptions(), slow_temp) for _ in range(2)),
            return_exceptions=True,
        )
        assert [isinstance(result, OSError) for result in results] == [False, True]
        assert len(temps) == 1
        served.server.finish("n")
        assert served.server.disks["vda"].fleeces == []


async def test_a_session_that_could_not_begin_leaves_its_name_free() -> None:
    async with room() as served:

        async def no_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
            raise OSError(errno.ENOSPC, "no space for a temp image")

        for _ in range(2):
            with pytest.raises(OSError, match="no space for a temp image"):
                await served.server.begin("n", None, SessionOptions(), no_temp)
        await served.begin("n")
        assert await (await served.client("vda@n")).read(0, 512) == pattern(512)


async def test_a_guest_is_connected_all_the_while_a_session_comes_and_goes() -> None:
    async with room() as served:
        guest = await served.client("vda")
        device = served.devices["vda"]
        device.gate("write")
        first = await guest.post(wire.WRITE, 0, payload=b"1" * 512)
        write = await device.reached("write")
        beginning = asyncio.ensure_future(served.begin("n"))
        second = await guest.post(wire.WRITE, 512, payload=b"2" * 512)
        await served.settled()
        assert not beginning.done(), "a write is in flight"
        write.go()
        assert (await guest.reply()).cookie == first
        await beginning
        device.open()
        assert (await guest.reply()).cookie == second
        backup = await served.client("vda@n")
        assert await backup.read(0, 1024) == b"1" * 512 + pattern(SIZE)[512:1024]


async def test_a_session_that_broke_gets_no_other_limit() -> None:
    async with controlled() as control:
        await control.served.client("vda")
        await control.put("sessions/n", {"temp_limit": CLUSTER})
        guest = control.served.clients[0]
        for cluster in range(2):
            await guest.write(cluster * CLUSTER, b"x" * CLUSTER)
        assert control.served.server.sessions["n"].state == "broken"
        status, message = await control.refused("PATCH", "sessions/n", {"temp_limit": None})
        assert (status, message) == (
            409,
            "session n is broken: nothing is kept for it any more",
        )
