"""Connection: how one client's conversation begins and ends."""

import errno

import pytest

from fleecenbd.server.limits import ServerLimits
from tests.nbd import wire
from tests.server.room import MODES, SIZE, Client, Room, pattern, room, tight

in_every_mode = pytest.mark.parametrize("mode", MODES)


async def fill(served: Room, client: Client, export: str, *, length: int = SIZE) -> None:
    """Ask for data without reading any, until the kernel takes no more of it."""
    connection = served.connection(export)
    while connection.channel.sending_bytes == 0:
        _, data = client.prepare(wire.READ, 0, length)
        await client.send(data)
        await served.settled()


# -- the handshake


async def test_a_client_comes_in_by_go_or_by_export_name() -> None:
    async with room(shared=0) as served:
        for no_zeroes in (True, False):
            client = await served.dial().greet(no_zeroes=no_zeroes)
            await client.send(wire.option(1, b"vda"))
            answer = await client.receive_exactly(10 if no_zeroes else 134)
            assert answer[:8] == SIZE.to_bytes(8, "big")
            assert answer[10:] == bytes(0 if no_zeroes else 124)
            assert await client.read(0, 512) == pattern(512)


async def test_requests_may_come_right_behind_the_last_option() -> None:
    async with room() as served:
        client = await served.connect()
        _, read = client.prepare(wire.READ, 0, 512)
        await client.send(wire.option(7, wire.info_data("vda")) + read)
        await client.receive_exactly(20 + 12 + 20)
        assert (await client.reply()).data == pattern(512)


async def test_an_unknown_name_in_export_name_ends_the_connection() -> None:
    async with room() as served:
        client = await served.connect()
        await client.send(wire.option(1, b"nothing"))
        assert await client.ended() == b""


async def test_an_unknown_name_in_go_is_answered_and_another_may_be_tried() -> None:
    async with room() as served:
        client = await served.connect()
        refused = await client.try_go("nothing")
        assert refused is not None
        assert (refused.kind, refused.text) == (
            wire.ERR_UNKNOWN,
            "there is no export called 'nothing'",
        )
        assert await client.try_go("vda") is None


async def test_abort_is_acknowledged_and_closed() -> None:
    async with room() as served:
        client = await served.connect()
        (reply,) = await client.option(2)
        assert reply.kind == wire.ACK
        assert await client.ended() == b""


async def test_who_speaks_no_nbd_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with room() as served:
        for words in (b"GET / HTTP/1.1\r\n\r\n", wire.client_flags() + b"x" * 16):
            client = served.dial()
            await client.receive_exactly(18)
            await client.send(words)
            assert await client.ended() == b""
        assert caplog.text.count("no NBD handshake") == 2


async def test_a_handshake_that_takes_too_long_is_cut_off() -> None:
    async with room(limits=ServerLimits(handshake_timeout_s=0.02)) as served:
        silent, half = served.dial(), await served.connect()
        await half.send(b"IHAVE")
        await silent.receive_exactly(18)
        assert await silent.ended() == b""
        assert await half.ended() == b""


async def test_the_time_for_the_handshake_ends_with_it() -> None:
    async with room(limits=ServerLimits(handshake_timeout_s=0.05)) as served:
        client = await served.client("vda")
        late = served.dial()
        await late.receive_exactly(18)
        assert await late.ended() == b""
        assert await client.read(0, 512) == pattern(512)


async def test_a_client_that_reads_no_option_replies_is_not_read_either() -> None:
    limits = tight(send_high_water=4096)
    async with room(limits=limits, disks=[f"disk{number:02}" for number in range(40)]) as served:
        client = await served.connect()
        (connection,) = served.server.clients.connections
        sent = 0
        while not connection.channel.send_paused:
            await client.send(wire.option(3))
            await served.settled()
            sent += 1
        assert connection.channel.read_paused
        for _ in range(sent):
            names = []
            while len(names) < 41:
                header = await client.receive_exactly(20)
                names.append(await client.receive_exactly(int.from_bytes(header[16:], "big")))
        assert await client.try_go("disk00") is None
        assert await client.read(0, 512) == pattern(512)


# -- the end


@in_every_mode
async def test_disc_closes_at_once(mode: str) -> None:
    async with room() as served:
        client = await served.client("vda", mode)
        _, read = client.prepare(wire.READ, 0, 512)
        extended = mode == wire.EXTENDED
        await client.send(read + wire.request(wire.DISC, 9, extended=extended))
        assert (await client.reply()).data == pattern(512)
        assert await client.ended() == b""


async def test_disc_waits_for_what_is_in_flight() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write", "read")
        client = await served.client("vda")
        await client.post(wire.WRITE, 0, payload=b"d" * 512)
        await client.post(wire.READ, 512, 512)
        await client.send(wire.request(wire.DISC))
        (await device.reached("write")).go()
        assert (await client.reply()).error == 0
        await served.settled()
        assert client.is_quiet()
        (await device.reached("read")).go()
        assert (await client.reply()).data == pattern(SIZE)[512:1024]
        assert await client.ended() == b""


async def test_what_comes_after_disc_is_neither_served_nor_kept() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        client = await served.client("vda")
        await client.post(wire.WRITE, 0, payload=b"d" * 512)
        await client.send(wire.request(wire.DISC) + wire.request(wire.TRIM, 5, 0, 4096))
        for _ in range(16):
            await client.send(wire.request(wire.TRIM, 6, 0, 4096) * 1000)
            await served.settled()
        assert served.connection("vda").transmission.received_bytes < 64 << 10
        (await device.reached("write")).go()
        assert (await client.reply()).error == 0
        assert await client.ended() == b""
        assert device.log == ["write 0+512"]


async def ask_for_more_than_a_socket_holds(served: Room, client: Client) -> int:
    """READs, all in flight, then DISC; how many. The device holds them."""
    served.devices["vda"].gate("read")
    count = 20
    for index in range(count):
        await client.post(wire.READ, index, 32 << 10)
    await client.send(wire.request(wire.DISC))
    await served.settled()
    return count


async def test_who_says_disc_and_does_not_read_is_dropped_in_the_end() -> None:
    limits = tight(send_high_water=4096, linger_s=0.02)
    async with room(limits=limits) as served:
        client = await served.client("vda")
        await ask_for_more_than_a_socket_holds(served, client)
        connection = served.connection("vda")
        served.devices["vda"].open()
        await served.gone([connection])
        assert served.charged == (0, 0)


async def test_the_last_replies_may_take_their_time() -> None:
    async with room(limits=tight(send_high_water=4096)) as served:
        client = await served.client("vda")
        count = await ask_for_more_than_a_socket_holds(served, client)
        served.devices["vda"].open()
        assert len([await client.reply() for _ in range(count)]) == count
        assert await client.ended() == b""


async def test_half_a_connection_is_none() -> None:
    async with room(session="n") as served:
        device = served.devices["vda"]
        backup = await served.client("vda@n")
        device.gate("read")
        await backup.post(wire.READ, 0, 512)
        connection = served.connection("vda@n")
        backup.half_close()
        await served.gone([connection])
        device.open()


async def test_half_a_connection_is_none_even_where_replies_wait_to_be_read() -> None:
    async with room(limits=tight(), session="n") as served:
        backup = await served.client("vda@n")
        await fill(served, backup, "vda@n", length=8192)
        connection = served.connection("vda@n")
        assert not connection.channel.send_paused
        backup.half_close()
        await served.gone([connection])


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 28,
        wire.request(wire.READ, 2, 0, 512, extended=True),
        wire.request(wire.WRITE, 2, 0, (64 << 20) + 1),
    ],
    ids=["zeroes", "extended", "payload"],
)
async def test_who_breaks_the_protocol_is_answered_up_to_there_and_dropped(garbage: bytes) -> None:
    async with room() as served:
        client = await served.client("vda")
        _, read = client.prepare(wire.READ, 0, 512)
        await client.send(read + garbage)
        assert (await client.reply()).data == pattern(512)
        assert await client.ended() == b""


async def test_a_broken_protocol_does_not_break_off_a_write_in_flight() -> None:
    async with room() as served:
        device = served.devices["vda"]
        device.gate("write")
        client = await served.client("vda")
        await client.post(wire.WRITE, 0, payload=b"d" * 512)
        await client.send(bytes(28))
        assert await client.ended() == b""
        (await device.reached("write")).go()
        await served.gone()
        assert device.content[:512] == b"d" * 512


async def test_a_refused_write_leaves_the_next_request_where_it_is() -> None:
    async with room(session="n") as served:
        backup = await served.client("vda@n")
        for flags, error in ((0, errno.EPERM), (wire.FUA, errno.EINVAL), (0x8000, errno.EINVAL)):
            refused = await backup.ask(wire.WRITE, 0, payload=b"x" * 40000, flags=flags)
            assert refused.error == error
        assert await backup.read(0, 512) == pattern(512)


async def test_a_fault_of_ours_in_a_request_served_now_is_an_error_of_that_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room() as served:
        guest = await served.client("vda")
        export = served.connection("vda").export
        assert export is not None

        def broken(offset: int, length: int) -> bytes:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(export, "read_now", broken)
            _, before = guest.prepare(wire.WRITE, 0, payload=b"d" * 512)
            _, failing = guest.prepare(wire.READ, 0, 512)
            await guest.send(before + failing)
            assert (await guest.reply()).error == 0
            reply = await guest.reply()
        assert (reply.error, reply.text) == (errno.EIO, "internal error")
        assert "ZeroDivisionError" in caplog.text
        assert await guest.read(0, 512) == b"d" * 512
