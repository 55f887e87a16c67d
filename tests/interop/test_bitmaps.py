"""A session that reads what is dirty: nbdinfo's and qemu-img's maps, and what cannot be read."""

import asyncio
import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import BitmapRequest, RecordingBitmap, Since
from fleecenbd.engine.session import SessionOptions, arm
from fleecenbd.server.exports import FleecingExport
from fleecenbd.server.server import Server
from fleecenbd.storage.device import Device
from fleecenbd.storage.memory import MemoryDevice
from tests.disks import KIB, MIB
from tests.serving import run, try_run

SIZE = 4 * MIB + 512
DIRTY = [(64 * KIB, 64 * KIB), (MIB, 128 * KIB), (4 * MIB, 512)]


def _serve(directory: Path, mode: str, client: Callable[[str], None]) -> None:
    """Run ``client`` with the path of a socket on which vda@n is served."""

    async def serve() -> None:
        server = Server()
        disk = Disk("vda", MemoryDevice(SIZE))
        server.add_disk(disk)
        disk.add_bitmap(RecordingBitmap("chain", SIZE, since=Since("sunday", "an id", 0.0)))
        for offset, length in DIRTY:
            await disk.write(offset, b"d" * length)

        async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> Device:
            return MemoryDevice(-(-disk.size // cluster_size) * cluster_size)

        session = await arm(
            "n",
            [disk],
            SessionOptions(),
            make_temp,
            clock=lambda: 1.0,
            bitmap=BitmapRequest("chain", mode),
        )
        await disk.write(0, b"later" * KIB)
        server.exports["vda@n"] = FleecingExport(session.fleeces[0], description="vda")
        path = directory / "nbd"
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen(8)
        server.listen(sock)
        try:
            await asyncio.to_thread(client, f"nbd+unix:///vda@n?socket={path}")
        finally:
            await server.stop()

    asyncio.run(serve())


def _contexts(uri: str) -> list[str]:
    (export,) = json.loads(run("nbdinfo", "--no-content", "--json", uri))["exports"]
    return [entry if isinstance(entry, str) else entry["context"] for entry in export["contexts"]]


@pytest.mark.parametrize("mode", ["use", "keep"])
def test_nbdinfo_maps_what_is_dirty(tmp_path: Path, mode: str) -> None:
    def client(uri: str) -> None:
        name = "qemu:dirty-bitmap:chain"
        assert _contexts(uri) == ["base:allocation", name, "x-fleecenbd:access"]
        entries = json.loads(run("nbdinfo", f"--map={name}", "--json", uri))
        dirty = [(entry["offset"], entry["length"]) for entry in entries if entry["type"] & 1]
        assert dirty == DIRTY
        assert sum(entry["length"] for entry in entries) == SIZE

    _serve(tmp_path, mode, client)


def test_a_full_backup_offers_no_dirty_map(tmp_path: Path) -> None:
    def client(uri: str) -> None:
        assert _contexts(uri) == ["base:allocation", "x-fleecenbd:access"]

    _serve(tmp_path, "new", client)


def _image_options(uri: str) -> str:
    path = uri.partition("socket=")[2]
    return (
        "driver=nbd,server.type=unix,export=vda@n,"
        f"server.path={path},x-dirty-bitmap=qemu:dirty-bitmap:chain"
    )


def test_qemu_img_maps_what_is_dirty(tmp_path: Path) -> None:
    def client(uri: str) -> None:
        entries: list[dict[str, Any]] = json.loads(
            run("qemu-img", "map", "--output=json", "--image-opts", _image_options(uri))
        )
        # QEMU shows a dirty range as one that is not data (qemu-img-map has no word for dirty).
        dirty = [(entry["start"], entry["length"]) for entry in entries if not entry["data"]]
        assert dirty == DIRTY

    _serve(tmp_path, "use", client)


def test_reads_within_the_bitmap_succeed_and_outside_say_so(tmp_path: Path) -> None:
    def client(uri: str) -> None:
        read = partial(try_run, "nbdsh", "-u", uri, "-c")
        within = read(f"assert h.pread({128 * KIB}, {MIB}) == bytearray(b'd' * {128 * KIB})")
        assert within.returncode == 0, within.stderr
        outside = read("h.pread(512, 0)")
        assert outside.returncode != 0
        assert "Invalid argument" in outside.stderr

    _serve(tmp_path, "use", client)
