"""A client of nbdkit without nbdkit: the threads are the test's, the loop has one of its own."""

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import SessionOptions
from fleecenbd.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_EINVAL,
    NBD_EIO,
    NBD_ESHUTDOWN,
)
from fleecenbd.nbd.errors import NegotiationError
from fleecenbd.plugin import client as module
from fleecenbd.plugin.client import PluginClient, RequestFailed
from fleecenbd.server.server import Server
from fleecenbd.storage.memory import MemoryDevice

SIZE = 1 << 20
TIMEOUT_S = 30.0


class Waiting(MemoryDevice):
    """A device whose calls wait for the test, or fail as it says."""

    def __init__(self, name: str) -> None:
        super().__init__(SIZE, name=name)
        self.let_go = asyncio.Event()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def pread_now(self, offset: int, length: int) -> None:
        """Never."""

    def pwrite_now(self, offset: int, data: Any) -> bool:
        return False

    async def pread(self, offset: int, length: int) -> Any:
        await self._wait()
        return await super().pread(offset, length)

    async def pwrite(self, offset: int, data: Any) -> None:
        await self._wait()
        await super().pwrite(offset, data)

    async def _wait(self) -> None:
        self.entered.set()
        await self.let_go.wait()
        if self.error is not None:
            raise self.error


class Scene:
    """A server in a loop that runs in a thread, with one disk, vm, under session n."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.device, self.server = self.do(self._make())

    async def _make(self) -> tuple[Waiting, Server]:
        device, server = Waiting("vm.raw"), Server()
        server.add_disk(Disk("vm", device))

        async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> MemoryDevice:
            return MemoryDevice(SIZE)

        await server.begin("n", None, SessionOptions(), make_temp)
        return device, server

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def run() -> Any:
            return function(*arguments)

        return self.do(run())

    def client(self, name: str, pid: int | None = None) -> PluginClient:
        client: PluginClient = self.call(
            lambda: PluginClient(self.server.clients, self.loop, pid=pid)
        )
        client.open(name)
        return client

    def start(self, call: Callable[[], Any]) -> "Started":
        return Started(call)


class Started(threading.Thread):
    """A callback in one of nbdkit's threads: what it returned, or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            self.error = error

    def ended(self) -> "Started":
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "it still waits"
        return self


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.call(scene.device.let_go.set)
    scene.loop.call_soon_threadsafe(scene.loop.stop)
    scene.thread.join()
    scene.loop.close()


def test_what_a_write_lends_is_read_and_the_call_waits_for_its_end(scene: Scene) -> None:
    guest = scene.client("vm")
    lent = bytearray(b"a" * 4096)
    write = scene.start(lambda: guest.request(NBD_CMD_WRITE, 0, 4096, 0, memoryview(lent)))
    assert scene.device.entered.wait(TIMEOUT_S)
    scene.call(guest.fail_pending, OSError(errno.EIO, "the session broke"))
    assert write.is_alive(), "its memory is the engine's still"
    scene.call(scene.device.let_go.set)
    assert write.ended().error is None
    assert guest.request(NBD_CMD_READ, 0, 4096) == lent


def test_a_read_that_waits_fails_with_its_session(scene: Scene) -> None:
    backup = scene.client("vm@n")
    read = scene.start(lambda: backup.request(NBD_CMD_READ, 0, 4096))
    assert scene.device.entered.wait(TIMEOUT_S)
    scene.call(scene.server.finish, "n")
    error = read.ended().error
    assert isinstance(error, RequestFailed)
    assert error.number == NBD_ESHUTDOWN
    scene.call(scene.device.let_go.set)
    scene.do(backup.drain())


def test_a_guest_never_sees_that_its_device_was_shut_down(scene: Scene) -> None:
    guest = scene.client("vm")
    scene.device.error = OSError(errno.ESHUTDOWN, "gone")
    scene.call(scene.device.let_go.set)
    with pytest.raises(RequestFailed, match="gone") as caught:
        guest.request(NBD_CMD_READ, 0, 512)
    assert caught.value.number == NBD_EIO


def test_a_fault_of_ours_is_an_error_of_one_request(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    guest = scene.client("vm")
    scene.device.error = ZeroDivisionError("planted")
    scene.call(scene.device.let_go.set)
    with pytest.raises(RequestFailed, match="internal error") as caught:
        guest.request(NBD_CMD_READ, 0, 512)
    assert caught.value.number == NBD_EIO
    assert "planted" in caplog.text
    guest.request(NBD_CMD_FLUSH, 0, 0)


def test_requests_are_checked_as_those_of_the_wire(scene: Scene) -> None:
    backup = scene.client("vm@n")
    with pytest.raises(RequestFailed, match="ends at") as caught:
        backup.request(NBD_CMD_TRIM, SIZE, 512)
    assert caught.value.number == NBD_EINVAL


def test_extents_have_the_places_that_nbdkit_wants(scene: Scene) -> None:
    guest = scene.client("vm")
    scene.call(scene.device.let_go.set)
    guest.request(NBD_CMD_WRITE, 65536, 65536, 0, memoryview(b"d" * 65536))
    found = guest.request(NBD_CMD_BLOCK_STATUS, 0, SIZE)
    assert found[0] == (0, 65536, 3)
    assert found[1] == (65536, 65536, 0)
    assert sum(length for _, length, _ in found) == SIZE


def test_who_comes_back_waits_until_the_one_before_has_left(scene: Scene) -> None:
    first = scene.client("vm", pid=1)
    second = scene.start(lambda: scene.client("vm", pid=2))
    first.leave()
    assert second.ended().error is None


def test_a_second_guest_is_refused_when_the_first_stays(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLACE_TIMEOUT_S", 0.05)
    scene.client("vm", pid=17)
    with pytest.raises(NegotiationError, match="in use by pid 17"):
        scene.client("vm")
    scene.client("vm@n")
