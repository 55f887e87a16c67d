"""What a pull tells of itself: progress some times a second, a look at the temp image, texts."""

from __future__ import annotations

import asyncio
import os
from types import TracebackType

from fleecenbd.client.copy_loop import CopyLoop
from fleecenbd.client.endpoints import Source
from fleecenbd.client.events import Checksum, Done, OnEvent, Progress
from fleecenbd.client.meter import Meter, eta_s
from fleecenbd.client.options import PullOptions
from fleecenbd.client.plan import ACCESS, IN_TEMP, Plan, map_windows

TEMP_INTERVAL_S = 2.0
"""Seconds between two looks at the temp image, at least."""
TEMP_SHARE = 50
"""A look that takes long is made so much more seldom: it costs the server's time, too."""


class Telling:
    """While it is entered, events of one pull."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        copying: CopyLoop,
        on_event: OnEvent,
        options: PullOptions,
    ) -> None:
        self._source = source
        self._plan = plan
        self._copying = copying
        self._on_event = on_event
        self._interval_s = options.progress_s
        self._watches = options.watch_temp and ACCESS in source.contexts
        self._temp = plan.temp if self._watches else None
        self._temp_peak = self._temp
        self._loop = asyncio.get_running_loop()
        self._meter = Meter(self._loop.time())
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Telling:
        self._tasks = [self._loop.create_task(self._tell(), name="progress")]
        if self._watches:
            self._tasks.append(self._loop.create_task(self._watch(), name="temp image"))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _tell(self) -> None:
        while True:
            self._on_event(self.progress())
            await asyncio.sleep(self._interval_s)

    async def _watch(self) -> None:
        interval_s = TEMP_INTERVAL_S
        while True:
            await asyncio.sleep(interval_s)
            began = self._loop.time()
            try:
                self._temp = await temp_bytes(self._source)
            except OSError:
                return  # a read says it better
            self._temp_peak = max(self._temp_peak or 0, self._temp)
            interval_s = max(TEMP_INTERVAL_S, TEMP_SHARE * (self._loop.time() - began))

    def progress(self) -> Progress:
        """As it is now."""
        copying, now = self._copying, self._loop.time()
        rate = self._meter.look(now, copying.read)
        return Progress(
            durable=copying.durable,
            read=copying.read,
            to_copy=self._plan.to_copy,
            released=copying.released,
            rate=rate,
            eta_s=eta_s(copying.data_left, rate),
            temp_bytes=self._temp,
            elapsed_s=self._meter.elapsed_s(now),
            paused=copying.paused,
        )

    def done(self, checksum: Checksum | None, *, verified: bool) -> Done:
        """The last word; a last progress goes before it."""
        last = self.progress()
        self._on_event(last)
        return Done(
            durable=last.durable,
            released=last.released,
            read=last.read,
            elapsed_s=last.elapsed_s,
            checksum=checksum,
            verified=verified,
            temp_peak=self._temp_peak,
        )


async def temp_bytes(source: Source) -> int:
    """How much of the disk the server holds in its temp image. Raises OSError."""
    found = 0
    async for _, (extents,) in map_windows(source, [ACCESS]):
        found += sum(length for length, flags in extents if flags & IN_TEMP)
    return found


def text_of(error: OSError) -> str:
    """One line: the object, if the error knows it, and the cause."""
    text = " ".join((error.strerror or str(error)).split())
    return text if error.filename is None else f"{error.filename}: {text}"


def full_text(error: OSError, left: int, path: str | None) -> str:
    """What a target that is full lacks: about ``left`` bytes are still to be written."""
    text = f"{error.strerror or error}; about {left} bytes are still to be written"
    if path is not None:
        try:
            found = os.statvfs(os.path.dirname(path) or ".")
        except OSError:
            return text
        free = found.f_bavail * found.f_frsize
        text += f", and {free} are free: {max(0, left - free)} are missing"
    return f"{text}; make room"
