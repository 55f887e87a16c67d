"""Where a pull writes to: every kind keeps the same contract, and refuses what it must."""

import asyncio
import errno
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.client import targets
from fleecenbd.client.endpoints import Target, TargetLost
from fleecenbd.client.file_target import open_file
from fleecenbd.client.options import Backing
from fleecenbd.client.targets import open_target
from tests.descriptors import descriptors_of
from tests.serving import serving

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
KINDS = ("raw", "block", "qcow2", "compressed", "overlay", "nbd")
RENAMED = ("raw", "qcow2", "compressed", "overlay")
BASE = random.Random(1).randbytes(SIZE)
Open = Callable[..., Awaitable[Target]]


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "block.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    device = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@asynccontextmanager
async def nbd_server(tmp_path: Path, *options: str, size: int = SIZE) -> AsyncIterator[str]:
    """A qemu-nbd over ``nbd.img``; its URI."""
    image, sock, ready = tmp_path / "nbd.img", tmp_path / "nbd.sock", tmp_path / "nbd.pid"
    ready.unlink(missing_ok=True)
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(size)
    process = await asyncio.create_subprocess_exec(
        *("qemu-nbd", "-f", "raw", "-t", "-e", "8", "-x", "", "-k", str(sock), *options),
        *("--pid-file", str(ready), str(image)),
    )
    try:
        while not ready.exists():
            assert process.returncode is None
            await asyncio.sleep(0.01)
        yield f"nbd+unix:///?socket={sock}"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        sock.unlink(missing_ok=True)


class Kind:
    """One kind of target, and how to look at what is in it."""

    def __init__(self, name: str, text: str, path: Path | None, options: dict[str, Any]) -> None:
        self.name = name
        self.text = text
        self.path = path
        self.options = options

    async def open(self, *, force: bool = False, resume: bool = False) -> Target:
        return await open_target(self.text, SIZE, force=force, resume=resume, **self.options)

    def content(self, path: Path) -> bytes:
        """As a guest sees it."""
        out = path.with_name("content")
        source = ("-f", "raw" if self.name in ("raw", "block", "nbd") else "qcow2", str(path))
        # -U: a target's server is still there.
        subprocess.run(["qemu-img", "convert", "-U", *source, "-O", "raw", out], check=True)
        return out.read_bytes()


@pytest.fixture(params=KINDS)
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kind]:
    name = request.param
    path = tmp_path / "target"
    if name == "raw":
        yield Kind(name, str(path), path, {})
    elif name == "block":
        yield Kind(name, request.getfixturevalue("block_device"), None, {})
    elif name == "nbd":
        async with nbd_server(tmp_path) as uri:
            yield Kind(name, uri, None, {})
    elif name == "overlay":
        (tmp_path / "base.raw").write_bytes(BASE)
        yield Kind(name, f"qcow2:{path}", path, {"backing": Backing("base.raw", "raw")})
    else:
        yield Kind(name, f"qcow2:{path}", path, {"compress": name == "compressed"})


def final(kind: Kind, tmp_path: Path) -> Path:
    if kind.path is not None:
        return kind.path
    return tmp_path / ("block.img" if kind.name == "block" else "nbd.img")


async def test_what_is_written_and_zeroed_is_there_when_it_is_complete(
    kind: Kind, tmp_path: Path
) -> None:
    target = await kind.open()
    unit = max(target.write_unit, 512)
    data = random.Random(2).randbytes(2 * 64 * KIB)
    expected = bytearray(BASE if kind.name == "overlay" else bytes(SIZE))
    await asyncio.gather(
        target.pwrite(0, memoryview(data)[:unit]), target.pwrite(SIZE - len(data), data)
    )
    expected[:unit], expected[-len(data) :] = data[:unit], data
    if not target.is_zero:
        await target.zero(MIB, MIB)
        expected[MIB : 2 * MIB] = bytes(MIB)
    await target.flush()
    assert await target.pread(SIZE - len(data), len(data)) == data
    if kind.name in RENAMED:
        assert not final(kind, tmp_path).exists()
    await target.complete()
    assert kind.content(final(kind, tmp_path)) == expected
    if kind.name in RENAMED:
        assert final(kind, tmp_path).stat().st_mode & 0o077 == 0
        assert f"{final(kind, tmp_path).name}.part" not in _names(tmp_path)


async def test_what_is_kept_can_be_gone_on_with(kind: Kind, tmp_path: Path) -> None:
    target = await kind.open()
    data = random.Random(3).randbytes(64 * KIB)
    await target.pwrite(0, data)
    await target.flush()
    await target.keep()
    target = await kind.open(resume=True)
    assert not target.is_zero, "who knows what is in it"
    await target.pwrite(64 * KIB, data)
    await target.zero(128 * KIB, 64 * KIB)
    await target.flush()
    await target.complete()
    found = kind.content(final(kind, tmp_path))
    assert found[: 192 * KIB] == data + data + bytes(64 * KIB)


async def test_what_is_discarded_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    before = _names(tmp_path)
    target = await kind.open()
    await target.pwrite(0, b"x" * 64 * KIB)
    await target.discard()
    assert _names(tmp_path) == before


async def test_what_holds_something_is_written_over_only_when_told_to(
    kind: Kind, tmp_path: Path
) -> None:
    target = await kind.open()
    await target.pwrite(0, b"x" * 64 * KIB)
    await target.complete()
    with pytest.raises(OSError, match="--force") as caught:
        await kind.open()
    assert caught.value.errno == errno.EEXIST
    target = await kind.open(force=True)
    await target.discard()
    if kind.name in RENAMED:
        assert kind.content(final(kind, tmp_path))[:4] == b"xxxx", "replaced when complete, only"


@pytest.mark.parametrize("kind", RENAMED, indirect=True)
async def test_what_another_pull_has_left_is_not_taken_for_ours(kind: Kind) -> None:
    await (await kind.open()).keep()
    with pytest.raises(OSError, match="from another pull"):
        await kind.open()
    await (await kind.open(force=True)).discard()
    with pytest.raises(OSError, match="nothing can be resumed"):
        await kind.open(resume=True)


@pytest.mark.parametrize("text", ["{}", "qcow2:{}"])
async def test_a_part_that_was_cut_is_not_gone_on_with(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out"
    target = await open_target(text.format(path), SIZE, force=False, resume=False)
    await target.pwrite(0, BASE)
    await target.flush()
    await target.keep()
    part = f"{path}.part"
    os.truncate(part, os.stat(part).st_size - MIB)
    with pytest.raises(OSError, match=r"nothing can be resumed: .* it was changed since") as caught:
        await open_target(text.format(path), SIZE, force=False, resume=True)
    assert caught.value.errno == errno.EIO
    assert "out.part" in _names(tmp_path)


@pytest.mark.parametrize("kind", RENAMED, indirect=True)
async def test_what_has_come_meanwhile_is_replaced_only_when_told_to(kind: Kind) -> None:
    target = await kind.open()
    assert kind.path is not None
    kind.path.write_text("somebody else's")
    with pytest.raises(FileExistsError, match="has come to be there meanwhile"):
        await target.complete()
    await target.keep()
    assert kind.path.read_text() == "somebody else's"
    target = await kind.open(resume=True, force=True)
    await target.complete()
    assert kind.path.stat().st_size > 100


async def test_who_is_cancelled_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    arrived, go_on, ended = asyncio.Event(), threading.Event(), asyncio.Event()

    def slow(*words: Any, **named: Any) -> Target:
        loop.call_soon_threadsafe(arrived.set)
        assert go_on.wait(30)
        try:
            return open_file(*words, **named)
        finally:
            loop.call_soon_threadsafe(ended.set)

    monkeypatch.setattr(targets, "open_file", slow)
    for resume in (False, True):
        if resume:
            await open_file(str(tmp_path / "t"), SIZE, force=False, resume=False).keep()
        for event in (arrived, go_on, ended):
            event.clear()
        opening = asyncio.create_task(
            open_target(str(tmp_path / "t"), SIZE, force=False, resume=resume)
        )
        await arrived.wait()
        opening.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await ended.wait()
        assert descriptors_of(tmp_path) == []
        assert _names(tmp_path) == ({"t.part"} if resume else set())


async def test_a_fresh_file_is_sparse_and_known_to_be_zero(tmp_path: Path) -> None:
    target = await open_target(str(tmp_path / "t"), 1 << 40, force=False, resume=False)
    assert target.is_zero
    await target.pwrite(1 << 39, b"x")
    await target.complete()
    stat = (tmp_path / "t").stat()
    assert stat.st_size == 1 << 40
    assert stat.st_blocks * 512 < MIB


CHILD = """
import asyncio, os, sys
from fleecenbd.client.targets import open_target

async def work():
    target = await open_target(sys.argv[1], int(sys.argv[2]), force=False, resume=False)
    await target.pwrite(0, b"safe" * 16384)
    await target.flush()
    await target.pwrite(1 << 20, b"lost" * 16384)
    print("flushed", flush=True)
    await asyncio.sleep(1000)

asyncio.run(work())
"""


@pytest.mark.parametrize("text", ["raw:{}", "qcow2:{}"])
def test_what_was_flushed_outlives_a_kill_and_nobody_is_left_behind(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "target"
    words = [sys.executable, "-c", CHILD, text.format(path), str(SIZE)]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "flushed\n"
        helpers = _children(child.pid)
        child.kill()
    assert bool(helpers) is text.startswith("qcow2")
    for helper in helpers:
        _wait_for_end(helper)
    assert _names(temporary) == set()

    async def resumed() -> bytes:
        target = await open_target(text.format(path), SIZE, force=False, resume=True)
        data = await target.pread(0, 64 * KIB)
        await target.complete()
        return bytes(data)

    assert asyncio.run(resumed()) == b"safe" * 16384


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def _kill_qemu_nbd() -> None:
    killed = 0
    for pid in _children(os.getpid()):
        if b"qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            killed += 1
    assert killed == 1


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _told(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wait_for_end(pid: int) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 30)[0], "it goes on without us"
        finally:
            os.close(descriptor)


async def test_a_qemu_nbd_that_dies_is_named_and_told_of(tmp_path: Path) -> None:
    target = await open_target(f"qcow2:{tmp_path / 't'}", SIZE, force=False, resume=False)
    _kill_qemu_nbd()
    with pytest.raises(OSError, match=r".") as caught:
        await target.pwrite(0, b"x" * 4096)
    assert caught.value.filename == str(tmp_path / "t")
    await target.discard()
    assert _names(tmp_path) == set()


async def test_a_qemu_nbd_whose_socket_is_there_and_that_does_not_listen_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, real = tmp_path / "bin", shutil.which("qemu-nbd")
    programs.mkdir()
    (programs / "qemu-nbd").write_text(
        f"""#!{sys.executable}
import os, socket, sys, time
path = sys.argv[sys.argv.index("--socket") + 1]
with socket.socket(socket.AF_UNIX) as bound:
    bound.bind(path)
    time.sleep(0.3)
os.unlink(path)
os.execv({real!r}, ["qemu-nbd", *sys.argv[1:]])
"""
    )
    (programs / "qemu-nbd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    target = await open_target(f"qcow2:{tmp_path / 'target'}", SIZE, force=False, resume=False)
    await target.discard()


async def test_a_disk_of_odd_size_is_compressed_too(tmp_path: Path) -> None:
    size = MIB + 66048
    path = tmp_path / "t"
    target = await open_target(f"qcow2:{path}", size, force=False, resume=False, compress=True)
    assert target.write_unit == 64 * KIB
    data = b"abcd" * (64 * KIB // 4)
    await target.pwrite(MIB + 64 * KIB, data)
    await target.complete()
    assert f"({size} bytes)" in _told("qemu-img", "info", path)
    assert "100.00% compressed" in _told("qemu-img", "check", path)
    assert path.stat().st_size < MIB


@pytest.mark.parametrize("compress", [True, False])
async def test_what_was_begun_compressed_has_the_disk_s_size_however_it_is_resumed(
    tmp_path: Path, compress: bool
) -> None:
    size = MIB + 66048
    text = f"qcow2:{tmp_path / 't'}"
    target = await open_target(text, size, force=False, resume=False, compress=True)
    await target.keep()
    target = await open_target(text, size, force=False, resume=True, compress=compress)
    await target.complete()
    assert f"({size} bytes)" in _told("qemu-img", "info", tmp_path / "t")


async def test_an_nbd_target_says_what_a_lost_connection_may_have_cost(tmp_path: Path) -> None:
    async with nbd_server(tmp_path) as uri:
        target = await open_target(uri, SIZE, force=False, resume=False, retries=50)
        await target.pwrite(0, b"x" * 4096)
    async with nbd_server(tmp_path):
        with pytest.raises(TargetLost):
            await target.flush()
        await target.flush()  # once
        await target.complete()


@pytest.mark.parametrize(
    ("options", "size", "word"),
    [
        (("-r",), SIZE, "read-only"),
        ((), SIZE - 4096, "4096 are missing"),
    ],
)
async def test_an_export_that_cannot_be_a_target_is_refused(
    tmp_path: Path, options: tuple[str, ...], size: int, word: str
) -> None:
    async with nbd_server(tmp_path, *options, size=size) as uri:
        with pytest.raises(OSError, match=word):
            await open_target(uri, SIZE, force=False, resume=False)


def test_an_export_without_flush_is_refused(tmp_path: Path) -> None:
    sock = tmp_path / "s"
    with subprocess.Popen(
        [
            *("nbdkit", "-f", "--exit-with-parent", "-P", tmp_path / "pid", "-U", sock, "eval"),
            *("get_size=echo 4194304", "pread=dd if=/dev/zero count=$3 iflag=count_bytes"),
            "pwrite=cat >/dev/null",
        ]
    ) as process:
        try:
            while not (tmp_path / "pid").exists():
                assert process.poll() is None
            with pytest.raises(OSError, match="no FLUSH"):
                asyncio.run(
                    open_target(f"nbd+unix:///?socket={sock}", SIZE, force=False, resume=False)
                )
        finally:
            process.kill()


def test_a_point_in_time_and_a_served_disk_are_no_targets(tmp_path: Path) -> None:
    image = tmp_path / "vda.raw"
    image.write_bytes(bytes(SIZE))
    with serving(tmp_path, f"vda={image}", "--begin", "n") as server:
        for text, word in (
            (server.uri("vda@n"), "point in time"),
            (str(image), "in use"),
        ):
            with pytest.raises(OSError, match=word):
                asyncio.run(open_target(text, SIZE, force=True, resume=False))
    assert image.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{}/no/where", "make it"),
        ("{}", "is a folder"),
        ("{}/", "is a folder"),
        ("qcow2:{}/no/where", "make it"),
        ("/dev/null", "neither a file nor a block device"),
    ],
)
async def test_what_can_be_no_target_is_told_why(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(OSError, match=word):
        await open_target(text.format(tmp_path), SIZE, force=False, resume=False)
    assert _names(tmp_path) == set()


async def test_a_block_device_too_small_or_in_use_is_told_so(block_device: str) -> None:
    with pytest.raises(OSError, match="4096 are missing"):
        await open_target(block_device, SIZE + 4096, force=False, resume=False)
    descriptor = os.open(block_device, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(OSError, match="in use"):
            await open_target(block_device, SIZE, force=True, resume=False)
    finally:
        os.close(descriptor)


async def test_compression_and_backing_files_are_for_qcow2(tmp_path: Path) -> None:
    for options in ({"compress": True}, {"backing": Backing("b", "raw")}):
        with pytest.raises(OSError, match="no qcow2: target"):
            await open_target(str(tmp_path / "t"), SIZE, force=False, resume=False, **options)
