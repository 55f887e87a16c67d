"""A disk on gated devices, on virtual time: what directed tests are set up with."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.session import Session, SessionOptions, arm
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import simulate

CLUSTER = 4096


def simulated(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test on a virtual loop: seconds cost nothing, a deadlock is an error."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        simulate(test(*args, **kwargs))

    return run


class Scene:
    """One disk; sessions on it are armed as a test goes on."""

    def __init__(self, clusters: int = 8, *, size: int | None = None) -> None:
        self.size = size if size is not None else clusters * CLUSTER
        self.content = random.Random(self.size).randbytes(self.size)
        self.active = GatedDevice("active", self.size, self.content)
        self.disk = Disk("vda", self.active)
        self.session: Session | None = None

    async def arm(self, name: str = "s", **options: Any) -> Fleece:
        """Arm a session; its temp image is ``fleece.temp``, a GatedDevice."""
        options.setdefault("cluster_size", CLUSTER)

        async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
            return GatedDevice(f"temp {name}", -(-disk.size // cluster_size) * cluster_size)

        self.session = await arm(
            name,
            [self.disk],
            SessionOptions(**options),
            make_temp,
            clock=asyncio.get_running_loop().time,
        )
        return self.session.fleeces[0]

    def write(self, first: int, count: int = 1, fill: int = 0x77) -> asyncio.Task[None]:
        """A guest's write of whole clusters, under way."""
        data = bytes([fill]) * (count * CLUSTER)
        return asyncio.ensure_future(self.disk.write(first * CLUSTER, data))

    def old(self, first: int, count: int = 1) -> bytes:
        """What the clusters held when the scene was set."""
        return self.content[first * CLUSTER : (first + count) * CLUSTER]

    def now(self, first: int, count: int = 1) -> bytes:
        """What the active image holds there now."""
        return bytes(self.active.content[first * CLUSTER : (first + count) * CLUSTER])


def trim(fleece: Fleece, first: int, count: int = 1) -> asyncio.Task[None]:
    """A client's TRIM of whole clusters, under way."""
    return asyncio.ensure_future(fleece.trim(first * CLUSTER, count * CLUSTER))


def read(fleece: Fleece, first: int, count: int = 1) -> asyncio.Task[Any]:
    """A client's read of whole clusters, under way."""
    return asyncio.ensure_future(fleece.read(first * CLUSTER, count * CLUSTER))


async def errno_of(call: Awaitable[object]) -> int | None:
    """The errno that the call fails with; None if it succeeds."""
    try:
        await call
    except OSError as error:
        return error.errno
    return None
