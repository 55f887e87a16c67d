"""Jobs whose pulls are played by the test, line by line (fake_pull.py).

async with playing() as play:
    job = await play.start()
    child = await play.child()
    await child.says(start(...))
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.server.controlled import Control, controlled
from tests.server.room import SIZE, WAIT_S

FAKE = Path(__file__).with_name("fake_pull.py")
TARGET = "/backup/vda.raw"


class Child:
    """A pull of one job."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._stdin: list[Any] = []
        self.about: dict[str, Any] = {}

    async def _next(self) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            line = await self._reader.readline()
        assert line, "the child has ended"
        words: dict[str, Any] = json.loads(line)
        return words

    async def came(self) -> Child:
        self.about = await self._next()
        return self

    @property
    def pid(self) -> int:
        return int(self.about["pid"])

    async def _do(self, **words: object) -> None:
        """Return when it is done."""
        self._writer.write(json.dumps(words).encode() + b"\n")
        while "done" not in (answer := await self._next()):
            self._stdin.append(answer["stdin"])

    async def says(self, event: str, **fields: object) -> None:
        """An event on its standard output."""
        await self.prints(json.dumps({"event": event, **fields}) + "\n")

    async def prints(self, text: str) -> None:
        await self._do(stdout=text)

    async def complains(self, text: str) -> None:
        """On standard error."""
        await self._do(stderr=text)

    async def begins(self, session_id: str, **fields: object) -> None:
        """The event start."""
        about = {"size": SIZE, "to_copy": SIZE, "resumed": 0, **fields}
        await self.says("start", source="s", target=TARGET, session_id=session_id, **about)

    async def progresses(self, durable: int, **fields: object) -> None:
        about = {"read": durable, "to_copy": SIZE, "released": durable, "rate": 1e6, **fields}
        times = {"eta_s": 1.5, "temp_bytes": 4096, "elapsed_s": 2.0, "paused": False}
        await self.says("progress", durable=durable, **{**times, **about})

    async def completes(self, **fields: object) -> None:
        """The event done, and its end."""
        about = {"checksum": None, "verified": False, "temp_peak": 8192, **fields}
        await self.says("done", durable=SIZE, released=SIZE, read=SIZE, elapsed_s=3.0, **about)
        self.exits(0)

    async def hangs(self) -> None:
        """Deaf from now on."""
        await self._do(hang=True)

    async def leaves_one(self) -> None:
        """A process of its own that outlives it, and holds its pipes."""
        await self._do(leave=True)

    def exits(self, status: int) -> None:
        self._writer.write(json.dumps({"exit": status}).encode() + b"\n")

    async def hears(self) -> Any:
        """The next command; None: the end of its stdin."""
        if self._stdin:
            return self._stdin.pop(0)
        return (await self._next())["stdin"]

    async def ended(self) -> None:
        """Its process, and those that it has left, have gone."""
        async with asyncio.timeout(WAIT_S):
            while await self._reader.read(4096):
                pass

    def vanish(self) -> None:
        self._writer.transport.abort()


class Play:
    """A controlled room, and the children that its jobs start."""

    def __init__(self, control: Control, listening: socket.socket) -> None:
        self.control = control
        self.children: list[Child] = []
        self._listening = listening

    async def child(self) -> Child:
        """The next one that comes."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_S):
            sock, _ = await loop.sock_accept(self._listening)
            child = Child(*await asyncio.open_unix_connection(sock=sock))
            self.children.append(child)
            return await child.came()

    async def start(self, **fields: object) -> Any:
        """A job of vda@n to TARGET."""
        body = {"session": "n", "disk": "vda", "target": TARGET, **fields}
        return await self.control.post("jobs", body, status=201)

    async def begun(self, **fields: object) -> tuple[Any, Child]:
        """A job, and its child, which has begun."""
        job = await self.start(**fields)
        child = await self.child()
        await child.begins(job["session_id"])
        return job, child

    async def job(self, job_id: str) -> Any:
        return await self.control.get(f"jobs/{job_id}")

    async def ended(self, job_id: str) -> Any:
        """The job, once it has ended."""
        running = self.control.jobs._jobs.get(job_id)
        if running is not None:
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait({running.task})
        return await self.job(job_id)

    async def finished(self, session: str) -> None:
        """Return when the session is."""
        async with asyncio.timeout(WAIT_S):
            while (await self.control.get(f"sessions/{session}"))["state"] != "finished":
                pass

    async def seen(self, job_id: str, what: str) -> Any:
        """The job, once this field of it is there: what a child prints takes its time."""
        async with asyncio.timeout(WAIT_S):
            while True:
                job = await self.job(job_id)
                if job[what] is not None:
                    return job


@asynccontextmanager
async def playing(*, session: str | None = "n", **options: Any) -> AsyncIterator[Play]:
    """A room with a session, in which jobs' pulls are played."""
    with TemporaryDirectory() as directory:
        listening = socket.socket(socket.AF_UNIX)
        listening.setblocking(False)
        path = os.path.join(directory, "fake")
        listening.bind(path)
        listening.listen()
        program = (sys.executable, "-I", "-S", str(FAKE), path)
        async with controlled(program=program, session=session, **options) as control:
            play = Play(control, listening)
            try:
                yield play
            finally:
                for child in play.children:
                    child.vanish()
                listening.close()
