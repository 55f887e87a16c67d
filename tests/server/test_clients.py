"""Clients: places, and who gets them."""

import os

from fleecenbd.server.limits import ServerLimits
from tests.nbd import wire
from tests.server.room import Room, pattern, room


async def refusal(served: Room, export: str, listener: str = "s") -> tuple[int, str]:
    """(error reply, text) of an export that cannot be entered now."""
    client = await served.connect(listener)
    refused = await client.try_go(export)
    assert refused is not None
    assert await client.option(3), "the connection goes on"
    return refused.kind, refused.text


async def test_a_second_guest_is_refused_and_told_who_is_there() -> None:
    async with room() as served:
        first = await served.client("vda")
        assert await refusal(served, "vda") == (
            wire.ERR_POLICY,
            f"vda is in use by pid {os.getpid()}; a second client would corrupt its file systems "
            "(serve --shared N admits more); a backup reads the export of a session",
        )
        assert await first.read(0, 512) == pattern(512)


async def test_asking_about_an_export_takes_no_place() -> None:
    async with room() as served:
        curious = await served.connect()
        replies = await curious.option(6, wire.info_data("vda"))
        assert wire.parse_infos(replies).size is not None
        assert await (await served.client("vda")).read(0, 512) == pattern(512)


async def test_the_next_guest_gets_in_when_the_first_has_gone() -> None:
    async with room() as served:
        first = await served.client("vda")
        first.vanish()
        await served.gone()
        assert await (await served.client("vda")).read(0, 512) == pattern(512)


async def test_a_guest_export_admits_as_many_as_it_was_told() -> None:
    async with room(shared=2) as served:
        for _ in range(2):
            assert (await served.client("vda")).export.flags is not None
        kind, text = await refusal(served, "vda")
        assert (kind, "in use by" in text) == (wire.ERR_POLICY, True)


async def test_shared_0_admits_any_number() -> None:
    async with room(shared=0) as served:
        guests = [await served.client("vda") for _ in range(20)]
        await guests[0].write(0, b"seen by all")
        for guest in guests:
            assert await guest.read(0, 11) == b"seen by all"


async def test_a_fleecing_export_admits_any_number() -> None:
    async with room(session="n") as served:
        for backup in [await served.client("vda@n") for _ in range(20)]:
            assert await backup.read(0, 512) == pattern(512)


async def test_backups_leave_places_for_guests() -> None:
    limits = ServerLimits(clients_max=5, guest_places=2)
    async with room(limits=limits, session="n", disks=("vda", "vdb")) as served:
        for _ in range(3):
            await served.client("vda@n")
        kind, text = await refusal(served, "vdb@n")
        assert (kind, "3 backup clients are connected already" in text) == (wire.ERR_POLICY, True)
        for disk in ("vda", "vdb"):
            assert await (await served.client(disk)).read(0, 512) == pattern(512)


async def test_a_guest_gets_in_past_a_hundred_connections_that_are_half_open() -> None:
    async with room() as served:
        half_open = [served.dial() for _ in range(100)]
        for client in half_open:
            await client.receive_exactly(18)
        guest = await served.client("vda")
        assert await guest.read(0, 512) == pattern(512)
        assert await half_open[0].ended() == b"", "the oldest had to go"
        assert len(served.server.clients.connections) == 100
        assert half_open[1].is_quiet()


async def test_half_open_connections_drive_out_each_other_and_no_client() -> None:
    async with room(limits=ServerLimits(clients_max=3, guest_places=1), session="n") as served:
        guest, backup = await served.client("vda"), await served.client("vda@n")
        half_open = [served.dial() for _ in range(50)]
        for client in half_open[:-1]:
            await client.ended()
        await half_open[-1].receive_exactly(18)
        assert await guest.read(0, 512) == await backup.read(0, 512) == pattern(512)


async def test_where_every_place_is_taken_a_connection_is_closed_at_once() -> None:
    limits = ServerLimits(clients_max=2, guest_places=0)
    async with room(limits=limits, session="n") as served:
        guest, backup = await served.client("vda"), await served.client("vda@n")
        assert await served.dial().ended() == b""
        assert await guest.read(0, 512) == await backup.read(0, 512) == pattern(512)
        backup.vanish()
        await served.gone([served.connection("vda@n")])
        assert await (await served.client("vda@n")).read(0, 512) == pattern(512)


async def test_a_listener_for_backups_neither_lists_nor_serves_guests_disks() -> None:
    async with room(session="n", default_export="vda") as served:
        served.listen("backup", backup_only=True)
        client = await served.connect("backup")
        *listed, _ = await client.option(3)
        assert [reply.data[4:9] for reply in listed] == [b"vda@n"]
        for name in ("vda", ""):
            kind, text = await refusal(served, name, "backup")
            assert (kind, "serves backups only" in text) == (wire.ERR_POLICY, True)
            assert (await client.option(6, wire.info_data(name)))[-1].kind == wire.ERR_POLICY
        by_name = await served.connect("backup")
        await by_name.send(wire.option(1, b"vda"))
        assert await by_name.ended() == b""
        backup = await served.client("vda@n", listener="backup")
        assert await backup.read(0, 512) == pattern(512)
