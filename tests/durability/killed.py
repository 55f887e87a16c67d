"""A server that is to be killed: the real one, with one disk, told what to do on its stdin.

    python -m tests.durability.killed FOLDER IMAGE pool|inline

A line of JSON is a command, a line of JSON the answer. ``kill`` starts a thread that waits until
guest writes and copies are in flight, notes how many, and kills the process: nothing of ours can
run between the note and the end, but system calls of other threads go on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.session import SessionOptions
from fleecenbd.server.server import Server
from fleecenbd.server.sockets import listen_unix
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.recovery import recover
from fleecenbd.server.state.trust import boot_id
from fleecenbd.storage import file
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.filesystem import Medium

WAIT_S = 2.0
"""Seconds that the killer waits for something to be in flight."""


class Killed:
    """The server, and the commands that it is given."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.disk = Disk("vda", FileDevice.open(image))
        self.server = Server()
        self.server.add_disk(self.disk)

    async def run(self) -> None:
        """Serve until ``stop``, the end of the commands, or the kill."""
        directory = StateDirectory.open(self.folder / "state")
        await recover(self.server, directory, boot_id())
        path = str(self.folder / "f.sock")
        self.server.listen(listen_unix(path, mode=0o600, group=None).socket)
        self._answer({"ready": True})
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[str] = asyncio.Queue()

        def read() -> None:
            for line in sys.stdin:
                loop.call_soon_threadsafe(lines.put_nowait, line)
            loop.call_soon_threadsafe(lines.put_nowait, '{"do": "stop"}')

        threading.Thread(target=read, daemon=True).start()
        while True:
            command = json.loads(await lines.get())
            if command["do"] == "stop":
                self._answer({"stopped": await self.server.stop()})
                return
            self._answer(await getattr(self, f"_{command.pop('do')}")(**command))

    def _answer(self, value: object) -> None:
        print(json.dumps(value), flush=True)

    async def _begin(self, name: str, mode: str, granularity: int) -> object:
        request = BitmapRequest("chain", mode, granularity)
        assert self.server.store is not None
        temps = self.server.store.temps.maker(name)
        await self.server.begin(name, None, SessionOptions(), temps, bitmap=request)
        return await self._list()

    async def _finish(self, name: str, failed: bool) -> object:
        session = self.server.finish(name, failed=failed)
        assert self.server.store is not None
        await self.server.store.settle()
        return {"failed": session.failed}

    async def _list(self) -> object:
        return [
            {
                "name": session.name,
                "state": session.state,
                "why": [fleece.broken for fleece in session.fleeces],
                "mode": [fleece.own and fleece.own.mode for fleece in session.fleeces],
            }
            for session in self.server.sessions.values()
        ]

    async def _kill(self, after: float, note: str, waits: bool) -> object:
        threading.Thread(target=self._killer, args=(after, note, waits), daemon=True).start()
        return {}

    def _killer(self, after: float, note: str, waits: bool) -> None:
        time.sleep(after)
        end = time.monotonic() + WAIT_S
        while True:
            try:
                copies = sum(len(list(fleece.state.copies)) for fleece in self.disk.fleeces)
            except RuntimeError:  # one came or went just now
                continue
            writes = self.disk.active_writes
            if not waits or (copies and writes) or time.monotonic() > end:
                break
            time.sleep(0.0002)
        with open(note, "w") as out:
            out.write(f"{writes} {copies}")
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """The process."""
    folder, image, way = sys.argv[1:]
    if way == "pool":
        # Everything goes to the pool, as on a network file system: calls take their time.
        file.medium_of = lambda descriptor: Medium.SLOW
    asyncio.run(Killed(Path(folder), Path(image)).run())
    os._exit(0)


if __name__ == "__main__":
    main()
