"""Server: listening, and stopping so that a guest feels nothing but a pause."""

import asyncio
import errno
import os
import resource
import socket
import time

import pytest

from fleecenbd.engine.session import SessionOptions
from fleecenbd.server import ending, listeners
from fleecenbd.server.limits import ServerLimits
from tests.nbd import wire
from tests.server.room import SIZE, Room, pattern, room, tight

SHORT_S = 0.05


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "CLOSE_DEADLINE_S", SHORT_S)


async def stop(served: Room, deadline_s: float = 5.0) -> float:
    """Stop the server; seconds that it took."""
    started = time.monotonic()
    await served.server.stop(deadline_s=deadline_s)
    return time.monotonic() - started


# -- listening


async def test_out_of_descriptors_the_server_goes_on_and_accepts_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listeners, "ACCEPT_PAUSE_S", 0.02)
    async with room() as served:
        guest = await served.client("vda")
        client = served.dial()
        await served.settled()
        # It was accepted; the next one is not. What is free now is the lowest descriptor.
        waiting = served.dial()
        free = os.dup(0)
        os.close(free)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            while "no connection can be accepted: Too many open files" not in caplog.text:
                assert await guest.read(0, 512) == pattern(512)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(await waiting.receive_exactly(18)) == 18
        assert len(await client.receive_exactly(18)) == 18


async def test_a_client_on_a_connected_socket_is_served_until_it_goes() -> None:
    async with room() as served:
        ours, theirs = socket.socketpair()
        serving = asyncio.ensure_future(served.server.serve_connected(theirs))
        ours.setblocking(False)
        client = await served.adopt(ours).greet()
        assert await client.try_go("vda") is None
        assert await client.read(0, 512) == pattern(512)
        assert not serving.done()
        client.vanish()
        await asyncio.wait_for(serving, 5)


async def test_tcp_clients_are_named_by_their_address_and_kept_alive() -> None:
    async with room() as served:
        listener = socket.create_server(("127.0.0.1", 0))
        served.server.listen(listener)
        ours = socket.create_connection(listener.getsockname())
        ours.setblocking(False)
        client = await served.adopt(ours).greet()
        assert await client.try_go("vda") is None
        connection = served.connection("vda")
        host, port = ours.getsockname()
        assert connection.peer == f"{host}:{port}"
        assert connection._transport is not None
        theirs = connection._transport.get_extra_info("socket")
        assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert await client.read(0, SIZE) == pattern(SIZE)


async def test_a_tcp_client_that_resets_is_gone() -> None:
    async with room() as served:
        listener = socket.create_server(("127.0.0.1", 0))
        served.server.listen(listener)
        ours = socket.create_connection(listener.getsockname())
        ours.setblocking(False)
        client = await served.adopt(ours).greet()
        assert await client.try_go("vda") is None
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.vanish()
        await served.gone()
        assert await (await served.client("vda")).read(0, 512) == pattern(512)


# -- stopping


async def test_a_stop_lets_requests_in_flight_end_and_answers_them() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write", "read")
        guest = await served.client("vda")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        await guest.post(wire.READ, 1024, 512)
        write, read = await device.reached("write"), await device.reached("read")
        stopping = asyncio.ensure_future(stop(served))
        write.go()
        assert (await guest.reply()).error == 0
        assert not stopping.done()
        read.go()
        assert (await guest.reply()).data == pattern(SIZE)[1024:1536]
        assert await guest.ended() == b""
        await stopping
        assert device.content[:512] == b"d" * 512
        assert device.closed


async def test_the_rest_of_a_guests_requests_stays_without_reply() -> None:
    async with room(limits=ServerLimits(requests_max=2)) as served:
        device = served.devices["vda"]
        device.gate("write")
        guest = await served.client("vda")
        for index in range(5):
            await guest.post(wire.WRITE, index * 512, payload=b"d" * 512)
        await device.reached("write")
        stopping = asyncio.ensure_future(stop(served))
        await asyncio.sleep(0)
        await guest.post(wire.WRITE, 5 * 512, payload=b"d" * 512)
        device.open()
        seen = [await guest.reply(), await guest.reply()]
        assert [reply.error for reply in seen] == [0, 0]
        assert await guest.ended() == b"", "no word about the rest, not even ESHUTDOWN"
        await stopping
        assert device.log == ["write 0+512", "write 512+512", "flush 0+0"]


async def test_a_guest_stays_connected_until_its_data_is_durable() -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda")
        device.gate("write", "flush")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        write = await device.reached("write")
        stopping = asyncio.ensure_future(stop(served))
        await asyncio.sleep(0)
        write.go()
        flush = await device.reached("flush")
        assert (await guest.reply()).error == 0
        for _ in range(50):
            await asyncio.sleep(0)
        assert guest.is_quiet(), "and is not told anything"
        flush.go()
        assert await guest.ended() == b""
        await stopping
        assert device.log == ["write 0+512", "flush 0+0"]


async def test_the_deadline_holds_though_a_device_hangs(short_deadlines: None) -> None:
    async with room(disks=("vda", "vdb"), session="n") as served:
        hung, well = served.devices["vda"], served.devices["vdb"]
        guests = [await served.client("vda"), await served.client("vdb")]
        backup = await served.client("vda@n")
        hung.gate("write", "flush")
        hung.gate("read", where=lambda offset, length: length == 512)
        await guests[0].post(wire.WRITE, 0, payload=b"d" * 512)
        await backup.post(wire.READ, 8192, 512)
        await served.settled()
        before = asyncio.all_tasks()
        assert await stop(served, SHORT_S) < 2.0
        assert (await backup.reply()).error == errno.ESHUTDOWN
        for client in (*guests, backup):
            assert await client.ended() == b""
        assert "flush 0+0" in well.log
        assert well.closed
        assert hung.waiting, "the hung calls go on"
        assert asyncio.all_tasks() <= before, "and nobody else waits for them"


async def test_a_temp_image_that_hangs_does_not_hold_up_a_stop() -> None:
    async with room(session="n", options=SessionOptions(cbw_timeout_s=0)) as served:
        temp = served.devices["vda@n"]
        guest, backup = await served.client("vda"), await served.client("vda@n")
        await guest.write(512, b"d")
        temp.gate("write", "read")
        await guest.post(wire.WRITE, 8192, payload=b"d" * 512)
        await backup.post(wire.READ, 512, 512)
        await temp.reached("write")
        await temp.reached("read")
        assert await stop(served, deadline_s=60.0) < 5.0
        assert (await guest.reply()).error == 0
        assert await guest.ended() == b""
        assert (await backup.reply()).error == errno.ESHUTDOWN
        assert await backup.ended() == b""
        assert len(temp.waiting) == 2


async def test_a_stop_waits_for_writes_whose_guest_has_vanished() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        guest = await served.client("vda")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        write = await device.reached("write")
        guest.vanish()
        await served.gone()
        stopping = asyncio.ensure_future(stop(served))
        for _ in range(50):
            await asyncio.sleep(0)
        assert device.log == ["write 0+512"]
        write.go()
        await stopping
        assert device.log == ["write 0+512", "flush 0+0"]


async def test_a_stop_does_not_wait_for_a_client_that_does_not_read(
    short_deadlines: None,
) -> None:
    limits = tight(send_high_water=4096)
    async with room(session="n", limits=limits) as served:
        clients = [await served.client("vda"), await served.client("vda@n")]
        for client in clients:
            for _ in range(10):
                await client.post(wire.READ, 0, SIZE)
        await served.settled()
        assert await stop(served) < 2.0
        assert served.server.clients.connections == {}


async def test_clients_in_their_handshake_are_dropped_by_a_stop_and_none_is_accepted() -> None:
    async with room() as served:
        silent, half = served.dial(), await served.connect()
        await silent.receive_exactly(18)
        stopping = asyncio.ensure_future(stop(served))
        late = served.dial()
        for client in (silent, half, late):
            assert await client.ended() == b""
        await stopping
        with pytest.raises(ConnectionRefusedError):
            served.dial()


async def test_connections_that_were_just_accepted_are_stopped_too() -> None:
    async with room() as served:
        clients = [served.dial() for _ in range(30)]
        # A turn of the loop accepts some; their protocols are not connected yet.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await stop(served)
        for client in clients:
            await client.ended()
        assert served.server.clients.connections == {}


async def test_a_sync_that_fails_is_told_and_the_stop_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with room(disks=("vda", "vdb")) as served:
        device = served.devices["vda"]
        device.gate("flush")
        stopping = asyncio.ensure_future(stop(served))
        (await device.reached("flush")).fail(errno.EIO)
        await stopping
        assert "vda could not be synced: flush failed by the test" in caplog.text
        assert "flush 0+0" in served.devices["vdb"].log


async def test_a_read_only_disk_is_not_synced() -> None:
    async with room(read_only=True) as served:
        await stop(served)
        assert served.devices["vda"].log == []
        assert served.devices["vda"].closed


async def test_a_session_cannot_begin_while_the_server_stops() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        guest = await served.client("vda")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        write = await device.reached("write")
        beginning = asyncio.ensure_future(served.begin("n"))
        await served.settled()
        stopping = asyncio.ensure_future(stop(served))
        await asyncio.sleep(0)
        write.go()
        with pytest.raises(OSError, match="session n cannot begin: the server is stopping"):
            await beginning
        await stopping
        assert served.server.disks["vda"].fleeces == []
        assert served.devices["vda@n"].closed


async def test_an_abort_closes_everything_at_once_and_lets_calls_go_on() -> None:
    async with room(session="n") as served:
        device = served.devices["vda"]
        device.gate("write", "read")
        guest, backup, half = (
            await served.client("vda"),
            await served.client("vda@n"),
            await served.connect(),
        )
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        await backup.post(wire.READ, 8192, 512)
        await served.settled()
        served.server.abort()
        served.server.abort()
        for client in (guest, backup, half):
            assert await client.ended() == b""
        assert len(device.waiting) == 2
        assert device.closed
        assert served.server.sessions == {}


async def test_a_stop_that_is_cut_short_leaves_no_waiting_behind() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        guest = await served.client("vda")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        await device.reached("write")
        before = asyncio.all_tasks()
        stopping = asyncio.ensure_future(served.server.stop(deadline_s=60))
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        served.server.abort()
        assert await guest.ended() == b""
        assert asyncio.all_tasks() <= before
