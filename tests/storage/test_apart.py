"""Zeroes and writes of one cluster: one after the other, in the order in which they came."""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fleecenbd.client.nbd_target import NbdTarget
from fleecenbd.storage.apart import Apart
from fleecenbd.storage.nbd_client import NbdClient
from tests.storage.scripted_nbd import WRITE_ZEROES, Connection, Request, scripted

CLUSTER = 64 << 10


class Calls:
    """Requests that stay in flight until they are told to end."""

    def __init__(self) -> None:
        self.apart = Apart(CLUSTER)
        self.in_flight: dict[str, asyncio.Event] = {}

    def begin(self, name: str, offset: int, length: int, *, is_alone: bool) -> asyncio.Task[None]:
        async def call() -> None:
            async with self.apart.request(offset, length, is_alone=is_alone):
                self.in_flight[name] = asyncio.Event()
                try:
                    await self.in_flight[name].wait()
                finally:
                    del self.in_flight[name]

        return asyncio.ensure_future(call())

    async def now(self) -> set[str]:
        for _ in range(20):
            await asyncio.sleep(0)
        return set(self.in_flight)

    async def end(self, name: str) -> set[str]:
        self.in_flight[name].set()
        return await self.now()


async def test_a_zeroing_waits_for_the_writes_before_it_and_those_after_it_wait_for_it() -> None:
    calls = Calls()
    calls.begin("w1", 0, 4096, is_alone=False)
    calls.begin("w2", 8192, 4096, is_alone=False)
    calls.begin("z", 4096, 4096, is_alone=True)
    calls.begin("w3", 16384, 4096, is_alone=False)
    assert await calls.now() == {"w1", "w2"}
    assert await calls.end("w1") == {"w2"}
    assert await calls.end("w2") == {"z"}
    assert await calls.end("z") == {"w3"}
    assert await calls.end("w3") == set()


async def test_what_shares_no_cluster_waits_for_nobody() -> None:
    calls = Calls()
    calls.begin("z", CLUSTER, 2 * CLUSTER, is_alone=True)
    calls.begin("before", 0, CLUSTER, is_alone=False)
    calls.begin("after", 3 * CLUSTER, 1, is_alone=False)
    calls.begin("in", 3 * CLUSTER - 1, 1, is_alone=False)
    calls.begin("over", 3 * CLUSTER - 1, 2, is_alone=False)
    assert await calls.now() == {"z", "before", "after"}
    assert await calls.end("z") == {"before", "after", "in", "over"}


async def test_one_that_is_cancelled_keeps_nobody_waiting() -> None:
    calls = Calls()
    calls.begin("w1", 0, 4096, is_alone=False)
    zeroing = calls.begin("z", 4096, 4096, is_alone=True)
    calls.begin("w2", 8192, 4096, is_alone=False)
    assert await calls.now() == {"w1"}
    zeroing.cancel()
    assert await calls.now() == {"w1", "w2"}


@pytest.mark.parametrize("seed", range(3))
async def test_an_nbd_target_never_has_both_in_flight_in_one_cluster(
    tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    size = 8 * CLUSTER
    flying: list[Request] = []
    together: list[tuple[Request, Request]] = []

    def share(one: Request, other: Request) -> bool:
        first, end = one.offset // CLUSTER, -(-(one.offset + one.length) // CLUSTER)
        return first * CLUSTER < other.offset + other.length and other.offset < end * CLUSTER

    async with scripted(tmp_path, size=size) as server:

        async def answer(connection: Connection, request: Request) -> None:
            together.extend(
                (request, other)
                for other in flying
                if WRITE_ZEROES in (request.kind, other.kind) and share(request, other)
            )
            flying.append(request)
            for _ in range(dice.randrange(20)):
                await asyncio.sleep(0)
            flying.remove(request)
            await server.usual(connection, request)

        server.answer = answer
        client = await NbdClient.open(server.uri, connections=2, retries=0)
        target = NbdTarget("t", client, cluster=CLUSTER)
        calls: list[Callable[[], Awaitable[None]]] = []
        expected = bytearray(size)
        cuts = sorted({0, size, *(dice.randrange(0, size, 4096) for _ in range(60))})
        for offset, end in itertools.pairwise(cuts):
            if dice.random() < 0.5:
                data = dice.randbytes(end - offset)
                expected[offset:end] = data
                calls.append(lambda offset=offset, data=data: target.pwrite(offset, data))  # type: ignore[misc]
            else:
                calls.append(lambda offset=offset, end=end: target.zero(offset, end - offset))  # type: ignore[misc]
        dice.shuffle(calls)
        await asyncio.gather(*(call() for call in calls))
        assert together == []
        assert bytes(await target.pread(0, size)) == expected
        await target.keep()
