"""No client waits for another's slow device: 200 ms for each call there, and others notice nothing.

What a client of a quick disk waits is measured before, and while others keep calls on a slow
device in flight all the time. On a machine that does much else both wander; a stall that reaches
the quick client does not hide: it is four times the bound.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

import pytest

from benchmarks.stalls import STALL_S, StallingDevice
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions
from fleecenbd.storage.device import Device
from fleecenbd.storage.memory import MemoryDevice
from tests.nbd import wire
from tests.server.room import Client, Room, room

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB
BLOCK = 4096

CALM_S = STALL_S / 4
"""What nobody waits longer for whose own device is quick."""
REQUESTS_MIN = 200
STALLS_MIN = 8
SLOW_CLIENTS = 4


async def _p99_s(client: Client, slow: StallingDevice | None = None) -> float:
    """What 99 of 100 requests take at most, writes and reads in turn, one at a time.

    With ``slow``: until enough of its calls have stalled meanwhile.
    """
    loop = asyncio.get_running_loop()
    enough = slow.stalled + STALLS_MIN if slow is not None else 0
    seconds: list[float] = []
    while len(seconds) < REQUESTS_MIN or (slow is not None and slow.stalled < enough):
        offset = len(seconds) * BLOCK % SIZE
        started = loop.time()
        if len(seconds) % 2:
            await client.read(offset, BLOCK)
        else:
            await client.write(offset, b"\xa5" * BLOCK)
        seconds.append(loop.time() - started)
    # Not one in a hundred, among thousands, but each a whole stall: that counts too.
    assert sum(spent > STALL_S * 0.75 for spent in seconds) <= STALLS_MIN // 4
    return sorted(seconds)[len(seconds) * 99 // 100]


def _slow(name: str, **how: Collection[str]) -> StallingDevice:
    return StallingDevice(MemoryDevice(SIZE, name=name), **how)


@contextlib.asynccontextmanager
async def _busy(served: Room, export: str, command: int, **request: int) -> AsyncIterator[None]:
    """Clients that ask an export for the same over and over, each a place of its own."""
    contexts = ["base:allocation"]
    clients = [await served.client(export, wire.STRUCTURED, *contexts) for _ in range(SLOW_CLIENTS)]

    async def ask_on(client: Client, place: int) -> None:
        payload = b"\x5a" * BLOCK if command == wire.WRITE else b""
        length = 0 if payload or command == wire.FLUSH else BLOCK
        while True:
            offset = 0 if command == wire.FLUSH else place * BLOCK % SIZE
            assert (await client.ask(command, offset, length, payload=payload)).error == 0
            place += SLOW_CLIENTS

    tasks = [asyncio.ensure_future(ask_on(client, n)) for n, client in enumerate(clients)]
    try:
        yield
    finally:
        for task in tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _begin(served: Room, disks: list[str], temps: dict[str, Device]) -> None:
    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
        return temps[disk.name]

    await served.server.begin("n", disks, SessionOptions(cbw_timeout_s=0), make_temp)


@pytest.mark.parametrize(
    "command", [wire.READ, wire.WRITE, wire.WRITE_ZEROES, wire.TRIM, wire.FLUSH, wire.BLOCK_STATUS]
)
async def test_nobody_waits_for_another_disk(command: int) -> None:
    async with room(shared=0, size=SIZE) as served:
        slow = _slow("slow")
        served.server.add_disk(Disk("slow", slow))
        guest = await served.client("vda")
        quiet_s = await _p99_s(guest)
        async with _busy(served, "slow", command):
            assert await _p99_s(guest, slow) < max(3 * quiet_s, CALM_S)


async def test_nobody_waits_for_the_temp_image_of_another_disk() -> None:
    async with room(shared=0, size=SIZE) as served:
        device = MemoryDevice(SIZE)
        assert device.pwrite_now(0, b"\1" * SIZE)
        served.server.add_disk(Disk("slow", device))
        temp = _slow("slow@n")
        await _begin(served, ["vda", "slow"], {"vda": MemoryDevice(SIZE), "slow": temp})
        guest = await served.client("vda")
        quiet_s = await _p99_s(guest)
        async with _busy(served, "slow", wire.WRITE):
            assert await _p99_s(guest, temp) < max(3 * quiet_s, CALM_S)


async def test_nobody_waits_for_copies_from_another_disk() -> None:
    async with room(shared=0, size=SIZE) as served:
        slow = _slow("slow", stalls={"pread"})
        served.server.add_disk(Disk("slow", slow))
        temps = {"vda": MemoryDevice(SIZE), "slow": MemoryDevice(SIZE)}
        await _begin(served, ["vda", "slow"], temps)
        guest = await served.client("vda")
        quiet_s = await _p99_s(guest)
        async with _busy(served, "slow", wire.WRITE):
            assert await _p99_s(guest, slow) < max(3 * quiet_s, CALM_S)


async def test_a_guest_does_not_wait_for_a_read_of_old_data_elsewhere_on_a_slow_temp_image() -> (
    None
):
    async with room(shared=0, size=SIZE) as served:
        temp = _slow("vda@n", stalls={"pread"})
        await _begin(served, ["vda"], {"vda": temp})
        guest = await served.client("vda")
        quiet_s = await _p99_s(guest)  # and by now all that it writes is copied
        async with _busy(served, "vda@n", wire.READ):
            assert await _p99_s(guest, temp) < max(3 * quiet_s, CALM_S)


async def test_a_guest_does_not_wait_for_a_backup_that_reads_nothing() -> None:
    async with room(shared=0, size=SIZE) as served:
        await served.begin()
        guest = await served.client("vda")
        quiet_s = await _p99_s(guest)
        backup = await served.client("vda@n")
        asked = b"".join(backup.prepare(wire.READ, 0, MIB)[1] for _ in range(256))
        sending = asyncio.ensure_future(backup.send(asked))
        await served.settled()
        channel = served.connection("vda@n").channel
        assert channel.send_paused
        assert await _p99_s(guest) < max(3 * quiet_s, CALM_S)
        limits = served.server.clients.limits
        # What is kept for it: its share of requests that wait, and a reply in the transport.
        assert served.charged[1] <= limits.bytes_max + MIB
        assert channel.sending_bytes <= limits.send_high_water + MIB + 100
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_a_device_that_kept_the_loop_from_others_would_be_noticed() -> None:
    async with room(shared=0, size=SIZE) as served:
        slow = _slow("slow", blocks={"pread"})
        served.server.add_disk(Disk("slow", slow))
        guest = await served.client("vda")
        async with _busy(served, "slow", wire.READ):
            started = slow.stalled
            loop = asyncio.get_running_loop()
            before = loop.time()
            await guest.read(0, BLOCK)
            assert loop.time() - before > CALM_S
            assert slow.stalled > started
