"""A server's life, step by step: what comes before what, and how it is ended."""

import asyncio
import errno
import gc
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli import runner, temp_directory
from fleecenbd.cli.endpoints import Addresses, Endpoint
from fleecenbd.cli.errors import CommandError
from fleecenbd.cli.handed import starting_client
from fleecenbd.cli.images import open_disks
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.stopping import Stopping
from fleecenbd.cli.temp_directory import TempDirectory
from fleecenbd.cli.values import DiskSpec
from fleecenbd.engine.disk import Disk
from fleecenbd.server.server import Server
from fleecenbd.storage.temp import TempImage
from tests.descriptors import open_descriptors

pytestmark = pytest.mark.usefixtures("own_logs")


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """One disk, vm, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("vm.raw").write_bytes(bytes(1 << 20))
    return open_disks([DiskSpec("vm", "vm.raw")], read_only=False, force_share=False)


def _options(**changes: Any) -> ServeOptions:
    return ServeOptions(
        **{
            "disks": (DiskSpec("vm", "vm.raw"),),
            "addresses": Addresses(unix="f.sock"),
            "state_directory": Path("state"),
            "pidfile": Path("pid"),
            **changes,
        }
    )


def _run(options: ServeOptions, disks: list[Disk]) -> int:
    return asyncio.run(runner.run_server(options, disks))


@pytest.fixture
def another_process() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that runs until it is killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


class Steps:
    """What happened, in order; SIGTERM comes with the first READY=1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for name in ("begin", "listen", "stop"):
            self._watch(monkeypatch, name)
        monkeypatch.setattr(runner, "notify", self._notify)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(Server, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self._note(name)
            return original(*arguments, **options)

        monkeypatch.setattr(Server, name, watched)

    def _notify(self, _environment: object, state: str) -> bool:
        self._note(state)
        if state == "READY=1":
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    def _note(self, step: str) -> None:
        files = [name for name in ("f.sock", "pid") if os.path.exists(name)]
        self.seen.append(" ".join([step, *files]))


def test_the_session_begins_before_clients_come_in_and_the_pidfile_after(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    assert _run(_options(session="n"), disks) == 0
    assert steps.seen == [
        "begin f.sock",
        "listen f.sock",
        "READY=1 f.sock pid",
        "STOPPING=1 f.sock pid",
        "stop",
    ]


def test_a_session_that_cannot_begin_lets_nobody_in(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    Path("state").touch()
    with pytest.raises(CommandError, match="cannot begin session n: state"):
        _run(_options(session="n"), disks)
    assert steps.seen == ["begin f.sock", "STOPPING=1 f.sock", "stop"]


def test_a_signal_ends_a_server_whose_state_directory_hangs(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    gate = threading.Event()
    over = []

    def hang(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        over.append(gate.wait(10))

    monkeypatch.setattr(temp_directory, "make_private_directory", hang)
    assert _run(_options(session="n"), disks) == 0
    assert over == []
    gate.set()
    assert steps.seen == ["begin f.sock", "STOPPING=1 f.sock", "stop"]


def test_a_signal_while_the_session_begins_ends_the_server(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)

    async def hang(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    monkeypatch.setattr(Server, "begin", hang)
    assert _run(_options(session="n"), disks) == 0
    assert steps.seen == ["STOPPING=1 f.sock", "stop"]


def test_a_second_signal_ends_a_stop_that_hangs(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch)
    aborted = []

    async def hang(server: Server) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    def abort(server: Server) -> None:
        aborted.append(server)

    monkeypatch.setattr(Server, "stop", hang)
    monkeypatch.setattr(Server, "abort", abort)
    assert _run(_options(), disks) == 1
    assert len(aborted) == 1
    assert not os.path.exists("f.sock")
    assert not os.path.exists("pid")


def test_a_stop_that_fails_is_told_and_status_one(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Steps(monkeypatch)

    async def fail(server: Server) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(Server, "stop", fail)
    assert _run(_options(), disks) == 1
    assert "did not stop as it should" in caplog.text


async def test_what_is_left_running_does_not_hold_up_the_end(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch)
    monkeypatch.setattr(runner, "TASKS_TIMEOUT_S", 0.01)
    left: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def stubborn() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    async def stop(server: Server) -> bool:
        left.append(asyncio.create_task(stubborn()))
        await asyncio.sleep(0)
        return True

    monkeypatch.setattr(Server, "stop", stop)
    try:
        assert await runner.run_server(_options(), disks) == 0
        assert not left[0].done()
    finally:
        over.set()  # whatever was found: a loop cannot be closed over such a task
    await left[0]


@pytest.mark.parametrize(("synced", "status"), [(True, 0), (False, 1)])
async def test_a_server_that_could_not_sync_an_image_exits_with_status_one(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch, synced: bool, status: int
) -> None:
    Steps(monkeypatch)

    async def stop(server: Server) -> bool:
        return synced

    monkeypatch.setattr(Server, "stop", stop)
    assert await runner.run_server(_options(), disks) == status


def test_a_pidfile_is_drafted_where_nobody_can_have_laid_a_link(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch)
    precious = Path("precious")
    precious.write_text("precious")
    drafts: list[str] = []
    open_file = os.open

    def laid(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT and "pid" in os.fspath(path):
            drafts.append(os.fspath(path))
            if len(drafts) == 1:
                os.symlink(precious, path)
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", laid)
    os.symlink(precious, f"pid.{os.getpid()}")
    with pytest.raises(CommandError, match="cannot write the pidfile pid: File exists"):
        _run(_options(), disks)
    assert len(drafts) == 1
    assert precious.read_text() == "precious"


def test_pidfiles_are_as_readable_as_the_umask_says_and_leave_nothing_beside_them(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def ready(_environment: object, state: str) -> bool:
        if state == "READY=1":
            modes.append(os.stat("pid").st_mode & 0o777)
            assert Path("pid").read_text() == f"{os.getpid()}\n"
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(runner, "notify", ready)
    before = os.umask(0o027)
    try:
        assert _run(_options(), disks) == 0
    finally:
        os.umask(before)
    assert modes == [0o640]
    assert os.listdir(".") == ["vm.raw"]


def test_a_pidfile_that_became_somebody_else_s_stays(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch)

    class Files(runner.ExitStack):
        def close(self) -> None:
            Path("pid").write_text("1\n")
            super().close()

    monkeypatch.setattr(runner, "ExitStack", Files)
    assert _run(_options(), disks) == 0
    assert Path("pid").read_text() == "1\n"


def test_signals_do_again_what_they_did_once_the_server_is_down(
    disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch)
    assert _run(_options(), disks) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


async def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping = Stopping()
    try:
        stopping.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        await stopping.asked.wait()
        assert not stopping.at_once.is_set()
    finally:
        stopping.release_signals()
        signal.signal(signal.SIGHUP, before)


async def test_the_end_of_another_process_asks_to_stop_and_never_at_once(
    another_process: "subprocess.Popen[bytes]",
) -> None:
    stopping = Stopping()
    before = open_descriptors()
    for _ in range(2):
        stopping.ask_at_end_of(another_process.pid)
    await asyncio.sleep(0)
    assert not stopping.asked.is_set()
    another_process.kill()
    await stopping.asked.wait()
    while open_descriptors().keys() - before.keys():  # noqa: ASYNC110 - the other one comes soon
        await asyncio.sleep(0)
    assert not stopping.at_once.is_set()


async def test_the_end_of_a_process_that_is_no_more_asks_at_once_to_stop(
    another_process: "subprocess.Popen[bytes]",
) -> None:
    another_process.kill()
    another_process.wait()
    stopping = Stopping()
    for _ in range(2):
        stopping.ask_at_end_of(another_process.pid)
    assert stopping.asked.is_set()
    assert not stopping.at_once.is_set()


async def test_a_process_whose_end_cannot_be_seen_is_told_of_and_asks_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    stopping = Stopping()
    stopping.ask_at_end_of(4711)
    assert not stopping.asked.is_set()
    assert "4711" in caplog.text


@pytest.mark.parametrize("reaped", [True, False])
def test_a_client_that_ended_before_the_server_was_up_is_the_starter_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reaped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("f.sock")
        maker = os.fork()
        if maker == 0:
            listening.listen()
            os._exit(0)
        os.waitid(os.P_PID, maker, os.WEXITED | (0 if reaped else os.WNOWAIT))
        assert starting_client([Endpoint(listening, False)]) == maker
        if not reaped:
            os.waitpid(maker, 0)


def test_a_maker_that_is_alive_and_not_our_parent_did_not_start_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket() as another:
        listening.bind("f.sock")
        listening.listen()
        assert starting_client([Endpoint(listening, False)]) is None
        another.bind(("127.0.0.1", 0))
        another.listen()
        assert starting_client([Endpoint(another, False)]) is None


async def test_a_temp_image_that_nobody_waits_for_any_more_is_closed(
    tmp_path: Path, disks: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    made: list[TempImage] = []
    create = TempImage.create

    def slow(*arguments: Any, **options: Any) -> TempImage:
        entered.set()
        assert gate.wait(10)
        made.append(create(*arguments, **options))
        return made[0]

    monkeypatch.setattr(TempImage, "create", slow)
    directory = TempDirectory(tmp_path / "state", "n")
    making = asyncio.create_task(directory.make(disks[0], 4096, "id"))
    await asyncio.to_thread(entered.wait, 10)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    gate.set()
    # Its only thread has then made the image, and has told of it.
    await asyncio.wait_for(directory._pool.run(int), 10)
    await asyncio.wait_for(made[0].wait_closed(), 10)
    disks[0].device.close()


async def test_a_temp_image_that_fails_when_nobody_waits_any_more_is_no_matter(
    tmp_path: Path,
    disks: list[Disk],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    def fail(*arguments: Any, **options: Any) -> TempImage:
        assert gate.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TempImage, "create", fail)
    directory = TempDirectory(tmp_path / "state", "n")
    making = asyncio.create_task(directory.make(disks[0], 4096, "id"))
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    gate.set()
    await asyncio.wait_for(directory._pool.run(int), 10)
    del making
    gc.collect()
    assert caplog.messages == []
    disks[0].device.close()


def test_temp_images_are_as_large_as_whole_clusters(tmp_path: Path, disks: list[Disk]) -> None:
    async def make(size: int, cluster_size: int) -> int:
        disk = disks[0]
        disk.size = size
        temp = await TempDirectory(tmp_path, "n").make(disk, cluster_size, "id")
        assert temp.size % temp.hole_size == 0
        assert temp.name == str(tmp_path / "vm@n")
        temp.close()
        await temp.wait_closed()
        return temp.size

    assert asyncio.run(make(1, 4096)) == 4096
    assert asyncio.run(make((1 << 20) + 512, 1 << 16)) == (1 << 20) + (1 << 16)
    assert asyncio.run(make(1 << 20, 1 << 16)) == 1 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["vm.raw"]
    disks[0].device.close()
