"""Jobs with a real pull: while a guest writes, to targets that hang, over the server's own ends."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.controlling import Control
from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.serving import Serving, connected, serving

SIZE = 12 * MIB + 12288
SLOWLY = 1 << 20
"""Bytes a second: none of the jobs comes to its end by itself."""
TIMEOUT_S = 60.0
STOP_S = 8.0
"""Seconds that a stop takes at most, where a pull hangs that is killed after one."""


class Served:
    """A server over one disk, and its control socket."""

    def __init__(self, server: Serving) -> None:
        self.server = server
        self.control = Control(f"{server.unix}.control")

    def begin(self, name: str, **options: Any) -> None:
        self.control.call("PUT", f"sessions/{name}", **options)

    def start(self, session: str, target: object, **options: object) -> str:
        ask = {"session": session, "disk": "vda", "target": str(target), **options}
        return str(self.control.call("POST", "jobs", **ask)["id"])

    def until(self, job: str, reached: Callable[[Any], bool]) -> Any:
        """The job, as soon as this is so."""
        end = time.monotonic() + TIMEOUT_S
        while not reached(seen := self.control.call("GET", f"jobs/{job}")):
            assert seen["ended_at"] is None, seen
            assert time.monotonic() < end, seen
            time.sleep(0.01)
        return seen

    def ended(self, job: str) -> Any:
        return self.until(job, lambda seen: seen["ended_at"] is not None)

    def under_way(self, job: str) -> Any:
        """Something is durable, and released."""
        return self.until(job, lambda seen: bool((seen["progress"] or {}).get("released")))

    def write_all_over(self, byte: bytes = b"g") -> None:
        """As the guest: something into each 64 KiB of the disk."""
        with connected(self.server.uri("vda")) as guest:
            for offset in range(0, SIZE, 64 << 10):
                guest.pwrite(byte * 4096, min(offset, SIZE - 4096))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "vda.raw", SIZE, islands=60)


@pytest.fixture
def before(tmp_path: Path, image: Path) -> Path:
    """The disk as it is at first."""
    return copy_disk(image, tmp_path / "before.raw")


@contextmanager
def served_over(image: Path) -> Iterator[Served]:
    with serving(image.parent, image) as server:
        yield Served(server)


@contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An NBD server: URI and process."""
    path = folder / "target.sock"
    pidfile = folder / "target.pid"
    os.mkfifo(pidfile)
    process = subprocess.Popen(["nbdkit", "-f", "-U", path, "-P", pidfile, *arguments])
    try:
        pidfile.read_text()  # it listens
        yield f"nbd+unix:///?socket={path}", process
    finally:
        process.kill()
        process.wait()


def end_of(pid: int) -> None:
    """Return when this process has gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], TIMEOUT_S)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


def test_a_job_backs_up_what_was_releases_it_and_finishes_its_session(
    image: Path, before: Path, tmp_path: Path
) -> None:
    target = tmp_path / "backup.raw"
    with served_over(image) as served:
        served.begin("n")
        job = served.start("n", target, finish=True, verify=True, checksum="sha256")
        served.write_all_over()
        ended = served.ended(job)
        assert (ended["state"], ended["result"]) == ("complete", "success")
        assert ended["verified"]
        assert ended["progress"]["released"] == SIZE
        assert (tmp_path / "backup.raw.sha256").read_text().count(ended["checksum"]["root"]) == 1
        assert served.control.call("GET", "sessions/n")["result"] == "success"
        assert f"job {job} (vda@n): complete" in served.server.messages()
    assert first_difference(target, before) is None
    assert first_difference(image, before) is not None


def test_guests_do_not_wait_for_a_target_that_hangs(
    image: Path, before: Path, tmp_path: Path
) -> None:
    (target := tmp_path / "there.raw").write_bytes(b"")
    os.truncate(target, SIZE)
    with (
        served_over(image) as served,
        nbdkit(tmp_path, "file", str(target)) as (uri, process),
    ):
        served.begin("n")
        job = served.start("n", uri, force=True, journal=str(tmp_path / "journal"), rate=SLOWLY)
        served.under_way(job)
        process.send_signal(signal.SIGSTOP)
        try:
            # Everything on the disk, twice, with the target as dead as can be.
            served.write_all_over()
            served.write_all_over(b"h")
            assert served.control.call("GET", f"jobs/{job}")["state"] == "running"
            session = served.control.call("GET", "sessions/n")["disks"][0]
            assert session["temp"]["now"] > 0
            assert session["broken"] is None
        finally:
            process.send_signal(signal.SIGCONT)
        served.control.call("POST", f"jobs/{job}/rate", rate=None)
        assert served.ended(job)["state"] == "complete"
    assert first_difference(target, before) is None


def test_a_job_ends_with_its_server_which_waits_for_no_target_and_the_next_one_goes_on(
    image: Path, before: Path, tmp_path: Path
) -> None:
    target = tmp_path / "backup.raw"
    part = tmp_path / "backup.raw.part"
    with served_over(image) as served:
        served.begin("n")
        job = served.start("n", target, rate=SLOWLY, finish=True)
        pid = served.under_way(job)["pid"]
        os.kill(pid, signal.SIGSTOP)
        with connected(served.server.uri("vda")) as guest:
            guest.pwrite(b"g" * 4096, SIZE - 4096)
            began = time.monotonic()
            assert served.server.stop() == 0
            assert time.monotonic() - began < STOP_S
        end_of(pid)
        assert part.exists()
        assert not target.exists()
    killed = served_over(image)
    served = killed.__enter__()
    try:
        assert served.control.call("GET", "jobs")["jobs"] == []
        job = served.start("n", target, rate=SLOWLY, resume=True, finish=True, retries=0)
        pid = served.until(job, lambda seen: seen["progress"] is not None)["pid"]
        served.server.process.kill()
        served.server.process.wait()
        end_of(pid)
        assert part.exists(), "kept, though its session was to end with it"
    finally:
        with pytest.raises(AssertionError, match="exited with -9"):
            killed.__exit__(None, None, None)
    with served_over(image) as served:
        served.write_all_over()
        ended = served.ended(served.start("n", target, resume=True, finish=True))
        assert (ended["state"], ended["result"]) == ("complete", "success")
        assert ended["progress"]["resumed"] > 0
    assert first_difference(target, before) is None


def test_a_job_whose_session_ends_or_that_is_cancelled_says_so(image: Path, tmp_path: Path) -> None:
    with served_over(image) as served:
        served.begin("n")
        job = served.start("n", tmp_path / "one.raw", rate=SLOWLY)
        served.until(job, lambda seen: seen["progress"] is not None)
        served.control.call("DELETE", "sessions/n")
        ended = served.ended(job)
        assert ended["state"] == "failed"
        assert "session n is finished (success)" in ended["error"]
        served.begin("m")
        job = served.start("m", tmp_path / "two.raw", rate=SLOWLY)
        served.under_way(job)
        cancelled = served.control.call("POST", f"jobs/{job}/cancel")
        assert (cancelled["state"], cancelled["result"]) == ("cancelled", None)
        assert cancelled["kept"] == f"{tmp_path}/two.raw.part"
        assert (tmp_path / "two.raw.part").exists()
