"""Requests: what each command does to its export, now or later, in the three reply modes."""

import asyncio
import errno

import pytest

from fleecenbd.engine.session import SessionOptions
from tests.nbd import wire
from tests.server.room import CLUSTER, MODES, SIZE, pattern, room

in_every_mode = pytest.mark.parametrize("mode", MODES)
now_and_later = pytest.mark.parametrize("later", [False, True], ids=["now", "later"])


@in_every_mode
@now_and_later
async def test_a_guest_reads_and_writes(mode: str, later: bool) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        if later:
            device.gate("read", "write")
        asked = asyncio.ensure_future(guest.read(100, 5000))
        if later:
            (await device.reached("read")).go()
        assert await asked == pattern(SIZE)[100:5100]
        written = asyncio.ensure_future(guest.write(4000, b"new" * 1000))
        if later:
            (await device.reached("write")).go()
        await written
        device.open()
        assert (
            await guest.read(3999, 3002)
            == pattern(SIZE)[3999:4000] + b"new" * 1000 + (pattern(SIZE)[7000:7001])
        )


@in_every_mode
async def test_a_guest_zeroes_trims_caches_and_flushes(mode: str) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        for command, flags in (
            (wire.WRITE_ZEROES, 0),
            (wire.WRITE_ZEROES, wire.NO_HOLE),
            (wire.TRIM, 0),
            (wire.CACHE, 0),
        ):
            await guest.write(8192, pattern(4096))
            reply = await guest.ask(command, 8192, 4096, flags=flags)
            assert (reply.error, reply.data) == (0, None)
            expected = pattern(4096) if command == wire.CACHE else bytes(4096)
            assert await guest.read(8192, 4096) == expected
        assert (await guest.ask(wire.FLUSH)).error == 0
        assert device.log.count("flush 0+0") == 1
        assert device.log.count("zero 8192+4096") == 2
        assert device.log.count("trim 8192+4096") == 1


@pytest.mark.parametrize("mode", [wire.STRUCTURED, wire.EXTENDED])
async def test_a_guest_asks_for_block_status(mode: str) -> None:
    async with room() as served:
        guest = await served.client("vda", mode, "base:allocation")
        await guest.ask(wire.TRIM, 8192, 8192)
        reply = await guest.ask(wire.BLOCK_STATUS, 4096, 16384)
        number = guest.contexts["base:allocation"]
        assert reply.contexts == {number: [(4096, 0), (8192, 3), (4096, 0)]}
        reply = await guest.ask(wire.BLOCK_STATUS, 8192, 16384, flags=wire.REQ_ONE)
        assert reply.contexts == {number: [(8192, 3)]}


@in_every_mode
@now_and_later
async def test_a_backup_reads_the_moment_of_arming_and_trims(mode: str, later: bool) -> None:
    async with room(session="n") as served:
        guest = await served.client("vda")
        await guest.write(0, b"!" * 8192)
        backup = await served.client("vda@n", mode)
        active, temp = served.devices["vda"], served.devices["vda@n"]
        if later:
            active.gate("read")
            temp.gate("read")
        asked = asyncio.ensure_future(backup.read(4096, 8192))
        if later:
            (await temp.reached("read")).go()
            (await active.reached("read")).go()
        assert await asked == pattern(SIZE)[4096 : 4096 + 8192]
        assert (await backup.ask(wire.FLUSH)).error == 0
        assert temp.holds(0, 8192)
        assert (await backup.ask(wire.TRIM, 0, 8192)).error == 0
        assert not temp.holds(0, 8192)
        released = await backup.ask(wire.READ, 4096, 4097)
        assert released.error == errno.EINVAL
        if mode != wire.SIMPLE:
            assert "offset 4096 was released" in released.text


@pytest.mark.parametrize("mode", [wire.STRUCTURED, wire.EXTENDED])
async def test_a_backup_sees_what_it_may_read_and_what_temp_holds(mode: str) -> None:
    async with room(session="n") as served:
        guest = await served.client("vda")
        await guest.write(CLUSTER, b"!" * CLUSTER)
        backup = await served.client("vda@n", mode, "base:allocation", "x-fleecenbd:access")
        await backup.ask(wire.TRIM, 0, CLUSTER)
        reply = await backup.ask(wire.BLOCK_STATUS, 0, 4 * CLUSTER)
        assert reply.contexts == {
            backup.contexts["base:allocation"]: [(4 * CLUSTER, 0)],
            backup.contexts["x-fleecenbd:access"]: [
                (CLUSTER, 0),
                (CLUSTER, 3),
                (2 * CLUSTER, 1),
            ],
        }


async def test_what_may_be_read_is_told_as_it_is_when_the_reply_leaves() -> None:
    async with room(session="n") as served:
        asking = await served.client(
            "vda@n", wire.EXTENDED, "base:allocation", "x-fleecenbd:access"
        )
        releasing = await served.client("vda@n")
        active = served.devices["vda"]
        active.gate("extents")
        asked = asyncio.ensure_future(asking.ask(wire.BLOCK_STATUS, 0, 2 * CLUSTER))
        call = await active.reached("extents")
        assert (await releasing.ask(wire.TRIM, 0, CLUSTER)).error == 0
        call.go()
        access = asking.contexts["x-fleecenbd:access"]
        assert (await asked).contexts[access] == [(CLUSTER, 0), (CLUSTER, 1)]


async def test_block_status_answers_only_for_the_contexts_of_its_payload() -> None:
    async with room(session="n") as served:
        backup = await served.client(
            "vda@n", wire.EXTENDED, "base:allocation", "x-fleecenbd:access"
        )
        wanted = backup.contexts["x-fleecenbd:access"]
        backup.contexts = {"x-fleecenbd:access": wanted}
        payload = (4096).to_bytes(8, "big") + wanted.to_bytes(4, "big")
        backup.replies.asked(wire.BLOCK_STATUS, 77, 8192, 4096, contexts=(wanted,))
        await backup.send(
            wire.request(
                wire.BLOCK_STATUS,
                77,
                8192,
                len(payload),
                flags=wire.PAYLOAD_LEN,
                payload=payload,
                extended=True,
            )
        )
        assert (await backup.reply()).contexts == {wanted: [(4096, 1)]}


@in_every_mode
async def test_replies_leave_in_the_order_in_which_requests_end(mode: str) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        device.gate("read", "write")
        slow = await guest.post(wire.READ, 0, 4096)
        write = await guest.post(wire.WRITE, 8192, payload=b"w" * 512)
        quick = await guest.post(wire.READ, 4096, 512)
        (await device.reached("read", lambda offset, _: offset == 4096)).go()
        assert (await guest.reply()).cookie == quick
        (await device.reached("write")).go()
        assert (await guest.reply()).cookie == write
        flushed = await guest.post(wire.FLUSH)
        assert (await guest.reply()).cookie == flushed
        (await device.reached("read")).go()
        last = await guest.reply()
        assert (last.cookie, last.data) == (slow, pattern(SIZE)[:4096])


@in_every_mode
@pytest.mark.parametrize(
    ("command", "call"),
    [(wire.WRITE, "write"), (wire.WRITE_ZEROES, "zero"), (wire.TRIM, "trim")],
)
async def test_fua_is_a_flush_after_the_write_and_before_the_reply(
    mode: str, command: int, call: str
) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        device.gate(call, "flush")
        payload = b"d" * 4096 if command == wire.WRITE else b""
        await guest.post(command, 4096, 4096, flags=wire.FUA, payload=payload)
        write = await device.reached(call)
        assert "flush 0+0" not in device.log
        write.go()
        flush = await device.reached("flush")
        await served.settled()
        assert guest.is_quiet()
        flush.go()
        assert (await guest.reply()).error == 0
        assert device.log[-2:] == [f"{call} 4096+4096", "flush 0+0"]


async def test_a_write_with_fua_whose_flush_fails_has_failed() -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda")
        device.gate("flush")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512, flags=wire.FUA)
        (await device.reached("flush")).fail(errno.EIO)
        assert (await guest.reply()).error == errno.EIO


async def test_fua_does_no_harm_where_nothing_is_written() -> None:
    async with room() as served:
        guest = await served.client("vda", wire.STRUCTURED, "base:allocation")
        for command in (wire.READ, wire.CACHE, wire.BLOCK_STATUS):
            assert (await guest.ask(command, 0, 512, flags=wire.FUA)).error == 0
        assert (await guest.ask(wire.FLUSH, flags=wire.FUA)).error == 0


@in_every_mode
@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EROFS, errno.EPERM),
        (errno.EACCES, errno.EPERM),
        (errno.ETIMEDOUT, errno.EIO),
        (errno.EBADF, errno.EINVAL),
        (errno.EOPNOTSUPP, errno.EINVAL),
    ],
)
async def test_what_the_guests_device_says_reaches_the_guest_as_an_nbd_error(
    mode: str, failure: int, seen: int
) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        device.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        (await device.reached("write")).fail(failure)
        reply = await guest.reply()
        assert reply.error == seen
        if mode != wire.SIMPLE:
            assert reply.text == "write failed by the test"


@in_every_mode
async def test_a_guest_never_sees_eshutdown(mode: str) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda", mode)
        device.gate("read", "write", "flush")
        for command, kind in ((wire.READ, "read"), (wire.WRITE, "write"), (wire.FLUSH, "flush")):
            payload = b"d" * 512 if command == wire.WRITE else b""
            await guest.post(command, 0, 0 if command == wire.FLUSH else 512, payload=payload)
            (await device.reached(kind)).fail(errno.ESHUTDOWN)
            assert (await guest.reply()).error == errno.EIO


async def test_enotsup_answers_fast_zero_and_nothing_else() -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda")
        device.gate("zero")
        for flags, seen in ((wire.FAST_ZERO, errno.EOPNOTSUPP), (0, errno.EINVAL)):
            await guest.post(wire.WRITE_ZEROES, 0, 4096, flags=flags)
            (await device.reached("zero")).fail(errno.EOPNOTSUPP)
            assert (await guest.reply()).error == seen


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_a_full_temp_image_is_never_the_guests_enospc(policy: str) -> None:
    async with room(session="n", options=SessionOptions(on_cbw_error=policy)) as served:
        guest = await served.client("vda")
        backup = await served.client("vda@n")
        temp = served.devices["vda@n"]
        temp.gate("write")
        await guest.post(wire.WRITE, 0, payload=b"d" * 512)
        (await temp.reached("write")).fail(errno.ENOSPC)
        reply = await guest.reply()
        read = await backup.ask(wire.READ, 0, 512)
        if policy == "break-snapshot":
            assert reply.error == 0
            assert (read.error, "could not be copied" in read.text) == (errno.EIO, True)
        else:
            assert reply.error == errno.EIO
            assert read.data == pattern(512)


async def test_a_fault_of_ours_is_an_error_of_one_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with room() as served:
        device = served.devices["vda"]
        guest = await served.client("vda")

        async def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(device, "trim", broken)
        reply = await guest.ask(wire.TRIM, 0, 4096)
        assert (reply.error, reply.text) == (errno.EIO, "internal error")
        assert "ZeroDivisionError" in caplog.text
        assert await guest.read(0, 512) == pattern(512)
