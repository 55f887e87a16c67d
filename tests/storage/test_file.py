"""FileDevice: what is served inline, what goes to the pool, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleecenbd.storage import file as file_module
from fleecenbd.storage import system_calls
from fleecenbd.storage.file import (
    NOW_LENGTH_MAX,
    STALL_MAX_S,
    STALL_SHARE,
    WRITE_SLOW_S,
    FileDevice,
)
from fleecenbd.storage.filesystem import Medium
from fleecenbd.storage.locks import LockMode
from tests.descriptors import no_new_descriptor

SIZE = 1 << 21


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def opened(image: Path, medium: Medium) -> FileDevice:
    return FileDevice(os.open(image, os.O_RDWR), str(image), medium=medium)


class Gate:
    """A system call that waits inside its thread until the test lets it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        call = getattr(system_calls, name)

        def gated(*arguments: object) -> object:
            self.entered.set()
            assert self.open.wait(10)
            return call(*arguments)

        monkeypatch.setattr(system_calls, name, gated)


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


# Inline reads


def refused_nowait(*arguments: object) -> int:
    raise BlockingIOError(errno.EAGAIN, "not in the page cache")


async def test_data_outside_the_page_cache_is_read_in_the_pool(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "_preadv", refused_nowait)
    device = opened(image, Medium.CACHED)
    assert device.pread_now(4096, 4096) is None
    assert await device.pread(4096, 4096) == content_of(image)[4096:8192]
    device.close()


@pytest.mark.parametrize("length", [4096, 65536])
async def test_a_read_that_is_cached_in_part_is_left_to_the_pool(
    image: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(file_module, "_preadv", lambda *arguments: 512)
    device = opened(image, Medium.CACHED)
    assert device.pread_now(0, length) is None
    assert not device.pread_into_now(0, memoryview(bytearray(length)))
    assert await device.pread(0, length) == content_of(image)[:length]
    device.close()


async def test_cached_data_is_read_inline_whatever_the_length(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        file_module,
        "_preadv",
        lambda descriptor, buffers, offset, flags: os.preadv(descriptor, buffers, offset),
    )
    device = opened(image, Medium.CACHED)
    content = content_of(image)
    for length in (1, 4096, (1 << 15) - 1, 1 << 15, NOW_LENGTH_MAX):
        assert device.pread_now(512, length) == content[512 : 512 + length]
    device.close()


@pytest.mark.parametrize("medium", [Medium.CACHED, Medium.MEMORY])
async def test_a_long_read_or_write_is_not_made_on_the_loop(image: Path, medium: Medium) -> None:
    device = opened(image, medium)
    assert device.pread_now(0, NOW_LENGTH_MAX + 1) is None
    assert not device.pwrite_now(0, bytes(NOW_LENGTH_MAX + 1))
    device.close()


async def test_a_slow_file_system_gets_no_inline_call(image: Path) -> None:
    device = opened(image, Medium.SLOW)
    assert device.pread_now(0, 512) is None
    assert not device.pread_into_now(0, memoryview(bytearray(512)))
    assert not device.pwrite_now(0, bytes(4096))
    device.close()


async def test_what_is_in_memory_is_read_and_written_inline() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image:
        image.truncate(SIZE)
        device = FileDevice.open(image.name)
        assert device.medium is Medium.MEMORY
        assert device.pwrite_now(511, b"inline")
        assert device.pread_now(510, 8) == b"\0inline\0"
        device.close()


# Inline writes: a clock and a page cache of the test's own


class PageCache:
    """A pwrite that takes as long as the test says, asleep or not, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.takes_s = 0.0
        self.sleeps = True
        self.ru_nvcsw = 0  # as in getrusage's answer
        monkeypatch.setattr(file_module, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(file_module, "_getrusage", lambda who: self)
        monkeypatch.setattr(file_module, "_pwrite", self._timed(os.pwrite))
        monkeypatch.setattr(system_calls, "write_all", self._timed(system_calls.write_all))

    def _timed(self, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            self.now_s += self.takes_s
            self.ru_nvcsw += self.sleeps
            return call(*arguments)

        return timed


@pytest.fixture
def page_cache(monkeypatch: pytest.MonkeyPatch) -> PageCache:
    return PageCache(monkeypatch)


async def test_writes_stay_inline_while_they_are_fast(image: Path, page_cache: PageCache) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    page_cache.takes_s = 0.001
    assert all(device.pwrite_now(0, bytes(4096)) for _ in range(100))
    device.close()


async def test_a_write_that_is_slow_once_in_a_while_stays_inline(
    image: Path, page_cache: PageCache
) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    for _ in range(100):
        page_cache.takes_s = STALL_MAX_S / 2
        assert device.pwrite_now(0, bytes(4096))
        page_cache.takes_s = 0.0
        page_cache.now_s += STALL_MAX_S / STALL_SHARE
        assert device.pwrite_now(0, bytes(4096))
    device.close()


async def test_a_write_that_waited_for_a_processor_only_was_not_slow(
    image: Path, page_cache: PageCache
) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    page_cache.takes_s = 10.0
    page_cache.sleeps = False
    assert all(device.pwrite_now(0, bytes(4096)) for _ in range(10))
    device.close()


async def test_slow_writes_send_the_next_ones_to_the_pool_for_a_while(
    image: Path, page_cache: PageCache
) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    page_cache.takes_s = STALL_MAX_S
    assert device.pwrite_now(0, b"\x01" * 4096)
    assert device.pwrite_now(0, b"\x02" * 4096)
    pause_s = STALL_MAX_S / STALL_SHARE - STALL_MAX_S
    assert not device.pwrite_now(0, b"\x03" * 4096)
    page_cache.now_s += pause_s * 0.99
    assert not device.pwrite_now(0, b"\x03" * 4096)
    assert content_of(image)[:4096] == b"\x02" * 4096, "False means that nothing was written"
    page_cache.now_s += pause_s * 0.2
    page_cache.takes_s = 0.0
    assert device.pwrite_now(0, b"\x03" * 4096)
    device.close()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(st.floats(0.0, 0.3), min_size=20, max_size=200))
def test_slow_writes_hold_up_the_loop_for_no_more_than_their_share(
    image: Path, page_cache: PageCache, writes: list[float]
) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    began_s = page_cache.now_s
    stalled_s = 0.0
    for page_cache.takes_s in writes:
        if device.pwrite_now(0, bytes(4096)):
            stalled_s += page_cache.takes_s
        else:
            page_cache.now_s += page_cache.takes_s
    passed_s = page_cache.now_s - began_s
    # The last write may be of any length, and many may be just not slow.
    fast_s = WRITE_SLOW_S * len(writes)
    assert stalled_s <= STALL_MAX_S + STALL_SHARE * passed_s + max(writes) + fast_s
    device.close()


async def test_writes_that_are_slow_in_the_pool_are_not_tried_inline(
    image: Path, page_cache: PageCache
) -> None:
    device = opened(image, Medium.UNCACHED_READS)
    page_cache.takes_s = 0.1
    await device.pwrite(0, bytes(4096))
    assert not device.pwrite_now(0, bytes(4096))
    page_cache.now_s += 10
    page_cache.takes_s = 0.0
    await device.pwrite(0, bytes(4096))
    assert device.pwrite_now(0, bytes(4096))
    device.close()


@pytest.mark.parametrize(("offset", "length"), [(512, 4096), (0, 512), (4000, 200)])
async def test_a_write_of_part_of_a_page_is_inline_only_where_the_page_is_cached(
    image: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    device = opened(image, Medium.CACHED)
    monkeypatch.setattr(file_module, "_preadv", refused_nowait)
    assert not device.pwrite_now(offset, bytes(length))
    assert device.pwrite_now(8192, bytes(8192)), "whole pages need no reading"
    monkeypatch.setattr(file_module, "_preadv", lambda *arguments: 1)
    assert device.pwrite_now(offset, bytes(length))
    device.close()
    without_nowait = opened(image, Medium.UNCACHED_READS)
    assert not without_nowait.pwrite_now(offset, bytes(length))
    without_nowait.close()


# Short and failing system calls


@pytest.mark.parametrize("medium", [Medium.UNCACHED_READS, Medium.MEMORY])
async def test_a_short_write_is_completed(
    image: Path, monkeypatch: pytest.MonkeyPatch, medium: Medium
) -> None:
    pwrite = os.pwrite

    def short_pwrite(descriptor: int, data: bytes, offset: int) -> int:
        return pwrite(descriptor, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", short_pwrite)
    monkeypatch.setattr(file_module, "_pwrite", short_pwrite)
    device = opened(image, medium)
    now, later = os.urandom(8192), os.urandom(8192)
    assert device.pwrite_now(0, now)
    await device.pwrite(8192, later)
    assert content_of(image)[:16384] == now + later
    device.close()


@pytest.mark.parametrize("medium", [Medium.UNCACHED_READS, Medium.MEMORY])
async def test_a_full_file_system_is_enospc_inline_and_in_the_pool(
    image: Path, monkeypatch: pytest.MonkeyPatch, medium: Medium
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(file_module, "_pwrite", lambda *arguments: 512)
    device = opened(image, medium)
    with pytest.raises(OSError, match="No space left"):
        device.pwrite_now(0, bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        await device.pwrite(0, bytes(4096))
    device.close()


async def test_a_short_read_is_completed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
    device = opened(image, Medium.SLOW)
    assert await device.pread(100, 1000) == content_of(image)[100:1100]
    device.close()


@pytest.mark.parametrize("medium", [Medium.SLOW, Medium.MEMORY])
async def test_an_image_that_shrank_is_eio_and_says_so(image: Path, medium: Medium) -> None:
    device = opened(image, medium)
    os.truncate(image, 5000)
    assert device.pread_now(4096, 4096) is None
    for call in (device.pread(4096, 4096), device.extents(0, SIZE)):
        with pytest.raises(OSError, match="shrank") as caught:
            await call
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(image))
    device.close()


@pytest.mark.parametrize("medium", list(Medium))
async def test_every_failure_to_read_or_write_names_the_image(
    image: Path, monkeypatch: pytest.MonkeyPatch, medium: Medium
) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    device = opened(image, medium)
    for module in (os, file_module):
        for name in ("pread", "preadv", "pwrite"):
            prefix = "" if module is os else "_"
            monkeypatch.setattr(module, prefix + name, failing)
    failures: list[OSError] = []
    for call, *arguments in (
        (device.pread_now, 0, 4096),
        (device.pread_now, 0, 65536),
        (device.pread_into_now, 0, memoryview(bytearray(512))),
        (device.pwrite_now, 0, bytes(4096)),
        (device.pread, 0, 4096),
        (device.pwrite, 0, bytes(4096)),
    ):
        try:
            answer = call(*arguments)
            if answer is not None and answer is not False:
                await answer
        except OSError as error:
            failures.append(error)
    assert len(failures) == {Medium.SLOW: 2, Medium.UNCACHED_READS: 3}.get(medium, 6)
    for failure in failures:
        assert (failure.errno, failure.filename) == (errno.EIO, str(image))
    device.close()


async def test_a_flush_that_failed_fails_for_good(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened(image, Medium.SLOW)

    def lost(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lost)
        with pytest.raises(OSError, match="data was lost"):
            await device.flush()
    with pytest.raises(OSError, match="data was lost") as caught:
        await device.flush()
    assert caught.value.errno == errno.EIO
    device.close()


class WritebackErrors:
    """fdatasync as the kernel has it: it waits, and a lost write is told to one caller only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lost: bool) -> None:
        self.calls = 0
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self._lock = threading.Lock()
        self._lost = lost
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        with self._lock:
            self.calls += 1
        self.entered.release()
        assert self.open.wait(10)
        with self._lock:
            lost, self._lost = self._lost, False
        if lost:
            raise OSError(errno.EIO, "Input/output error")


async def test_a_lost_write_fails_every_flush_that_is_in_flight(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = WritebackErrors(monkeypatch, lost=True)
    device = opened(image, Medium.SLOW)
    flushes = [asyncio.ensure_future(device.flush()) for _ in range(3)]
    await asyncio.to_thread(kernel.entered.acquire, True, 10)
    # Where another one may be in flight beside it, it is given the time to be.
    await asyncio.to_thread(kernel.entered.acquire, True, 0.1)
    kernel.open.set()
    results = await asyncio.gather(*flushes, return_exceptions=True)
    assert ["data was lost" in str(result) for result in results] == [True] * 3
    device.close()


async def test_flushes_that_wait_for_another_share_the_next_one(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = WritebackErrors(monkeypatch, lost=False)
    device = opened(image, Medium.SLOW)
    waiting = threading.Semaphore(0)
    flush_lock = device._sync._lock

    class Watched:
        def __enter__(self) -> None:
            waiting.release()
            flush_lock.acquire()

        def __exit__(self, *_: object) -> None:
            flush_lock.release()

    monkeypatch.setattr(device._sync, "_lock", Watched())
    flushes = [asyncio.ensure_future(device.flush())]
    await asyncio.to_thread(kernel.entered.acquire, True, 10)
    flushes += [asyncio.ensure_future(device.flush()) for _ in range(5)]
    for _ in range(6):
        await asyncio.to_thread(waiting.acquire, True, 10)
    kernel.open.set()
    await asyncio.gather(*flushes)
    # Not the first one, which began before they were asked for: what they are about may be later.
    assert kernel.calls == 2
    device.close()


async def test_what_is_durable_already_is_known_at_once(image: Path) -> None:
    device = opened(image, Medium.CACHED)
    # An earlier process may have written what its guest has yet to flush.
    assert not device.flush_now()
    await device.flush()
    assert device.flush_now()
    for change in (
        device.pwrite(0, b"x"),
        device.zero(0, 4096),
        device.trim(0, 4096),
        device.punch(0, 4096),
    ):
        await change
        assert not device.flush_now()
        await device.flush()
        assert device.flush_now()
    assert device.pwrite_now(0, b"x" * 4096)
    assert not device.flush_now()
    device.close()


async def test_a_write_that_failed_is_no_less_to_be_flushed(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened(image, Medium.SLOW)
    await device.flush()

    def torn(descriptor: int, offset: int, data: object, name: str) -> None:
        raise OSError(errno.EIO, "Input/output error", name)

    monkeypatch.setattr(system_calls, "write_all", torn)
    with pytest.raises(OSError, match="Input/output error"):
        await device.pwrite(0, b"xx")
    assert not device.flush_now()
    device.close()


async def test_nothing_is_durable_while_it_is_on_its_way_or_after_that_failed(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = WritebackErrors(monkeypatch, lost=True)
    device = opened(image, Medium.SLOW)
    flush = asyncio.ensure_future(device.flush())
    await asyncio.to_thread(kernel.entered.acquire, True, 10)
    assert not device.flush_now()
    kernel.open.set()
    with pytest.raises(OSError, match="data was lost"):
        await flush
    assert not device.flush_now()
    device.close()


async def test_a_write_that_ends_during_a_flush_is_left_for_the_next(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = WritebackErrors(monkeypatch, lost=False)
    device = opened(image, Medium.CACHED)
    flush = asyncio.ensure_future(device.flush())
    await asyncio.to_thread(kernel.entered.acquire, True, 10)
    await device.pwrite(0, b"x")
    kernel.open.set()
    await flush
    assert not device.flush_now()
    device.close()


async def test_memory_has_nothing_to_flush_and_a_closed_file_says_so_itself(image: Path) -> None:
    device = opened(image, Medium.MEMORY)
    await device.pwrite(0, b"x")
    assert device.flush_now()
    device.close()
    assert not device.flush_now()
    with pytest.raises(OSError, match="closed"):
        await device.flush()


# Opening


def test_a_missing_image_and_what_is_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.raw"):
        FileDevice.open(tmp_path / "missing.raw")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="neither a regular file nor a block device"):
            FileDevice.open(path)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Asserts that the test has left no descriptor behind."""
    with no_new_descriptor():
        yield


@pytest.mark.usefixtures("descriptors")
def test_an_image_that_is_refused_leaves_no_descriptor_and_no_lock(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> int:
        raise OSError(errno.EIO, "no size")

    with monkeypatch.context() as patch:
        patch.setattr(system_calls, "image_size", failing)
        with pytest.raises(OSError, match="no size"):
            FileDevice.open(image)
    device = FileDevice.open(image)
    with pytest.raises(OSError, match="in use"):
        FileDevice.open(image)
    closed = threading.Event()
    device._pool.close(closed.set)
    assert closed.wait(10)
    os.close(device._descriptor)


async def test_a_read_only_device_refuses_changes(image: Path) -> None:
    device = FileDevice.open(image, read_only=True)
    content = content_of(image)
    with pytest.raises(PermissionError, match="read-only"):
        device.pwrite_now(0, b"x")
    for call in (device.pwrite(0, b"x"), device.zero(0, 512), device.trim(0, 4096)):
        with pytest.raises(PermissionError, match="read-only"):
            await call
    await device.flush()
    assert content_of(image) == content
    device.close()


async def test_a_file_that_may_not_be_opened_without_atime_is_opened_with_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def not_the_owner(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", not_the_owner)
    device = FileDevice.open(image)
    assert await device.pread(0, 512) == content_of(image)[:512]
    device.close()


# Ending


async def test_the_file_is_closed_only_after_the_last_call_has_ended(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "write_all")
    device = FileDevice.open(image)
    descriptor = device._descriptor
    task = asyncio.ensure_future(device.pwrite(0, b"late" * 1024))
    await asyncio.to_thread(gate.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    device.close()
    waiter = asyncio.ensure_future(device.wait_closed())
    await asyncio.sleep(0)
    assert is_open(descriptor)
    assert not waiter.done()
    with pytest.raises(OSError, match="in use"):  # its locks hold as long
        FileDevice.open(image)
    gate.open.set()
    await waiter
    assert not is_open(descriptor)
    assert content_of(image)[:4096] == b"late" * 1024
    again = FileDevice.open(image)
    again.close()
    await again.wait_closed()


async def test_a_closed_device_does_not_touch_another_file_with_its_descriptor(
    image: Path, tmp_path: Path
) -> None:
    device = FileDevice.open(image, lock=LockMode.NONE)
    descriptor = device._descriptor
    read, write = device.pread_now, device.pwrite_now  # as a caller may keep them
    device.close()
    await device.wait_closed()
    other = tmp_path / "other"
    other.write_bytes(b"precious" * 1024)
    reused = os.open(other, os.O_RDWR)
    os.dup2(reused, descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        write(0, bytes(4096))
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(0, 4096)
    assert content_of(other) == b"precious" * 1024
    for number in {reused, descriptor}:
        os.close(number)
