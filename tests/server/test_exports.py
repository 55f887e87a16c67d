"""Exports: what a client is told about them."""

import errno

import pytest

from fleecenbd.engine.session import SessionOptions
from tests.nbd import wire
from tests.server.room import SIZE, pattern, room

(
    HAS_FLAGS,
    READ_ONLY,
    SEND_FLUSH,
    SEND_FUA,
    ROTATIONAL,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    SEND_DF,
    CAN_MULTI_CONN,
    SEND_RESIZE,
    SEND_CACHE,
    SEND_FAST_ZERO,
) = (1 << bit for bit in range(12))

GUEST = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE
WRITABLE = SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO


@pytest.mark.parametrize(
    ("shared", "read_only", "flags"),
    [
        (1, False, GUEST | WRITABLE),
        (2, False, GUEST | WRITABLE | CAN_MULTI_CONN),
        (0, False, GUEST | WRITABLE | CAN_MULTI_CONN),
        (1, True, GUEST | READ_ONLY | CAN_MULTI_CONN),
    ],
)
async def test_a_guest_export_says_what_it_can(shared: int, read_only: bool, flags: int) -> None:
    async with room(shared=shared, read_only=read_only) as served:
        guest = await served.client("vda", wire.SIMPLE)
        assert guest.export == wire.ExportSeen(
            size=SIZE,
            flags=flags,
            name="vda",
            description="guest disk vda",
            block_size=(1, 64 << 10, 32 << 20),
        )


async def test_a_fleecing_export_can_be_trimmed_and_has_no_fua_and_no_write_zeroes() -> None:
    async with room(session="n") as served:
        backup = await served.client("vda@n", wire.STRUCTURED)
        assert backup.export.flags == (
            HAS_FLAGS | SEND_FLUSH | SEND_TRIM | SEND_DF | CAN_MULTI_CONN
        )
        assert backup.export.block_size == (1, 64 << 10, 32 << 20)
        session = served.server.sessions["n"]
        assert backup.export.description is not None
        assert backup.export.description.startswith("vda as of 20")
        assert backup.export.description.endswith(f"Z, session n {session.id}")


async def test_a_trim_of_the_preferred_size_always_frees() -> None:
    options = SessionOptions(cluster_size=128 << 10)
    async with room(session="n", size=256 << 10, options=options) as served:
        guest, backup = await served.client("vda"), await served.client("vda@n")
        await guest.write(0, b"!")
        assert served.devices["vda@n"].holds(0, 1)
        assert backup.export.block_size is not None
        assert (await backup.ask(wire.TRIM, 0, backup.export.block_size[1])).error == 0
        assert not served.devices["vda@n"].holds(0, 1)


async def test_a_read_only_disk_is_read_and_nothing_else() -> None:
    async with room(read_only=True) as served:
        guest = await served.client("vda")
        assert await guest.read(0, 512) == pattern(512)
        for command in (wire.WRITE, wire.TRIM, wire.WRITE_ZEROES):
            payload = b"x" * 512 if command == wire.WRITE else b""
            assert (await guest.ask(command, 0, 512, payload=payload)).error == errno.EPERM
        assert (await guest.ask(wire.FLUSH)).error == 0
        assert served.devices["vda"].content == pattern(SIZE)


async def test_what_a_fleecing_export_does_not_offer_is_refused() -> None:
    async with room(session="n") as served:
        backup = await served.client("vda@n", wire.STRUCTURED)
        for command, flags, error in (
            (wire.WRITE, 0, errno.EPERM),
            (wire.WRITE, wire.FUA, errno.EINVAL),
            (wire.WRITE_ZEROES, 0, errno.EINVAL),
            (wire.CACHE, 0, errno.EINVAL),
            (wire.TRIM, wire.FUA, errno.EINVAL),
            (wire.BLOCK_STATUS, 0, errno.EINVAL),
        ):
            payload = b"x" * 512 if command == wire.WRITE else b""
            reply = await backup.ask(command, 0, 512, flags=flags, payload=payload)
            assert reply.error == error, command
        assert served.devices["vda"].content == pattern(SIZE)


async def test_the_empty_name_is_refused_with_the_names_that_there_are() -> None:
    async with room(session="n", disks=("vda", "vdb")) as served:
        refused = await (await served.connect()).try_go("")
        assert refused is not None
        assert (refused.kind, refused.text) == (
            wire.ERR_POLICY,
            "name an export: vda, vdb, vda@n, vdb@n",
        )


async def test_the_empty_name_is_the_default_export_where_there_is_one() -> None:
    async with room(session="n", default_export="vda@n") as served:
        await (await served.client("vda")).write(0, b"!" * 512)
        backup = await served.client("")
        assert backup.export.name == "vda@n"
        assert await backup.read(0, 512) == pattern(512)


async def test_a_list_names_every_export_with_its_description() -> None:
    async with room(session="n") as served:
        client = await served.connect()
        *listed, last = await client.option(3)
        assert last.kind == wire.ACK
        assert listed[0].data[4:] == b"vdaguest disk vda"
        assert listed[1].data[4:].startswith(b"vda@nvda as of ")


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_a_read_as_long_as_the_protocol_allows_is_answered() -> None:
    async with room(size=66 << 20, content=pattern(65536)) as served:
        guest = await served.client("vda")
        assert len(await guest.read(1 << 20, 64 << 20)) == 64 << 20
        assert (await guest.ask(wire.READ, 0, (64 << 20) + 1)).error == errno.EINVAL
        assert (await guest.ask(wire.READ, 0, 65536, flags=wire.DF)).data == pattern(65536)
        too_long = await guest.ask(wire.READ, 0, 33 << 20, flags=wire.DF)
        assert too_long.error == errno.EOVERFLOW
