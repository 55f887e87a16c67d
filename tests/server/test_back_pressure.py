"""Back-pressure, both ways: what one client may ask for, and what others feel of it."""

import asyncio
import errno
import random
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fleecenbd.server.limits import ServerLimits
from tests.nbd import wire
from tests.server.room import MODES, SIZE, Client, Room, pattern, room, tight
from tests.simulation.gated import GatedCall

KIB = 1 << 10
MIB = 1 << 20


def reads_in(served: Room) -> list[GatedCall]:
    return [call for call in served.devices["vda"].waiting if call.kind == "read"]


async def send_all(client: Client, data: bytes) -> asyncio.Task[None]:
    """Send as far as the server takes it; the task ends when it has taken all."""
    return asyncio.ensure_future(client.send(data))


async def test_a_client_that_never_reads_is_not_served_more_than_it_may_hold() -> None:
    limits = tight(send_high_water=64 * KIB, bytes_max=128 * KIB)
    async with room(limits=limits, session="n") as served:
        backup = await served.client("vda@n")
        asked = b"".join(backup.prepare(wire.READ, 0, 16 * KIB)[1] for _ in range(200))
        await backup.send(asked)
        await served.settled()
        channel = served.connection("vda@n").channel
        assert channel.send_paused
        assert channel.read_paused
        assert channel.sending_bytes < 64 * KIB + 64 * KIB + 17 * KIB
        for _ in range(200):
            assert (await backup.reply()).data == pattern(SIZE)[: 16 * KIB]
        assert not channel.read_paused


async def test_replies_that_wait_for_a_client_count_until_it_takes_them() -> None:
    limits = tight(send_high_water=16 * KIB, bytes_max=256 * KIB)
    async with room(limits=limits, session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        backup = await served.client("vda@n")
        for _ in range(40):
            await backup.post(wire.READ, 0, 32 * KIB)
        await served.settled()
        assert len(reads_in(served)) == 8
        assert served.charged == (0, 256 * KIB)
        # The device goes on at once from here: what holds the rest back is the client alone.
        device.open()
        await served.settled()
        channel = served.connection("vda@n").channel
        assert channel.send_paused
        assert channel.sending_bytes <= 16 * KIB + 32 * KIB + 100
        assert 0 < served.charged[1] <= 256 * KIB
        for _ in range(40):
            assert (await backup.reply()).data == pattern(SIZE)[: 32 * KIB]
        assert served.charged == (0, 0)


async def test_a_long_reply_in_a_transport_that_is_paused_counts() -> None:
    async with room(limits=tight(), session="n", size=4 * MIB) as served:
        device = served.devices["vda"]
        device.gate("read")
        backup = await served.client("vda@n")
        await backup.post(wire.READ, 0, 4 * MIB)
        (await device.reached("read")).go()
        await served.settled()
        assert served.connection("vda@n").channel.send_paused
        assert served.charged == (0, 4 * MIB)
        assert (await backup.reply()).data == pattern(4 * MIB)
        await served.settled()
        assert served.charged == (0, 0)


async def test_a_client_that_vanishes_with_replies_unread_gives_their_bytes_back() -> None:
    limits = tight(send_high_water=16 * KIB)
    async with room(limits=limits, session="n", size=MIB) as served:
        device = served.devices["vda"]
        device.gate("read")
        backup = await served.client("vda@n")
        for _ in range(3):
            await backup.post(wire.READ, 0, MIB)
        await served.settled()
        device.open()
        await served.settled()
        assert served.charged == (0, 3 * MIB)
        backup.vanish()
        await served.gone()
        assert served.charged == (0, 0)


async def test_block_status_counts_as_what_its_reply_may_become() -> None:
    limits = ServerLimits(bytes_max=MIB, status_bytes=512 * KIB)
    async with room(limits=limits, session="n") as served:
        device = served.devices["vda"]
        device.gate("extents")
        backup = await served.client("vda@n", wire.STRUCTURED, "base:allocation")
        for _ in range(5):
            await backup.post(wire.BLOCK_STATUS, 0, SIZE)
        await served.settled()
        assert sum(call.kind == "extents" for call in device.waiting) == 2
        assert served.charged == (0, MIB)
        device.open()
        for _ in range(5):
            assert (await backup.reply()).error == 0
        await served.settled()
        assert served.charged == (0, 0)


async def test_so_many_requests_of_one_client_wait_and_no_more() -> None:
    async with room(limits=ServerLimits(requests_max=5)) as served:
        device = served.devices["vda"]
        device.gate("read")
        guest = await served.client("vda")
        for index in range(12):
            await guest.post(wire.READ, index * 512, 512)
        await served.settled()
        assert len(reads_in(served)) == 5
        assert served.connection("vda").channel.read_paused
        for index in range(12):
            (await device.reached("read")).go()
            assert (await guest.reply()).data == pattern(SIZE)[index * 512 :][:512]
        assert not served.connection("vda").channel.read_paused


async def test_so_many_bytes_of_one_client_wait_and_the_one_that_passes_the_limit() -> None:
    async with room(limits=ServerLimits(bytes_max=10000)) as served:
        device = served.devices["vda"]
        device.gate("read", "write")
        guest = await served.client("vda")
        await guest.post(wire.READ, 0, 4096)
        await guest.post(wire.WRITE, 8192, payload=b"w" * 4096)
        await guest.post(wire.READ, 0, 4096)
        await guest.post(wire.READ, 0, 1)
        await served.settled()
        assert len(device.waiting) == 3
        assert served.charged == (3 * 4096, 0)
        device.open()
        assert [(await guest.reply()).error for _ in range(4)] == [0] * 4


async def test_one_huge_request_is_always_let_in() -> None:
    limits = ServerLimits(
        bytes_max=1, bytes_max_all=1, bytes_sure=0, pass_bytes_max=1, send_high_water=1
    )
    async with room(limits=limits, size=2 * MIB) as served:
        guest = await served.client("vda")
        for later in (False, True):
            if later:
                served.devices["vda"].gate("read", "write")
            task = asyncio.ensure_future(guest.write(0, b"h" * 2 * MIB))
            if later:
                (await served.devices["vda"].reached("write")).go()
            await task
            read = asyncio.ensure_future(guest.read(0, 2 * MIB))
            if later:
                (await served.devices["vda"].reached("read")).go()
            assert await read == b"h" * 2 * MIB


async def test_all_backups_together_have_a_budget_and_guests_have_their_own() -> None:
    async with room(limits=ServerLimits(bytes_max_all=10000, bytes_sure=0), session="n") as served:
        device = served.devices["vda"]
        device.gate("read", where=lambda offset, length: length == 8192)
        backups = [await served.client("vda@n") for _ in range(3)]
        for backup in backups:
            for _ in range(2):
                await backup.post(wire.READ, 0, 8192)
        await served.settled()
        assert len(reads_in(served)) == 2
        assert served.charged == (0, 16384)
        guest = await served.client("vda")
        assert await guest.read(0, 512) == pattern(512)
        for _ in range(6):
            (await device.reached("read")).go()
        for backup in backups:
            for _ in range(2):
                assert (await backup.reply()).data == pattern(SIZE)[:8192]


async def test_no_client_keeps_another_from_a_first_few_bytes() -> None:
    limits = ServerLimits(bytes_max_all=10000, bytes_sure=1024)
    async with room(limits=limits, session="n") as served:
        device = served.devices["vda"]
        device.gate("read", where=lambda offset, length: offset != 8192)
        greedy, modest = await served.client("vda@n"), await served.client("vda@n")
        await greedy.post(wire.READ, 0, 16384)
        await greedy.post(wire.READ, 0, 16384)
        await served.settled()
        assert served.charged == (0, 16384)
        for _ in range(3):
            await modest.post(wire.READ, 512, 512)
        await served.settled()
        assert served.charged == (0, 16384 + 1024), "two, and the third waits with the others"
        device.open()
        assert [(await modest.reply()).data for _ in range(3)] == [pattern(SIZE)[512:1024]] * 3


async def test_who_waited_for_the_budget_and_left_is_in_nobodys_way() -> None:
    async with room(limits=ServerLimits(bytes_max_all=1, bytes_sure=0), session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        first, leaver, last = [await served.client("vda@n") for _ in range(3)]
        for backup in (first, leaver, last):
            await backup.post(wire.READ, 0, 512)
            await served.settled()
        assert len(reads_in(served)) == 1
        leaver.vanish()
        device.open()  # its READ may still come first: while it is not read, nobody can tell
        for backup in (first, last):
            assert (await backup.reply()).data == pattern(512)


async def test_who_is_cut_off_while_it_waits_for_the_budget_waits_no_more() -> None:
    async with room(limits=ServerLimits(bytes_max_all=1, bytes_sure=0), session="n") as served:
        served.devices["vda"].gate("read")
        for backup in (await served.client("vda@n"), await served.client("vda@n")):
            await backup.post(wire.READ, 0, 512)
            await served.settled()
        budget = served.server.clients._fleecing_budget
        waiting = len(budget._waiting)
        for index in (1, 0):
            served.connection("vda@n", index).abort()
            waiting -= 1
            assert len(budget._waiting) == waiting


async def test_a_slow_client_does_not_slow_another() -> None:
    async with room(limits=tight(), session="n") as served:
        slow, quick = await served.client("vda@n"), await served.client("vda@n")
        sending = await send_all(
            slow, b"".join(slow.prepare(wire.READ, 0, SIZE)[1] for _ in range(50))
        )
        await sending
        await served.settled()
        assert served.connection("vda@n").channel.send_paused
        for _ in range(50):
            assert await quick.read(0, SIZE) == pattern(SIZE)


@pytest.mark.parametrize("mode", MODES)
async def test_nine_thousand_requests_in_one_segment_get_nine_thousand_replies(mode: str) -> None:
    async with room(session="n") as served:
        backup = await served.client("vda@n", mode)
        data = b"".join(backup.prepare(wire.READ, index % 60000, 1)[1] for index in range(9000))
        sending = await send_all(backup, data)
        seen = [await backup.reply() for _ in range(9000)]
        assert all(
            reply.data == pattern(SIZE)[index % 60000 :][:1] for index, reply in enumerate(seen)
        )
        await sending


async def served_between(
    monkeypatch: pytest.MonkeyPatch, served: Room, busy: Client, data: bytes, other: Client
) -> list[str]:
    """Who was served in which order, when ``busy`` sends ``data`` and ``other`` one READ."""
    order: list[str] = []
    export = served.connection("vda@n").export
    assert export is not None
    read_now = export.read_now

    def noting(offset: int, length: int) -> object:
        order.append("other" if offset == 1 else "busy")
        return read_now(offset, length)

    monkeypatch.setattr(export, "read_now", noting)
    _, read = other.prepare(wire.READ, 1, 1)
    # Both arrive in one turn of the loop.
    busy.socket.send(data)
    other.socket.send(read)
    await other.reply()
    return order


@pytest.mark.parametrize(
    ("count", "length", "limits"),
    [
        (100, 4096, ServerLimits(backup_pass_bytes_max=40960, send_high_water=4096)),
        (100, 4096, ServerLimits(pass_requests_max=10)),
        (100, 1, ServerLimits(pass_requests_max=10)),
    ],
    ids=["bytes", "requests", "tiny"],
)
async def test_a_busy_client_leaves_others_their_turn(
    monkeypatch: pytest.MonkeyPatch, count: int, length: int, limits: ServerLimits
) -> None:
    async with room(session="n", limits=limits) as served:
        # Whoever connected last is polled first or last: so there is one of each.
        others = [await served.client("vda@n")]
        busy = await served.client("vda@n")
        others.append(await served.client("vda@n"))
        for other in others:
            data = b"".join(busy.prepare(wire.READ, 0, length)[1] for _ in range(count))
            order = await served_between(monkeypatch, served, busy, data, other)
            assert order.index("other") <= 20
            for _ in range(count):
                await busy.reply()


async def test_what_comes_while_a_turn_is_due_waits_for_that_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with room(session="n", limits=ServerLimits(pass_requests_max=1)) as served:
        client = await served.client("vda@n")
        connection = served.connection("vda@n")
        assert connection.export is not None
        read_now = connection.export.read_now
        served_lengths = []

        def noting(offset: int, length: int) -> bytes | bytearray | None:
            served_lengths.append(length)
            return read_now(offset, length)

        monkeypatch.setattr(connection.export, "read_now", noting)
        asked = [client.prepare(wire.READ, 0, length)[1] for length in (1, 2, 3)]
        connection.data_received(asked[0] + asked[1])
        assert served_lengths == [1]
        connection.data_received(asked[2])
        assert served_lengths == [1]
        assert [len((await client.reply()).data) for _ in range(3)] == [1, 2, 3]


async def test_writes_made_at_once_leave_others_their_turn() -> None:
    limits = ServerLimits(pass_bytes_max=16 * KIB, write_bytes_min=4 * KIB)
    async with room(session="n", limits=limits) as served:
        others = [await served.client("vda@n")]
        busy = await served.client("vda")
        others.append(await served.client("vda@n"))
        for other in others:
            connection = served.connection("vda")
            assert connection.transmission is not None
            data = b"".join(busy.prepare(wire.WRITE, 0, payload=b"w" * 512)[1] for _ in range(200))
            busy.socket.send(data)
            _, read = other.prepare(wire.READ, SIZE - 1, 1)
            other.socket.send(read)
            await other.reply()
            assert connection.transmission.received_bytes > 0, "not all was served before"
            for _ in range(200):
                assert (await busy.reply()).error == 0


async def test_requests_that_are_refused_or_cost_nothing_leave_others_their_turn_too() -> None:
    async with room(session="n") as served:
        other, busy = await served.client("vda@n"), await served.client("vda@n")
        for command, length, error in ((wire.TRIM, SIZE + 1, errno.EINVAL), (wire.TRIM, 4096, 0)):
            data = b"".join(busy.prepare(command, 0, length)[1] for _ in range(4000))
            busy.socket.send(data)
            connection = served.connection("vda@n", 1)
            _, read = other.prepare(wire.READ, SIZE - 1, 1)
            other.socket.send(read)
            await other.reply()
            assert connection.transmission is not None
            assert connection.transmission.received_bytes > 0, "not all was served before"
            assert {(await busy.reply()).error for _ in range(4000)} == {error}


@dataclass
class Plan:
    """One run of ``test_every_request_gets_one_reply``."""

    seed: int
    limits: ServerLimits
    mode: str
    count: int
    """Requests of each client."""


plans = st.builds(
    Plan,
    seed=st.integers(0, 1 << 30),
    limits=st.builds(
        ServerLimits,
        unix_send_buffer=st.sampled_from([4 * KIB, 32 * KIB, 512 * KIB]),
        requests_max=st.integers(1, 8),
        bytes_max=st.integers(1, 200 * KIB),
        bytes_max_all=st.integers(1, 300 * KIB),
        bytes_sure=st.sampled_from([0, 64 * KIB]),
        pass_bytes_max=st.integers(1, 100 * KIB),
        backup_pass_bytes_max=st.integers(1, 100 * KIB),
        pass_requests_max=st.integers(1, 8),
        send_high_water=st.sampled_from([1, 4 * KIB, 64 * KIB]),
    ),
    mode=st.sampled_from(MODES),
    count=st.integers(10, 80),
)


class Conversation:
    """Two clients that send, read, and wait at random, while the device takes its time."""

    def __init__(self, plan: Plan, served: Room) -> None:
        self.plan = plan
        self.served = served
        self.random = random.Random(plan.seed)

    async def pause(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)

    def requests(self, client: Client) -> bytes:
        data = b""
        for _ in range(self.plan.count):
            length = self.random.choice((1, 600, 20 * KIB, SIZE))
            command = self.random.choice((wire.READ, wire.READ, wire.WRITE, wire.FLUSH, wire.TRIM))
            payload = pattern(SIZE)[:length] if command == wire.WRITE else b""
            offset = 0 if command in (wire.WRITE, wire.FLUSH) else SIZE - length
            asked = 0 if command == wire.FLUSH else length
            data += client.prepare(command, offset, asked, payload=payload)[1]
        return data

    async def speak(self, client: Client, data: bytes) -> None:
        while data:
            count = self.random.choice((1, 20, 1000, 20000, len(data)))
            await client.send(data[:count])
            data = data[count:]
            await self.pause()

    async def listen(self, client: Client, count: int) -> None:
        seen: list[wire.Reply] = []
        while len(seen) < count:
            data = await client.receive(self.random.choice((1, 50, 5000, 1 << 20)))
            assert data, "the server closed the connection"
            seen += client.replies.feed(data)
            await self.pause()
        assert client.replies.in_flight == 0
        assert client.replies.pending == 0

    async def let_go(self) -> None:
        """The device: any call may end next, or wait a little longer."""
        device = self.served.devices["vda"]
        kinds = ("read", "write", "trim", "flush")
        while True:
            if device.waiting:
                self.random.choice(device.waiting).go()
            if self.random.random() < 0.1:
                device.open()
                await self.pause()
            device.gate(*(kind for kind in kinds if self.random.random() < 0.7))
            await asyncio.sleep(0)

    async def run(self) -> None:
        clients = [await self.served.client("vda", self.plan.mode) for _ in range(2)]
        device = asyncio.ensure_future(self.let_go())
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(self.speak(client, self.requests(client)))
                    group.create_task(self.listen(client, self.plan.count))
        finally:
            device.cancel()


@settings(
    max_examples=40,
    deadline=None,
    # A plan that hangs would hang again and again while it is made smaller.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(plan=plans)
async def test_every_request_gets_one_reply(plan: Plan) -> None:
    async with room(limits=plan.limits, shared=0) as served:
        await Conversation(plan, served).run()
