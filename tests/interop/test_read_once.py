"""READ_ONCE with clients that know nothing of it: whole pulls, probes, readers that are killed."""

import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.controlling import Control
from tests.disks import KIB, MIB, copy_disk, first_difference
from tests.interop.conftest import (
    CONTROL,
    META_CONTEXTS,
    Serve,
    not_behind_nbdkit,
)
from tests.serving import FLEECENBD, Serving, connected, run, try_run

SIZE = 24 * MIB
CLUSTER = 4 * KIB
ACCESS = "x-fleecenbd:access"


class Storm(threading.Thread):
    """A guest that writes 4 KiB at random places, as fast as it can."""

    def __init__(self, uri: str, seed: int) -> None:
        super().__init__()
        self.places: set[int] = set()
        """Bytes, of clusters that it has written to."""
        self._uri = uri
        self._dice = random.Random(seed)
        self._ends = threading.Event()

    def run(self) -> None:
        with connected(self._uri) as guest:
            while not self._ends.is_set():
                place = self._dice.randrange(SIZE // CLUSTER) * CLUSTER
                guest.pwrite(self._dice.randbytes(CLUSTER), place)
                self.places.add(place)

    def __enter__(self) -> "Storm":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self.join()


class Room:
    """A disk without a hole, its server, and sessions one after the other."""

    def __init__(self, folder: Path, server: Serving, disk: Path) -> None:
        self.folder = folder
        self.server = server
        self.disk = disk
        self.control = Control(f"{folder / 'f.sock'}.control")

    def begin(self, name: str, **options: object) -> Path:
        """Begin a session; a copy of the disk as it is in it. No guest is writing."""
        before = copy_disk(self.disk, self.folder / f"{name}.before")
        self.control.call("PUT", f"sessions/{name}", **options)
        return before

    def disk_of(self, name: str) -> dict[str, Any]:
        """What is told of the session's disk."""
        (disk,) = self.control.call("GET", f"sessions/{name}")["disks"]
        return dict(disk)

    def peak(self, name: str, command: list[str | Path], **options: object) -> tuple[int, int]:
        """Pull a session while a guest writes; (bytes in the temp image at most, bytes of all
        clusters that the guest has written to)."""
        before = self.begin(name, **options)
        with Storm(self.server.uri("vm"), seed=1) as storm:
            run(*command)
        assert first_difference(before, self.folder / "out.raw") is None
        (self.folder / "out.raw").unlink()
        peak = int(self.disk_of(name)["temp"]["peak"])
        self.control.call("DELETE", f"sessions/{name}")
        return peak, len(storm.places) * CLUSTER


@pytest.fixture
def served(tmp_path: Path, serving: Serve) -> Iterator[Room]:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(random.Random(3).randbytes(SIZE))
    with serving(tmp_path, disk) as server:
        yield Room(tmp_path, server, disk)


def _nbdcopy(uri: str, target: Path) -> list[str | Path]:
    """Into a target that takes 24 MiB in about a second."""
    slow = [
        "nbdkit",
        "--exit-with-parent",
        "--filter=rate",
        "file",
        target,
        "rate=200M",
        "burstiness=0.1",
    ]
    return ["nbdcopy", "--connections=1", "--requests=8", "--", uri, "[", *slow, "]"]


def _qemu_img(uri: str, target: Path) -> list[str | Path]:
    return ["qemu-img", "convert", "-f", "raw", "-O", "raw", "-r", "24M", uri, target]


@not_behind_nbdkit(CONTROL)
@pytest.mark.parametrize("client", [_nbdcopy, _qemu_img], ids=["nbdcopy", "qemu-img"])
def test_a_pull_that_reads_once_keeps_the_temp_image_small(served: Room, client: Any) -> None:
    """The result is the moment's, with and without; and by either way to ask for it."""
    target = served.folder / "out.raw"
    if client is _nbdcopy:
        target.write_bytes(b"")
        os.truncate(target, SIZE)
    # How much a guest writes during a pull is the machine's business: no run is held to another's.
    kept, written = served.peak("a", client(served.server.uri("vm@a"), target))
    assert written > 50 * CLUSTER, f"the guest wrote to {written} bytes only"
    assert 0.9 * written < kept <= written
    for name, options, once in (("b", {"read_once": True}, ""), ("c", {}, "+once")):
        if client is _nbdcopy:
            target.write_bytes(b"")
            os.truncate(target, SIZE)
        peak, written = served.peak(
            name, client(served.server.uri(f"vm@{name}{once}"), target), **options
        )
        assert written > 50 * CLUSTER, f"the guest wrote to {written} bytes only"
        assert peak < 0.6 * written, f"{peak} of {written} bytes"


@contextmanager
def _begun(served: Room, name: str = "s") -> Iterator[Path]:
    before = served.begin(name)
    yield before
    served.control.call("DELETE", f"sessions/{name}")


@not_behind_nbdkit(CONTROL)
def test_a_probe_costs_an_error_and_never_wrong_data(served: Room) -> None:
    once = served.server.uri("vm@s+once")
    target = served.folder / "out.raw"
    with _begun(served) as before:
        assert "vm@s+once" not in run("nbdinfo", "--list", served.server.uri(""))
        # They read nothing, or no whole cluster.
        for probe in (
            ("nbdinfo", "--size", once),
            ("nbdinfo", "--map", once),
            ("qemu-img", "info", once),
            ("qemu-img", "map", "-f", "raw", once),
        ):
            run(*probe)
            assert served.disk_of("s")["released"] == 0, probe
        # This one looks at the first 8 KiB.
        run("nbdinfo", once)
        assert served.disk_of("s")["released"] == 8 * KIB
        refused = try_run("nbdcopy", "--connections=1", "--requests=1", "--", once, target)
        assert refused.returncode != 0
        assert "Invalid argument" in refused.stderr
        assert "was released, by a TRIM or by being read once" in served.server.messages()
        with connected(served.server.uri("vm@s")) as rest:
            content = before.read_bytes()
            end = SIZE - served.disk_of("s")["accessible"]
            assert bytes(rest.pread(SIZE - end, end)) == content[end:]


@not_behind_nbdkit(CONTROL)
def test_qemu_img_that_probes_copies_where_its_probe_is_less_than_a_cluster(served: Room) -> None:
    target = served.folder / "out.raw"
    with _begun(served) as before:
        run("qemu-img", "convert", "-O", "raw", served.server.uri("vm@s+once"), target)
        assert first_difference(before, target) is None
        assert served.disk_of("s")["accessible"] == 0


@not_behind_nbdkit(META_CONTEXTS)
def test_what_a_killed_reader_left_can_be_read_and_what_it_had_cannot(served: Room) -> None:
    target = served.folder / "out.raw"
    target.write_bytes(b"")
    os.truncate(target, SIZE)
    uri = served.server.uri("vm@s")
    with _begun(served) as before, Storm(served.server.uri("vm"), seed=2):
        command = _nbdcopy(served.server.uri("vm@s+once"), target)
        reader = subprocess.Popen(list(map(str, command)), start_new_session=True)
        while not 0 < served.disk_of("s")["accessible"] < 3 * SIZE // 4:
            assert reader.poll() is None, "it was done before it could be killed"
        os.killpg(reader.pid, signal.SIGKILL)
        reader.wait()
        content = before.read_bytes()
        left = gone = 0

        def prepare(client: nbd.NBD) -> None:
            client.add_meta_context(ACCESS)

        with connected(uri, prepare) as rest:
            extents: list[int] = []
            rest.block_status(SIZE, 0, lambda _c, _o, found, _e: extents.extend(found))
            offset = 0
            for length, flags in zip(extents[::2], extents[1::2], strict=True):
                if flags & 1:
                    assert bytes(rest.pread(length, offset)) == content[offset : offset + length]
                    left += length
                else:
                    with pytest.raises(nbd.Error, match="Invalid argument"):
                        rest.pread(CLUSTER, offset)
                    gone += length
                offset += length
        assert offset == SIZE
        assert left
        assert gone


@not_behind_nbdkit(CONTROL)
def test_our_own_pull_reads_once_and_sends_no_trim(served: Room) -> None:
    target = served.folder / "out.raw"
    with _begun(served) as before, Storm(served.server.uri("vm"), seed=4):
        pull = ("pull", "--read-once", "--rate", "64M", "--checksum", "blake2b", "--verify")
        run(FLEECENBD, *pull, served.server.uri("vm@s"), target)
        assert first_difference(before, target) is None
        assert served.disk_of("s")["accessible"] == 0
        again = try_run(FLEECENBD, "pull", "--force", served.server.uri("vm@s"), target)
        assert again.returncode == 1
        assert "released" in again.stderr


@not_behind_nbdkit(CONTROL)
def test_our_own_backup_and_job_read_once(served: Room) -> None:
    """They pull that session and no other: the export tells which one it is, by either name."""
    control = ("--control", f"{served.folder / 'f.sock'}.control")
    before = copy_disk(served.disk, served.folder / "before")
    run(FLEECENBD, "backup", *control, "--read-once", "vm", served.folder / "b.raw")
    assert first_difference(before, served.folder / "b.raw") is None
    with _begun(served):
        target = served.folder / "j.raw"
        job = run(FLEECENBD, "job", "start", *control, "--read-once", "s", "vm", target).strip()
        run(FLEECENBD, "job", "wait", *control, job)
        assert first_difference(before, target) is None
        assert served.disk_of("s")["accessible"] == 0


def test_behind_nbdkit_it_is_refused_with_the_reason(tmp_path: Path) -> None:
    from tests.behind_nbdkit import behind_nbdkit

    disk = tmp_path / "vm.raw"
    disk.write_bytes(bytes(MIB))
    with behind_nbdkit(tmp_path, disk, "--begin", "s") as server:
        assert try_run("nbdinfo", "--size", server.uri("vm@s+once")).returncode != 0
        assert "nbdkit tells nobody when a reply has left" in server.messages()
        assert run("nbdinfo", "--size", server.uri("vm@s")).strip() == str(MIB)
