"""A virtual machine of QEMU's, emulated (TCG), whose disk is an NBD export; and what it says.

Two serial ports. The kernel's goes into a file: what is in there after the boot is an alarm. The
other carries commands and their answers (scripts/commands), one line each; a thread reads them,
and stamps each with the host's monotonic clock.
"""

import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.guest.initramfs import Kernel

BOOT_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 180.0
POWEROFF_TIMEOUT_S = 60.0

MOUNTED = "/mnt"

# In the kernel's words. What an emulated processor that starves makes it say (stalls, clocks) is
# no fault of a disk's.
KERNEL_FAULTS = re.compile(
    r"I/O error|critical [\w ]+ error|EXT4-fs (error|warning)|EXT4-fs.*abort|JBD2.*(error|abort)"
    r"|Aborting journal|read-only|blocked for more than|panic",
    re.IGNORECASE,
)
BOOTED = "guest: booted"

RECONNECT_DELAY_S = 60
"""How long QEMU holds the guest's requests while the server is away, before it fails them."""


@dataclass(frozen=True)
class Machine:
    """What a machine is made of; it can be started again and again."""

    kernel: Kernel
    initramfs: Path
    folder: Path
    socket: Path
    export: str = "vm"
    reconnect_delay_s: int = RECONNECT_DELAY_S

    def command(self, kernel_log: Path) -> list[str]:
        """QEMU's command line."""
        blockdev = (
            f"driver=nbd,node-name=disk,server.type=unix,server.path={self.socket},"
            f"export={self.export},reconnect-delay={self.reconnect_delay_s},discard=unmap"
        )
        return [
            *("qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-m", "256"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self.kernel.image), "-initrd", str(self.initramfs)),
            # A kernel that panics ends the machine (-no-reboot), and so the wait for its answer.
            *("-append", "console=ttyS0 quiet mitigations=off panic=-1"),
            *("-chardev", f"file,id=kernel,path={kernel_log}", "-serial", "chardev:kernel"),
            *("-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands"),
            *("-blockdev", blockdev, "-device", "virtio-blk-pci,drive=disk"),
        ]


@dataclass
class Ledger:
    """What the guest's writers have said so far. A file is named by its path in the file system.

    `fsynced`: file to MD5 sum, if the last that was told of the file is its fsync.
    `writing`: files that a writer is at work on: anything may be in them.
    `times`: for each writer's folder, when each fsync was told (seconds, host's monotonic clock).
    `rounds`: for each reader's folder, how often it was read, each time with the same content.
    """

    fsynced: dict[str, str] = field(default_factory=dict)
    writing: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    rounds: Counter[str] = field(default_factory=Counter)

    def take(self, line: str, at: float) -> None:
        """Enter a line of a writer's, told at that time; others are none of its business."""
        word, *rest = line.split()
        if word not in ("@writing", "@fsynced", "@read", "@failed"):
            return
        file = rest[0].removeprefix(MOUNTED)
        if word == "@writing":
            self.fsynced.pop(file, None)
            self.writing.add(file)
        elif word == "@fsynced":
            self.writing.discard(file)
            self.fsynced[file] = rest[1]
            self.times.setdefault(str(Path(file).parent), []).append(at)
        elif word == "@read":
            self.rounds[file] += 1
        else:
            self.failed.append(file)

    def counts(self) -> dict[str, int]:
        """How often each writer has told of an fsync."""
        return {folder: len(times) for folder, times in self.times.items()}

    def longest_silence(self, start: float, end: float) -> float:
        """The most seconds between two fsyncs of one writer, of what touches [start, end]."""
        return max(
            (
                after - before
                for times in self.times.values()
                for before, after in pairwise(times)
                if before < end and after > start
            ),
            default=0.0,
        )


class Guest:
    """A running machine."""

    def __init__(self, process: subprocess.Popen[bytes], kernel_log: Path, log: Path) -> None:
        self.ledger = Ledger()
        self.boot_s = 0.0
        self._process = process
        self._kernel_log = kernel_log
        self._log = log
        self._lines: list[str] = []
        self._heard = threading.Condition()
        self._ended = False
        self._commands = 0
        self._writers: set[str] = set()
        self._reader = threading.Thread(target=self._read, name="guest's console", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            at = time.monotonic()
            line = raw.decode(errors="replace").strip()
            if line:
                with self._heard:
                    self._lines.append(line)
                    self.ledger.take(line, at)
                    self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for something that the guest says; `reached` is asked again after every line."""
        with self._heard:
            self._heard.wait_for(lambda: reached() or self._ended, timeout_s)
            assert reached(), (
                f"the guest {'ended' if self._ended else 'was waited for in vain'}: {what}\n"
                f"{self.told()}"
            )

    def wait_ready(self) -> None:
        """Wait until it has booted and takes commands."""
        start = time.monotonic()
        self.wait_until(lambda: "@ready" in self._lines, "boot", BOOT_TIMEOUT_S)
        self.boot_s = time.monotonic() - start

    def try_run(
        self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> tuple[int, list[str]]:
        """Run a shell command in the guest: its exit status, and what it printed."""
        assert self._process.stdin is not None
        self._commands += 1
        ended = f"@ended {self._commands} "
        with self._heard:
            first = len(self._lines)
        self._process.stdin.write(f"{self._commands} {command}\n".encode())
        self._process.stdin.flush()
        self.wait_until(
            lambda: any(line.startswith(ended) for line in self._lines[first:]), command, timeout_s
        )
        with self._heard:
            lines = self._lines[first:]
        status = next(line for line in lines if line.startswith(ended)).removeprefix(ended)
        return int(status), [line for line in lines if not line.startswith("@")]

    def run(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> list[str]:
        """Run a shell command in the guest, which must succeed; what it printed."""
        status, lines = self.try_run(command, timeout_s=timeout_s)
        assert status == 0, f"{command} exited with {status} in the guest\n{self.told()}"
        return lines

    def wait_fsynced(self, more: int, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Wait until each writer at work has told of that many more fsyncs."""
        with self._heard:
            goals = {folder: self.ledger.counts()[folder] + more for folder in self._writers}
        assert goals, "nobody writes"

        def reached() -> bool:
            counts = self.ledger.counts()
            return bool(self.ledger.failed) or all(
                counts[folder] >= goal for folder, goal in goals.items()
            )

        self.wait_until(reached, f"{more} more fsyncs", timeout_s)
        assert not self.ledger.failed, f"a writer or reader has failed\n{self.told()}"

    def wait_writing(self) -> None:
        """Wait until each writer is at work on a file, as all are when no fsync is answered."""
        self.wait_until(
            lambda: bool(self.ledger.failed) or len(self.ledger.writing) == len(self._writers),
            "all writers at work",
            COMMAND_TIMEOUT_S,
        )

    def start_writer(self, folder: str, names: int, block: str = "4k") -> None:
        """Let a writer write files, each with fsync (scripts/writer); wait for its first."""
        self._writers.add(folder)
        before = self.ledger.counts().get(folder, 0)
        self.run(f"start_writer {MOUNTED}{folder} {names} {block}")
        self.wait_until(
            lambda: self.ledger.counts().get(folder, 0) > before,
            f"first fsync in {folder}",
            COMMAND_TIMEOUT_S,
        )

    def start_reader(self, folder: str) -> None:
        """Let a reader read the files in a folder, over and over; wait for its first round."""
        self.run(f"start_reader {MOUNTED}{folder}")
        self.wait_until(
            lambda: bool(self.ledger.rounds[folder] or self.ledger.failed),
            f"first reading of {folder}",
            COMMAND_TIMEOUT_S,
        )

    def stop_writers(self) -> None:
        """Let all writers end with the file that they are at; readers, too."""
        self.run("stop_writers")
        self._writers.clear()
        assert not self.ledger.failed, f"a writer or reader has failed\n{self.told()}"
        assert not self.ledger.writing, f"writers have left files unfinished\n{self.told()}"

    def mount(self) -> None:
        """Mount the disk, an ext4."""
        self.run(f"mount -t ext4 /dev/vda {MOUNTED}")

    def unmount(self) -> None:
        """Unmount the disk."""
        self.run(f"umount {MOUNTED}")

    def fsynced(self) -> dict[str, str]:
        """The ledger's files as of now."""
        with self._heard:
            return dict(self.ledger.fsynced)

    def kernel_messages(self) -> str:
        """All that the kernel has said on its port."""
        return self._kernel_log.read_text(errors="replace")

    def kernel_faults(self) -> list[str]:
        """What the kernel has said since the boot that it says of a disk with errors."""
        booted, mark, since = self.kernel_messages().partition(BOOTED)
        assert mark, f"the kernel's messages do not reach their file:\n{booted}"
        return [line for line in since.splitlines() if KERNEL_FAULTS.search(line)]

    def told(self) -> str:
        """Everything there is, for whoever has to find out what went wrong."""
        console = "\n".join(self._lines[-40:])
        return (
            f"console, to its end:\n{console}\nkernel:\n{self.kernel_messages()[-8000:]}\n"
            f"QEMU:\n{self._log.read_text(errors='replace')}"
        )

    def power_off(self) -> None:
        """Let the guest switch itself off; wait for QEMU's end."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"0 poweroff -f\n")
        self._process.stdin.flush()
        try:
            status = self._process.wait(POWEROFF_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the guest did not switch itself off\n{self.told()}") from None
        self._reader.join()
        assert status == 0, f"QEMU exited with {status}\n{self.told()}"

    def pull_the_plug(self) -> None:
        """Kill QEMU: what the guest had not yet written to its disk is lost."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()


@contextmanager
def booted(machine: Machine, name: str = "guest") -> Iterator[Guest]:
    """A machine that has booted; killed at the end if it still runs. `name`: of its log files."""
    kernel_log = machine.folder / f"{name}.kernel.log"
    log = machine.folder / f"{name}.qemu.log"
    kernel_log.touch()
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            machine.command(kernel_log),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
        )
    guest = Guest(process, kernel_log, log)
    try:
        guest.wait_ready()
        yield guest
    finally:
        if process.poll() is None:
            guest.pull_the_plug()
