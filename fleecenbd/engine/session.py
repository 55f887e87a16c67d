"""A session: one point in time over one or more disks, armed all or nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.state import (
    BITMAP_CLUSTERS_MAX,
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    CLUSTER_SIZE_MIN,
    FleeceState,
)
from fleecenbd.storage.device import Device

ARM_DEADLINE_S = 5.0
"""Seconds that guests are held at most while active writes in flight end."""
CLUSTER_SIZE_MAX = 32 << 20
"""Bytes. A TRIM aligned to the preferred block size must fit the largest request."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session behaves. Sizes in bytes, times in seconds.

    ``cbw_timeout_s`` 0: guest writes wait without end. ``temp_limit`` None: no limit.
    ``cluster_size`` None: the smallest that keeps a bitmap small.
    """

    on_cbw_error: str = BREAK_SNAPSHOT
    cbw_timeout_s: float = 20.0
    temp_limit: int | None = None
    cluster_size: int | None = None

    def __post_init__(self) -> None:
        if self.on_cbw_error not in (BREAK_SNAPSHOT, BREAK_GUEST_WRITE):
            raise ValueError(
                f"on_cbw_error is {BREAK_SNAPSHOT} or {BREAK_GUEST_WRITE}, not {self.on_cbw_error}"
            )
        if not 0 <= self.cbw_timeout_s < float("inf"):
            raise ValueError(f"cbw_timeout is a number of seconds, not {self.cbw_timeout_s}")
        if self.temp_limit is not None and self.temp_limit < 0:
            raise ValueError(f"temp_limit is a number of bytes, not {self.temp_limit}")
        size = self.cluster_size
        if size is not None and (
            size & (size - 1) or not CLUSTER_SIZE_MIN <= size <= CLUSTER_SIZE_MAX
        ):
            raise ValueError(
                f"cluster_size is a power of two from {CLUSTER_SIZE_MIN} to {CLUSTER_SIZE_MAX}, "
                f"not {size}"
            )


def default_cluster_size(size: int) -> int:
    """The smallest power of two that keeps one bitmap of ``size`` bytes at 64 Mi clusters."""
    cluster_size = CLUSTER_SIZE_MIN
    while -(-size // cluster_size) > BITMAP_CLUSTERS_MAX:
        cluster_size *= 2
    return cluster_size


class Session:
    """A point in time; made by ``arm``."""

    def __init__(
        self,
        name: str,
        options: SessionOptions,
        fleeces: list[Fleece],
        *,
        armed_at: float,
        pause_s: float,
    ) -> None:
        self.name = name
        self.id = _random_uuid()
        self.options = options
        self.fleeces = fleeces
        self.armed_at = armed_at
        """Seconds since the epoch."""
        self.pause_s = pause_s
        """Seconds that guest writes were held."""
        self.failed = False
        """Finished, and not as a success."""

    @property
    def state(self) -> str:
        """``active``, ``broken`` or ``finished``."""
        if any(fleece.finished for fleece in self.fleeces):
            return "finished"
        if any(fleece.broken is not None for fleece in self.fleeces):
            return "broken"
        return "active"

    def finish(self, *, failed: bool = False) -> None:
        """End the session over all its disks in one step. A broken one counts as failed."""
        self.failed = failed or self.state == "broken"
        for fleece in self.fleeces:
            fleece.finish()

    async def wait_closed(self) -> None:
        """Return when the last call on a temp image has ended (a hung one may never)."""
        for fleece in self.fleeces:
            await fleece.wait_closed()


def _random_uuid() -> str:
    """A UUID of version 4 (RFC 9562); the module that makes them too takes long to import."""
    number = int.from_bytes(os.urandom(16))
    number = number & ~(0xF << 76) | 4 << 76  # the version
    number = number & ~(0x3 << 62) | 2 << 62  # the variant
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


MakeTemp = Callable[[Disk, int], Awaitable[Device]]
"""(disk, cluster size in bytes) to an empty temp image, whose size is that of the disk rounded
up to a multiple of the cluster size and of its own ``hole_size``."""


async def arm(
    name: str,
    disks: Sequence[Disk],
    options: SessionOptions,
    make_temp: MakeTemp,
    *,
    clock: Callable[[], float],
    deadline_s: float = ARM_DEADLINE_S,
) -> Session:
    """Begin a session over ``disks``: all of them at one moment, or none.

    ``clock`` gives the moment of arming (seconds since the epoch). Raises OSError: what
    ``make_temp`` raised, EINVAL for a cluster size below the temp image's block and for a temp
    limit below one cluster, ETIMEDOUT when active writes were still in flight after
    ``deadline_s``. Nothing is left behind then.
    """
    fleeces: list[Fleece] = []
    loop = asyncio.get_running_loop()
    try:
        for disk in disks:
            fleeces.append(await _make_fleece(name, disk, options, make_temp))
        started = loop.time()
        for disk in disks:
            disk.hold()
        try:
            await _wait_idle(disks, started + deadline_s, deadline_s)
            # One step: no active write is in flight on any disk, and every fleece is installed.
            for fleece in fleeces:
                fleece.disk.fleeces.append(fleece)
            armed_at = clock()
        finally:
            for disk in disks:
                disk.release_hold()
        pause_s = loop.time() - started
    except BaseException:
        for fleece in fleeces:
            fleece.finish()
        raise
    return Session(name, options, fleeces, armed_at=armed_at, pause_s=pause_s)


async def _wait_idle(disks: Sequence[Disk], deadline: float, deadline_s: float) -> None:
    while busy := [disk for disk in disks if disk.active_writes]:
        if not await busy[0].wait_idle(deadline):
            raise OSError(
                errno.ETIMEDOUT,
                f"writes to {busy[0].name} were still in flight after {deadline_s:g} s",
            )


async def _make_fleece(
    session_name: str, disk: Disk, options: SessionOptions, make_temp: MakeTemp
) -> Fleece:
    asked = options.cluster_size
    cluster_size = asked if asked is not None else default_cluster_size(disk.size)
    temp = await make_temp(disk, cluster_size)
    try:
        if asked is not None and asked < temp.hole_size:
            raise OSError(
                errno.EINVAL,
                f"cluster size {asked} is below {temp.hole_size}, the block size of the temp "
                f"image's file system: smaller holes free nothing",
            )
        cluster_size = max(cluster_size, temp.hole_size)
        limit = options.temp_limit
        if limit is not None and limit < cluster_size:
            raise OSError(
                errno.EINVAL,
                f"{disk.name}@{session_name}: a temp limit of {limit} bytes is less than one "
                f"cluster of {cluster_size} bytes, so that nothing could be kept; set it higher",
            )
        state = FleeceState(
            f"{disk.name}@{session_name}",
            disk.device,
            temp,
            cluster_size=cluster_size,
            on_cbw_error=options.on_cbw_error,
            cbw_timeout_s=options.cbw_timeout_s,
            temp_limit=options.temp_limit,
        )
        return Fleece(disk, state)
    except BaseException:
        temp.close()
        raise
