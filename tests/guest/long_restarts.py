"""The server is stopped, killed and started again under a Linux guest, which must not notice more
than a pause. Not collected by `make test`, for it takes minutes: `make guest` runs it.

A guest's stall is the longest time in which one of its writers has had no fsync answered, around
a restart. A server's downtime is the time from the signal that ends it until its next one is
ready. Where the listening socket is held (as by a socket unit of systemd's), the guest's stall is
the downtime and hardly more, since QEMU's connection waits in the socket. Where it is not, QEMU is
refused, and tries again after 1, 3, 7, ... seconds.
"""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disks import MIB, copy_disk, first_difference
from tests.guest.conftest import MachineMaker
from tests.guest.filesystem import faults, make_filesystem, replay_journal, sums
from tests.guest.machine import MOUNTED, Guest, booted
from tests.guest.restarting import HeldSocket, OwnSocket, restarting
from tests.serving import run

SIZE = 256 * MIB
FSYNCS_BETWEEN = 15  # by each writer
LONG_DOWNTIMES_S = {3: 1.5, 6: 4.0}  # restart number: seconds that nobody serves, besides
ALLOWANCE_S = 1.0

KILLED = 128 + signal.SIGKILL


@pytest.fixture(scope="module", autouse=True)
def _sockets_can_be_held() -> None:
    assert shutil.which("systemd-socket-activate") is not None, "missing: systemd-socket-activate"


@dataclass(frozen=True)
class Restart:
    """One restart, in seconds. `usual`: the longest silence of a writer before it.

    A writer's silence is more than QEMU's: the guest computes, and other writers' requests are
    before its own. What is usual without any restart is therefore no fault of the server's.
    """

    downtime: float
    stall: float
    usual: float

    def is_short(self, *, tries: int = 1) -> bool:
        """Whether the guest stood still no longer than `tries` times the downtime, and 1 s."""
        return self.stall <= self.downtime * tries + ALLOWANCE_S + self.usual

    def __str__(self) -> str:
        return (
            f"downtime {self.downtime:6.3f} s, stall {self.stall:6.3f} s, more than that "
            f"{self.stall - self.downtime:6.3f} s (usual silence {self.usual:.3f} s)"
        )


def restart(
    guest: Guest,
    server: OwnSocket | HeldSocket,
    number: signal.Signals,
    *,
    away_s: float = 0.0,
    fsyncs: int = FSYNCS_BETWEEN,
    laden: bool = False,
) -> Restart:
    """Let the guest write; end the server by a signal, start it again; let the guest go on.

    `laden`: the server gets the signal when it has not looked at requests for a while (SIGSTOP),
    so that it finds some of each writer's at its end.
    """
    began = time.monotonic()
    guest.wait_fsynced(fsyncs)
    told = time.monotonic()
    usual = guest.ledger.longest_silence(began, told)
    if laden:
        os.kill(server.pid, signal.SIGSTOP)
        guest.wait_writing()
    status = server.end_by(number)
    assert status == (KILLED if number == signal.SIGKILL else 0), server.log.read_text()
    time.sleep(away_s)  # nobody serves for a while: that is what is tried out
    server.start()
    ready = time.monotonic()
    # The first of these may still be an answer of the old server's, read late.
    guest.wait_fsynced(3)
    return Restart(ready - told, guest.ledger.longest_silence(told, ready), usual)


@pytest.mark.parametrize("kind", [HeldSocket, OwnSocket])
def test_a_guest_sits_out_thirteen_restarts_with_every_fsynced_file_in_place(
    kind: type[HeldSocket] | type[OwnSocket], tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    print(f"\n{kind.__name__}:")
    restarts = []
    # A session begins with each server: so the guest's writes are held up by old data, too.
    with restarting(kind, tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
        with booted(machine_maker(tmp_path, server.unix)) as guest:
            guest.mount()
            guest.start_writer("/again", 60)
            guest.start_writer("/new", 100_000)
            for number in range(13):
                how = signal.SIGTERM if number < 10 else signal.SIGKILL
                away_s = LONG_DOWNTIMES_S.get(number, 0.0)
                restarts.append(restart(guest, server, how, away_s=away_s, laden=number % 2 == 1))
                print(f"{number + 1:4} {how.name}: {restarts[-1]}", flush=True)
            guest.wait_fsynced(FSYNCS_BETWEEN)
            guest.stop_writers()
            told = guest.fsynced()
            # Read back through the guest's own driver, not from its page cache.
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert _sums_in_guest(guest) == told
            guest.unmount()
            guest.power_off()
        assert guest.kernel_faults() == []
    assert len(told) > 13 * FSYNCS_BETWEEN
    assert faults(disk, told) == []
    # Without a held socket, QEMU's tries are 1, 2, 4, ... seconds apart: the one that succeeds can
    # come as late as the downtime once more.
    tries = 1 if kind is HeldSocket else 2
    assert [str(one) for one in restarts if not one.is_short(tries=tries)] == []


def test_a_busy_guest_sits_out_restarts_with_many_requests_in_flight(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    print("\nbusy guest:")
    restarts = []
    with restarting(HeldSocket, tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
        with booted(machine_maker(tmp_path, server.unix)) as guest:
            guest.mount()
            guest.start_writer("/read", 24, "64k")
            guest.wait_fsynced(24)
            guest.stop_writers()
            guest.start_reader("/read")
            for folder in ("/a", "/b", "/c"):
                guest.start_writer(folder, 60)
            for folder in ("/large", "/larger"):
                guest.start_writer(folder, 12, "256k")
            for number in range(10):
                how = signal.SIGKILL if number % 3 == 2 else signal.SIGTERM
                restarts.append(restart(guest, server, how, fsyncs=4, laden=True))
                print(f"{number + 1:4} {how.name}: {restarts[-1]}", flush=True)
            guest.wait_fsynced(4)
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
        assert guest.kernel_faults() == []
    assert guest.ledger.rounds["/read"] > 10
    assert len(told) > 200
    assert faults(disk, told) == []
    assert [str(one) for one in restarts if not one.is_short()] == []


def _sums_in_guest(guest: Guest) -> dict[str, str]:
    """Path to MD5 sum of the content of every file, as the guest reads it."""
    lines = guest.run(f"find {MOUNTED} -type f -exec md5sum {{}} +")
    return {
        file.removeprefix(MOUNTED): total
        for total, file in (line.split(maxsplit=1) for line in lines)
    }


def test_what_was_fsynced_survives_when_the_plug_is_pulled_on_guest_and_server(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    with restarting(OwnSocket, tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
        machine = machine_maker(tmp_path, server.unix)
        with booted(machine, "first") as guest:
            guest.mount()
            guest.start_writer("/again", 60)
            guest.start_writer("/new", 100_000)
            guest.wait_fsynced(80)
            assert server.end_by(signal.SIGKILL) == KILLED
            # Some more of what the guest has told may lie in the pipe: it counts, too.
            guest.pull_the_plug()
        server.start()
        told = guest.fsynced()
        # The guest's own kernel finds its way back, through the server.
        with booted(machine, "second") as again:
            again.mount()
            found = _sums_in_guest(again)
            again.unmount()
            again.power_off()
            assert again.kernel_faults() == []
    assert len(told) >= 139
    assert {file: found.get(file) for file in told} == told
    assert found.keys() - told.keys() <= guest.ledger.writing
    assert faults(disk, told, others=True) == []


@pytest.mark.parametrize("kind", [HeldSocket, OwnSocket])
def test_a_session_that_begins_by_a_restart_under_a_running_guest_is_one_moment(
    kind: type[HeldSocket] | type[OwnSocket], tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    backup = tmp_path / "backup.raw"
    with restarting(kind, tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
        with booted(machine_maker(tmp_path, server.unix)) as guest:
            guest.mount()
            guest.start_writer("/kept", 60)
            guest.wait_fsynced(60)
            guest.stop_writers()
            kept = guest.fsynced()
            guest.start_writer("/again", 60)
            guest.wait_fsynced(20)
            before = guest.fsynced()
            restart(guest, server, signal.SIGTERM)
            guest.run(f"rm -r {MOUNTED}/kept && sync && fstrim {MOUNTED}")
            guest.start_writer("/late", 60)
            guest.wait_fsynced(40)
            run("nbdcopy", f"nbd+unix:///vm@nightly?socket={server.unix}", backup)
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
        assert guest.kernel_faults() == []
    # What a power cut at that moment would have left: the journal, and all that was fsynced.
    replay_journal(backup)
    assert faults(backup, kept, others=True) == []
    files = sums(backup)
    assert not [file for file in files if file.startswith("/late")]
    # All that was ever fsynced had been begun by then; more of it may be there, or half of it.
    assert before.keys() <= files.keys()
    assert faults(disk, {f: s for f, s in told.items() if not f.startswith("/kept")}) == []


def test_a_session_that_begins_while_the_guest_is_frozen_needs_no_journal(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    backup = tmp_path / "backup.raw"
    with restarting(HeldSocket, tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
        with booted(machine_maker(tmp_path, server.unix)) as guest:
            guest.mount()
            guest.start_writer("/kept", 60)
            guest.wait_fsynced(60)
            guest.stop_writers()
            kept = guest.fsynced()
            guest.run(f"fsfreeze --freeze {MOUNTED}")
            assert server.end_by(signal.SIGTERM) == 0
            server.start()
            guest.run(f"fsfreeze --unfreeze {MOUNTED}")
            guest.start_writer("/late", 60)
            guest.wait_fsynced(40)
            run("nbdcopy", f"nbd+unix:///vm@nightly?socket={server.unix}", backup)
            guest.stop_writers()
            guest.unmount()
            guest.power_off()
        assert guest.kernel_faults() == []
    assert faults(backup, kept) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_goes_on_under_a_running_guest(
    tmp_path: Path, machine_maker: MachineMaker, how: signal.Signals
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    backup, at_arming = tmp_path / "backup.raw", copy_disk(disk, tmp_path / "at-arming.raw")
    with restarting(OwnSocket, tmp_path, disk, "--begin", "nightly") as server:
        with booted(machine_maker(tmp_path, server.unix)) as guest:
            guest.mount()
            guest.start_writer("/new", 100_000)
            for _ in range(3):
                guest.wait_fsynced(FSYNCS_BETWEEN)
                restart(guest, server, how)
            guest.wait_fsynced(FSYNCS_BETWEEN)
            run("nbdcopy", f"nbd+unix:///vm@nightly?socket={server.unix}", backup)
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
        assert guest.kernel_faults() == []
    assert first_difference(at_arming, backup) is None
    assert faults(disk, told, others=True) == []


def test_an_io_error_in_the_guest_would_be_noticed(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = copy_disk(make_filesystem(tmp_path / "empty.raw", SIZE), tmp_path / "vm.raw")
    with restarting(OwnSocket, tmp_path, disk) as server:
        with booted(machine_maker(tmp_path, server.unix, reconnect_delay_s=0)) as guest:
            guest.mount()
            guest.start_writer("/new", 100_000)
            assert guest.kernel_faults() == []
            assert server.end_by(signal.SIGKILL) == KILLED
            # QEMU was told to hold nothing back: it hands the guest an error at once.
            guest.wait_until(lambda: bool(guest.ledger.failed), "a write that fails", 60.0)
            assert guest.kernel_faults() != []
        server.start()
