"""A room with a control socket, and a client of it.

async with controlled() as control:
    answer = await control.put("sessions/n", {"owner": "me"})
"""

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import MakeTemp
from fleecenbd.server.control_socket import ControlSocket
from fleecenbd.server.hooks import Hooks
from fleecenbd.server.jobs import PROGRAM, Jobs
from fleecenbd.server.sessions import Sessions
from fleecenbd.server.temp_place import OWN_FILES, TempPlace
from fleecenbd.storage.device import Device
from tests.server.room import Room, pattern, room
from tests.simulation.gated import GatedDevice


class RoomPlaces:
    """Temp images and disks of a room (server.sessions.Places)."""

    def __init__(self, served: Room) -> None:
        self._served = served
        self.temp = OWN_FILES
        self.temp_reserve: int | None = None

    def make_temp(self, session: str, place: TempPlace) -> MakeTemp:
        async def make(disk: Disk, cluster_size: int, session_id: str) -> Device:
            key = f"{disk.name}@{session}"
            size = -(-disk.size // cluster_size) * cluster_size
            self._served.devices[key] = GatedDevice(key, size)
            return self._served.devices[key]

        return make

    async def open_disk(self, name: str, image: str) -> Disk:
        if image != "/image":
            raise OSError(errno.EINVAL, f"cannot open disk {name}: {image}: No such file")
        self._served.devices[name] = GatedDevice(name, 4096, pattern(4096))
        return Disk(name, self._served.devices[name])

    def uris(self, export: str) -> Sequence[str]:
        return [f"nbd+unix:///{export}?socket=/s"]


@dataclass
class Answer:
    """Status and body of an answer."""

    status: int
    body: Any


class Control:
    """A client of the control socket, and what is behind it."""

    def __init__(
        self, served: Room, sessions: Sessions, jobs: Jobs, socket_: ControlSocket, path: Path
    ) -> None:
        self.served = served
        self.sessions = sessions
        self.jobs = jobs
        self.socket = socket_
        self.path = path
        self.http = aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(path)))

    async def call(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None
    ) -> Answer:
        data = raw if raw is not None else None if body is None else json.dumps(body)
        url = URL(f"http://x/v1/{path}", encoded=True)
        async with self.http.request(method, url, data=data) as answer:
            content = await answer.read()
            return Answer(answer.status, json.loads(content) if content else None)

    async def get(self, path: str) -> Any:
        answer = await self.call("GET", path)
        assert answer.status == 200, answer
        return answer.body

    async def put(self, path: str, body: Any = None, *, status: int = 201) -> Any:
        answer = await self.call("PUT", path, body)
        assert answer.status == status, answer
        return answer.body

    async def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        answer = await self.call("POST", path, body)
        assert answer.status == status, answer
        return answer.body

    async def delete(self, path: str) -> Any:
        answer = await self.call("DELETE", path)
        assert answer.status in (200, 204), answer
        return answer.body

    async def refused(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None
    ) -> tuple[int, str]:
        """The status and the message of a call that fails."""
        answer = await self.call(method, path, body, raw=raw)
        assert list(answer.body) == ["error"], answer
        return answer.status, answer.body["error"]

    def connect(self) -> socket.socket:
        """A connection that says nothing."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(str(self.path))
        return sock


@asynccontextmanager
async def controlled(
    hooks: Hooks | None = None,
    *,
    metrics_only: bool = False,
    program: Sequence[str] = PROGRAM,
    **options: Any,
) -> AsyncIterator[Control]:
    """A room whose server can be controlled. ``program``: what its jobs run."""
    async with room(**options) as served:
        places = RoomPlaces(served)
        sessions = Sessions(served.server, places)
        jobs = Jobs(served.server, sessions, places, program=program)
        control_socket = ControlSocket(
            served.server, sessions, jobs, places, hooks or Hooks(), metrics_only=metrics_only
        )
        path = served._directory / "c"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen(128)
        control_socket.listen(listening)
        control = Control(served, sessions, jobs, control_socket, path)
        try:
            yield control
        finally:
            await control.http.close()
            await sessions.close()
            await jobs.close()
            served.server.events.end()
            await control_socket.close()
            await asyncio.sleep(0)
