"""READ_ONCE: what a READ held is released once its reply has left, and not a step before."""

import errno
import itertools
from collections.abc import Callable

import pytest

from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.session import SessionOptions
from fleecenbd.nbd.constants import FLEECENBD_CMD_FLAG_READ_ONCE as ONCE
from fleecenbd.nbd.constants import NBD_EINVAL
from fleecenbd.server.exports import ACCESS
from tests.nbd import wire
from tests.server.room import CLUSTER, MODES, SIZE, Client, Room, pattern, room, tight

KIB, MIB = 1 << 10, 1 << 20


def fleece(served: Room) -> Fleece:
    (found,) = served.server.session("n").fleeces
    return found


def released(served: Room) -> list[tuple[int, int]]:
    """(offset, length) of each run that can no longer be read."""
    found = fleece(served)
    runs = found.access.runs(0, found.size)
    return [(offset, length) for offset, length, readable in runs if not readable]


async def enter_by_name(served: Room, mode: str) -> tuple[Client, int]:
    return await served.client("vda@n+once", mode), 0


async def enter_by_flag(served: Room, mode: str) -> tuple[Client, int]:
    return await served.client("vda@n", mode, ACCESS), ONCE


WAYS = [
    *((mode, enter_by_name) for mode in MODES),
    (wire.STRUCTURED, enter_by_flag),
    (wire.EXTENDED, enter_by_flag),
]
every_way = pytest.mark.parametrize(
    ("mode", "enter"), WAYS, ids=[f"{mode}-{enter.__name__[9:]}" for mode, enter in WAYS]
)
Enter = Callable[..., object]


@every_way
async def test_what_was_read_cannot_be_read_again_and_the_text_says_why(
    mode: str, enter: Enter
) -> None:
    async with room(session="n") as served:
        client, flags = await enter(served, mode)  # type: ignore[misc]
        reply = await client.ask(wire.READ, CLUSTER, 2 * CLUSTER, flags=flags)
        assert reply.data == pattern(SIZE)[CLUSTER : 3 * CLUSTER]
        reply = await client.ask(wire.READ, CLUSTER, 1, flags=flags)
        assert reply.error == NBD_EINVAL
        if mode != wire.SIMPLE:
            assert "offset 4096 was released, by a TRIM or by being read once" in reply.text
        assert released(served) == [(CLUSTER, 2 * CLUSTER)]


@pytest.mark.parametrize("mode", MODES)
async def test_every_read_of_a_session_that_is_read_once_is_one(mode: str) -> None:
    async with room(session="n", options=SessionOptions(read_once=True)) as served:
        client = await served.client("vda@n", mode)
        assert await client.read(0, SIZE) == pattern(SIZE)
        for name in ("vda@n", "vda@n+once"):
            info = served.server.exports.find(name, True).info
            assert info.description.count(", what is read is released") == 1
        await served.settled()
        assert released(served) == [(0, SIZE)]
        assert fleece(served).stats.reads_once == 1


async def test_parts_of_clusters_are_not_released_and_do_not_add_up() -> None:
    async with room(session="n") as served:
        client = await served.client("vda@n+once")
        await client.read(100, 2 * CLUSTER)
        await client.read(0, CLUSTER - 1)
        await client.read(CLUSTER - 1, 1)
        await served.settled()
        assert released(served) == [(CLUSTER, CLUSTER)]


async def test_a_short_last_cluster_is_whole_at_the_end_of_the_disk() -> None:
    async with room(session="n", size=SIZE + 700) as served:
        client = await served.client("vda@n+once")
        await client.read(SIZE, 699)
        await served.settled()
        assert released(served) == []
        await client.read(SIZE - 1, 701)
        await served.settled()
        assert released(served) == [(SIZE, 700)]


@pytest.mark.parametrize("gated", [False, True], ids=["now", "later"])
@every_way
async def test_nothing_is_released_before_the_last_byte_of_the_reply_has_left(
    mode: str, enter: Enter, gated: bool
) -> None:
    async with room(limits=tight(), session="n", size=MIB) as served:
        device = served.devices["vda"]
        if gated:
            device.gate("read")
        client, flags = await enter(served, mode)  # type: ignore[misc]
        cookie = await client.post(wire.READ, 0, MIB, flags=flags)
        if gated:
            (await device.reached("read")).go()
        await served.settled()
        channel = served.connection("vda@n").channel
        assert channel is not None
        # It is taken 8 KiB at a time: as long as the transport holds a byte, all can be read.
        taken = b""
        while channel.sending_bytes:
            assert released(served) == []
            taken += await client.receive(8 * KIB)
            await served.settled()
        assert len(taken) < MIB
        assert released(served) == [(0, MIB)]
        complete = client.replies.feed(taken)
        while not complete:
            complete = client.replies.feed(await client.receive())
        assert (complete[0].cookie, complete[0].data) == (cookie, pattern(MIB))


@pytest.mark.parametrize("gated", [False, True], ids=["now", "later"])
async def test_what_a_killed_reader_was_not_sent_can_still_be_read(gated: bool) -> None:
    async with room(limits=tight(), session="n", size=MIB) as served:
        device = served.devices["vda"]
        if gated:
            device.gate("read")
        client = await served.client("vda@n+once")
        for number in range(16):
            await client.post(wire.READ, number * 64 * KIB, 64 * KIB)
        if gated:
            await served.settled()
            device.open()
        await served.settled()
        client.vanish()
        await served.gone()
        gone = sum(length for _, length in released(served))
        # The kernel had room for less than three of them.
        assert gone % (64 * KIB) == 0
        assert gone < 192 * KIB
        second = await served.client("vda@n")
        for offset in range(0, MIB, 64 * KIB):
            reply = await second.ask(wire.READ, offset, 64 * KIB)
            if any(start <= offset < start + length for start, length in released(served)):
                assert reply.error == NBD_EINVAL
            else:
                assert reply.data == pattern(MIB)[offset : offset + 64 * KIB]


@pytest.mark.parametrize("gated", [False, True], ids=["now", "later"])
async def test_a_reply_of_which_a_part_has_left_releases_nothing(gated: bool) -> None:
    async with room(limits=tight(), session="n", size=MIB) as served:
        device = served.devices["vda"]
        if gated:
            device.gate("read")
        client = await served.client("vda@n+once")
        await client.post(wire.READ, 0, MIB)
        if gated:
            (await device.reached("read")).go()
        await served.settled()
        await client.receive(8 * KIB)
        client.vanish()
        await served.gone()
        assert released(served) == []


async def test_a_reply_to_nobody_releases_nothing() -> None:
    async with room(session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        client = await served.client("vda@n+once")
        await client.post(wire.READ, 0, CLUSTER)
        call = await device.reached("read")
        client.vanish()
        await served.gone()
        call.go()
        await served.settled()
        assert released(served) == []


async def test_a_reader_that_dies_unseen_is_sent_nothing_that_counts() -> None:
    """Its socket is closed, and the write fails before the server has heard of it."""
    async with room(session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        client = await served.client("vda@n+once")
        await client.post(wire.READ, 0, CLUSTER)
        call = await device.reached("read")
        channel = served.connection("vda@n").channel
        assert channel is not None
        channel.pause_reading()  # nor can it hear of it
        client.vanish()
        call.go()
        await served.settled()
        await served.gone()
        assert released(served) == []


async def test_a_read_that_fails_releases_nothing() -> None:
    async with room(session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        client = await served.client("vda@n+once")
        await client.post(wire.READ, 0, CLUSTER)
        (await device.reached("read")).fail(errno.EIO)
        assert (await client.reply()).error == errno.EIO
        await served.settled()
        assert released(served) == []


async def test_replies_that_leave_together_are_released_together() -> None:
    async with room(limits=tight(), session="n", size=MIB) as served:
        client = await served.client("vda@n+once")
        reads = {at: client.prepare(wire.READ, at, 32 * KIB) for at in range(0, MIB, 32 * KIB)}
        await client.send(b"".join(read for _, read in reads.values()))
        found = {}
        seen = 0
        while len(found) < 32:
            reply = await client.reply()
            found[reply.cookie] = reply.data
            gone = sum(length for _, length in released(served))
            assert seen <= gone
            seen = gone
        assert b"".join(found[cookie] or b"" for cookie, _ in reads.values()) == pattern(MIB)
        await served.settled()
        assert released(served) == [(0, MIB)]


@pytest.mark.parametrize("mode", [wire.STRUCTURED, wire.EXTENDED])
async def test_the_first_read_once_waits_for_the_replies_before_it(mode: str) -> None:
    """The transport holds what went before: it is not the read's, and has not left either."""
    async with room(limits=tight(send_high_water=256 * KIB), session="n", size=MIB) as served:
        client = await served.client("vda@n", mode, ACCESS)
        _, plain = client.prepare(wire.READ, 0, 128 * KIB)
        _, once = client.prepare(wire.READ, 512 * KIB, CLUSTER, flags=ONCE)
        await client.send(plain)
        await served.settled()
        channel = served.connection("vda@n").channel
        assert channel is not None
        assert channel.sending_bytes
        await client.send(once)
        await served.settled()
        assert released(served) == []
        replies = [await client.reply(), await client.reply()]
        assert [reply.data for reply in replies] == [
            pattern(MIB)[: 128 * KIB],
            pattern(MIB)[512 * KIB : 512 * KIB + CLUSTER],
        ]
        await served.settled()
        assert released(served) == [(512 * KIB, CLUSTER)]
        # In one pass, too.
        _, plain = client.prepare(wire.READ, 0, 16 * KIB)
        _, once = client.prepare(wire.READ, 0, 16 * KIB, flags=ONCE)
        await client.send(plain + once)
        replies = [await client.reply(), await client.reply()]
        assert {reply.data for reply in replies} == {pattern(MIB)[: 16 * KIB]}
        await served.settled()
        assert released(served) == [(0, 16 * KIB), (512 * KIB, CLUSTER)]


async def test_a_plain_read_beside_it_releases_nothing() -> None:
    async with room(session="n") as served:
        client = await served.client("vda@n", wire.STRUCTURED, ACCESS)
        await client.ask(wire.READ, 0, CLUSTER, flags=ONCE)
        assert await client.read(CLUSTER, CLUSTER) == pattern(SIZE)[CLUSTER : 2 * CLUSTER]
        await served.settled()
        assert released(served) == [(0, CLUSTER)]


@pytest.mark.parametrize(
    ("export", "contexts"),
    [("vda@n", ()), ("vda@n", ("base:allocation",)), ("vda", ("base:allocation",))],
    ids=["nothing agreed", "another context", "guest"],
)
async def test_the_flag_is_refused_where_it_was_not_agreed_on(
    export: str, contexts: tuple[str, ...]
) -> None:
    async with room(session="n") as served:
        client = await served.client(export, wire.STRUCTURED, *contexts)
        reply = await client.ask(wire.READ, 0, CLUSTER, flags=ONCE)
        assert reply.error == NBD_EINVAL
        assert "command flags 0x8000 are not allowed here" in reply.text
        assert released(served) == []


async def test_two_in_flight_over_one_range_return_its_moment_or_nothing() -> None:
    async with room(session="n") as served:
        device = served.devices["vda"]
        device.gate("read")
        one, other = [await served.client("vda@n+once") for _ in range(2)]
        await one.post(wire.READ, 0, 2 * CLUSTER)
        first = await device.reached("read")
        await other.post(wire.READ, 0, CLUSTER)
        await served.settled()
        first.go()
        assert (await one.reply()).data == pattern(SIZE)[: 2 * CLUSTER]
        guest = await served.client("vda")
        await guest.write(0, bytes(CLUSTER))
        device.open()
        reply = await other.reply()
        assert reply.error == NBD_EINVAL
        assert released(served) == [(0, 2 * CLUSTER)]


async def test_a_guest_write_to_what_was_read_copies_nothing() -> None:
    async with room(session="n") as served:
        client = await served.client("vda@n+once")
        guest = await served.client("vda")
        await guest.write(0, bytes(2 * CLUSTER))
        stats = fleece(served).stats
        assert stats.temp_clusters == 2
        assert await client.read(0, 4 * CLUSTER) == pattern(SIZE)[: 4 * CLUSTER]
        await served.settled()
        assert (stats.temp_clusters, stats.copies_done) == (0, 1)
        await guest.write(0, bytes([5]) * 4 * CLUSTER)
        assert (stats.temp_clusters, stats.copies_done) == (0, 1)


async def test_the_last_reply_before_the_client_leaves_counts() -> None:
    async with room(limits=tight(), session="n", size=MIB) as served:
        client = await served.client("vda@n+once")
        _, read = client.prepare(wire.READ, 0, MIB)
        await client.send(read + wire.request(wire.DISC, 9, 0, 0))
        assert (await client.reply()).data == pattern(MIB)
        assert await client.ended() == b""
        await served.gone()
        assert released(served) == [(0, MIB)]


async def test_the_end_of_a_session_reaches_its_readers_by_either_name() -> None:
    async with room(session="n") as served:
        client = await served.client("vda@n+once")
        assert len(served.server.clients_of("vda@n")) == 1
        fleece(served).state.break_session("of the test")
        reply = await client.ask(wire.READ, 0, CLUSTER)
        assert (reply.error, "of the test" in reply.text) == (errno.EIO, True)
        served.server.finish("n")
        assert await client.ended() == b""
        stranger = await served.connect()
        refused = await stranger.try_go("vda@n+once")
        assert refused is not None
        assert refused.text == "'vda@n+once': session n is finished (failed)"


@pytest.mark.parametrize("name", ["vda+once", "vda@n+once+once", "+once", "vda@m+once"])
async def test_only_a_fleecing_export_is_read_once(name: str) -> None:
    async with room(session="n", default_export="vda@n") as served:
        client = await served.connect()
        refused = await client.try_go(name)
        assert refused is not None
        assert refused.text == f"there is no export called '{name}'"


async def test_it_is_found_and_not_listed() -> None:
    """Who lists exports looks into each of them."""
    async with room(session="n") as served:
        client = await served.connect()
        *listed, _ = await client.option(3)
        names = [reply.data[4 : 4 + int.from_bytes(reply.data[:4], "big")] for reply in listed]
        assert names == [b"vda", b"vda@n"]
        served.listen("b", backup_only=True)
        client = await served.client("vda@n+once", listener="b")
        assert client.export.description.endswith(", what is read is released")


async def test_requests_by_either_way_count_as_use() -> None:
    async with room(session="n") as served:
        uses = itertools.count()
        served.server.exports["vda@n"].tell_use(lambda: next(uses))  # type: ignore[attr-defined]
        client = await served.client("vda@n+once")
        await client.read(0, CLUSTER)
        assert next(uses) == 1
