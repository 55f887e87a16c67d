"""The source of a pull: a fleecing export of ours, or somebody else's."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from fleecenbd.client.endpoints import Source, SourceLost
from fleecenbd.client.source import NbdSource, open_source, session_id_of
from fleecenbd.storage import libnbd
from fleecenbd.storage.nbd_handshake import NbdFacts
from tests.controlling import Control
from tests.disks import MIB, make_disk
from tests.serving import CLIENTS_PATH, Serving, connected, free_port, serving

SIZE = 8 * MIB + 512
ACCESS, ALLOCATION = "x-fleecenbd:access", "base:allocation"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "vm.raw", SIZE)


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Serving]:
    with serving(tmp_path, disk, "--begin", "n") as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """A server and its disk, for tests that leave both as they are."""
    directory = tmp_path_factory.mktemp("shared")
    disk = make_disk(directory / "vm.raw", SIZE)
    with serving(directory, disk, "--begin", "n") as server:
        yield server, disk


@asynccontextmanager
async def opened(uri: str, **options: object) -> AsyncIterator[NbdSource]:
    source = await open_source(uri, **options)  # type: ignore[arg-type]
    try:
        yield source
    finally:
        await source.close()


async def read_all(source: Source, step: int = MIB) -> bytes:
    """The whole disk, many requests at a time."""
    pieces = await asyncio.gather(
        *(source.pread(at, min(step, source.size - at)) for at in range(0, source.size, step))
    )
    return b"".join(pieces)


def content(image: Path) -> bytes:
    return image.read_bytes()


# -- ours ------------------------------------------------------------------------------------------


async def test_a_fleecing_export_is_read_mapped_and_released(server: Serving, disk: Path) -> None:
    before = content(disk)
    async with opened(server.uri("vm@n")) as source:
        assert source.size == SIZE
        assert source.cluster == 65536
        assert source.can_trim
        assert source.contexts == {ALLOCATION, ACCESS}
        shown = Control(f"{server.unix}.control").call("GET", "sessions/n")
        assert source.session_id == shown["id"]
        assert await read_all(source) == before
        extents = await source.extents(ALLOCATION, 0, SIZE)
        assert sum(length for length, _ in extents) == SIZE
        assert any(flags & 2 for _, flags in extents)  # it has holes
        await source.trim(0, 65536)
        assert await source.extents(ACCESS, 4096, SIZE - 4096) == [(61440, 0), (SIZE - 65536, 1)]


async def test_what_was_released_fails_in_the_servers_words(server: Serving) -> None:
    async with opened(server.uri("vm@n")) as source:
        await source.trim(0, 65536)
        for _ in range(2):
            with pytest.raises(OSError, match="was released, by a TRIM") as caught:
                await source.pread(0, 4096)
            assert caught.value.errno == errno.EINVAL
            assert not isinstance(caught.value, SourceLost)
            assert caught.value.filename == source.name
        assert len(await source.pread(65536, 4096)) == 4096


async def test_a_session_that_broke_fails_with_its_reason(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, disk, "--begin", "n", "--temp-limit", "4k") as server:
        async with opened(server.uri("vm@n")) as source:
            await source.pread(0, 4096)
            with connected(server.uri("vm")) as guest:
                guest.pwrite(os.urandom(65536), 0)
            with pytest.raises(
                OSError, match=r"vm@n is broken: .*the temp image of vm@n"
            ) as caught:
                await source.pread(0, 4096)
            assert caught.value.errno == errno.EIO
            assert not isinstance(caught.value, SourceLost)
        async with opened(server.uri("vm@n")) as source:
            assert source.session_id is not None  # the description of a broken one names it too


async def test_a_bitmap_is_asked_for_by_name(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path, disk) as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "disks/vm/bitmaps/nightly")
        with connected(server.uri("vm")) as guest:
            guest.pwrite(os.urandom(4096), 1 << 20)
        control.call("PUT", "sessions/n", bitmap="nightly", bitmap_mode="use")
        dirty = "qemu:dirty-bitmap:nightly"
        async with opened(server.uri("vm@n"), contexts=[dirty, "qemu:dirty-bitmap:no"]) as source:
            assert source.contexts == {ALLOCATION, ACCESS, dirty}
            extents = await source.extents(dirty, 0, SIZE)
            assert (1 << 20, 0) in extents[:1]
            assert any(flags == 1 for _, flags in extents)


async def test_several_connections_where_they_are_of_use(shared: tuple[Serving, Path]) -> None:
    server, _ = shared
    async with opened(server.uri("vm@n"), connections=3) as source:
        assert source.requests == 48
    async with opened(server.uri("vm@n"), connections=1, requests=5) as source:
        assert source.requests == 5
    async with opened(server.uri("vm@n")) as source:
        assert source.requests == 16 * min(4, os.cpu_count() or 1)


# -- not ours --------------------------------------------------------------------------------------


async def test_a_guests_export_is_read_and_never_trimmed(shared: tuple[Serving, Path]) -> None:
    server, disk = shared
    async with opened(server.uri("vm")) as source:
        assert source.session_id is None
        assert not source.can_trim
        assert source.contexts == {ALLOCATION}
        assert await read_all(source) == content(disk)
        with pytest.raises(AssertionError):
            await source.trim(0, 65536)
    assert content(disk)[:1] != b"\0"


def make_keys(path: Path) -> Path:
    """A key for the user ``backup``."""
    subprocess.run(["psktool", "-u", "backup", "-p", path], check=True, capture_output=True)
    return path


@contextmanager
def nbdkit(directory: Path, *arguments: str | Path, socket: str = "k.sock") -> Iterator[Path]:
    """Somebody else's server, on a Unix socket (its path) if not on a port. It goes at the end."""
    path, pid = directory / socket, directory / f"{socket}.pid"
    place = [] if "-p" in arguments else ["-U", path]
    command = ["nbdkit", *place, "-P", pid, *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PATH": CLIENTS_PATH})
    try:
        yield path
    finally:
        os.kill(int(pid.read_text()), 15)


async def test_other_servers_are_sources_as_they_are(tmp_path: Path, disk: Path) -> None:
    policy = "blocksize-minimum=4096", "blocksize-error-policy=error"
    even = make_disk(tmp_path / "even.raw", 4 * MIB)
    with nbdkit(tmp_path, "--filter=blocksize-policy", "file", even, *policy) as path:
        async with opened(f"nbd+unix:///?socket={path}") as source:
            assert source.session_id is None
            assert not source.can_trim
            assert await source.pread(1000, 70000) == content(even)[1000:71000]
            extents = await source.extents(ALLOCATION, 1000, 70000)
            assert sum(length for length, _ in extents) == 70000
            with pytest.raises(OSError, match=r"says nothing of|not negotiated") as caught:
                await source.extents(ACCESS, 0, 4096)
            assert not isinstance(caught.value, SourceLost)
    with nbdkit(
        tmp_path, "--filter=delay", "file", disk, "delay-read=5ms", socket="d.sock"
    ) as path:
        async with opened(f"nbd+unix:///?socket={path}", requests=64) as source:
            assert await read_all(source, 64 << 10) == content(disk)


async def test_a_read_that_fails_is_an_error_and_the_next_one_is_not(
    tmp_path: Path, disk: Path
) -> None:
    told = list[str]()
    fails = tmp_path / "fails"
    options = "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={fails}"
    with nbdkit(tmp_path, "--filter=error", "file", disk, *options) as path:
        async with opened(f"nbd+unix:///?socket={path}", tell=told.append) as source:
            assert len(await source.pread(0, 512)) == 512
            fails.touch()
            with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
                await source.pread(0, 512)
            assert caught.value.errno == errno.EIO
            fails.unlink()
            assert len(await source.pread(0, 512)) == 512
    assert told == []


async def test_a_server_that_wants_tls_is_read_with_its_key(tmp_path: Path, disk: Path) -> None:
    keys = make_keys(tmp_path / "keys.psk")
    tls = "--tls=require", f"--tls-psk={keys}"
    with nbdkit(tmp_path, *tls, "file", disk) as path:
        with pytest.raises(SourceLost, match="wants TLS: connect by nbds://"):
            await open_source(f"nbd+unix:///?socket={path}")
        with pytest.raises(FileNotFoundError, match=f"{keys}.no"):
            await open_source(f"nbds+unix://backup@/?socket={path}&tls-psk-file={keys}.no")
        wrong = make_keys(tmp_path / "wrong.psk")
        with pytest.raises(OSError, match="has the server this user's key"):
            await open_source(f"nbds+unix://backup@/?socket={path}&tls-psk-file={wrong}")
        uri = f"nbds+unix://backup@/?socket={path}&tls-psk-file={keys}"
        async with opened(uri) as source:
            assert await read_all(source) == content(disk)
    with (
        nbdkit(tmp_path, "file", disk, socket="plain.sock") as path,
        pytest.raises(SourceLost, match="the server offers no TLS"),
    ):
        await open_source(f"nbds+unix://backup@/?socket={path}&tls-psk-file={keys}")


async def test_a_name_is_resolved_and_all_its_addresses_are_tried(
    tmp_path: Path, disk: Path
) -> None:
    port = free_port()
    # localhost may be ::1 first, where nobody listens.
    with nbdkit(tmp_path, "-i", "127.0.0.1", "-p", str(port), "file", disk):
        async with opened(f"nbd://localhost:{port}/") as source:
            assert await read_all(source) == content(disk)


async def test_what_is_not_there_is_told(shared: tuple[Serving, Path], tmp_path: Path) -> None:
    server, _ = shared
    with pytest.raises(SourceLost, match="there is no export called 'vm@other'"):
        await open_source(server.uri("vm@other"))
    with pytest.raises(FileNotFoundError, match="is the server running"):
        await open_source(f"nbd+unix:///vm@n?socket={tmp_path}/none")


# -- lost and found again --------------------------------------------------------------------------


async def test_a_killed_server_that_comes_back_is_gone_on_with(tmp_path: Path, disk: Path) -> None:
    told = list[str]()
    before = content(disk)
    with serving(tmp_path, disk, "--begin", "n") as server:
        source = await open_source(server.uri("vm@n"), retries=1000, tell=told.append)
        with connected(server.uri("vm")) as guest:
            guest.pwrite(os.urandom(65536), 65536)
        await source.trim(0, 65536)
        server.kill()
    reading = asyncio.create_task(source.pread(65536, SIZE - 65536))
    await asyncio.sleep(0)
    with serving(tmp_path, disk, "--begin", "n"):
        assert await reading == before[65536:]
        assert await source.extents(ACCESS, 0, 196608) == [(65536, 0), (65536, 3), (65536, 1)]
        await source.trim(65536, 65536)
        await source.close()
    assert told
    assert all("connecting again in" in line for line in told)


async def test_another_session_of_the_same_name_is_another_source(
    tmp_path: Path, disk: Path
) -> None:
    with serving(tmp_path, disk, "--begin", "n") as server:
        source = await open_source(server.uri("vm@n"), retries=1000)
        server.kill()
    reading = asyncio.create_task(source.pread(0, 512))
    await asyncio.sleep(0)
    shutil.rmtree(tmp_path / "state")
    with serving(tmp_path, disk, "--begin", "n"):
        with pytest.raises(SourceLost, match="another session answers there now") as caught:
            await reading
        assert str(source.session_id) in str(caught.value)
        with pytest.raises(SourceLost, match="another session"):
            await source.trim(0, 65536)
        await source.close()


@pytest.mark.parametrize("again", [False, True])
async def test_a_session_that_is_finished_is_lost_with_the_reason(
    server: Serving, again: bool
) -> None:
    """Finished, and even begun anew before the connection is."""
    async with opened(server.uri("vm@n")) as source:
        await source.pread(0, 512)
        control = Control(f"{server.unix}.control")
        control.call("DELETE", "sessions/n")
        if again:
            control.call("PUT", "sessions/n")
        text = "another session answers there now" if again else r"vm@n.*finished"
        with pytest.raises(SourceLost, match=text):
            await source.pread(0, 512)


async def test_a_server_that_stays_away_is_lost(tmp_path: Path, disk: Path) -> None:
    told = list[str]()
    with serving(tmp_path, disk, "--begin", "n") as server:
        source = await open_source(server.uri("vm@n"), retries=1, tell=told.append)
    with pytest.raises(SourceLost, match="connecting again failed 1 times"):
        await source.pread(0, 512)
    assert len(told) == 1
    await source.close()


# -- its parts -------------------------------------------------------------------------------------


def test_the_session_is_named_by_the_description() -> None:
    session_id = "3f886611-289e-4536-bf31-778e68150adc"

    def of(description: str, *contexts: str) -> str | None:
        return session_id_of(
            NbdFacts(
                size=0,
                block_size_min=1,
                block_size_preferred=0,
                payload_max=1,
                description=description,
                contexts=frozenset(contexts),
                is_read_only=False,
                can_trim=True,
                can_zero=False,
                can_fast_zero=False,
                can_flush=True,
                can_multi_conn=True,
                is_tls=False,
            )
        )

    text = f"vda as of 2026-01-01T00:00:00Z, session n {session_id}"
    assert of(text, ACCESS) == session_id
    assert of(f"{text}, broken", ACCESS) == session_id
    assert of(f"a, session x {'0' * 8} as of 2026, session n {session_id}", ACCESS) == session_id
    assert of(text) is None
    assert of("", ACCESS) is None


def test_a_missing_libnbd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    with pytest.raises(OSError, match="install python3-libnbd"):
        importlib.reload(libnbd)
