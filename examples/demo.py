"""A disk is backed up while it is overwritten: with nbdcopy, then with TRIM as the pull goes.

    make demo                     or:   .venv/bin/python examples/demo.py --help

Makes a disk with a file system and files on it, and does the same thing twice: start
`fleecenbd serve vm.raw --begin nightly`, let a guest overwrite the disk at random the whole
time, and pull `vm@nightly`. The first pull is nbdcopy's. The second is a few lines of libnbd
(pull_with_trim below), which release what is safely stored, so that the server need not keep it.
Both go at the same pace, against the same writes.

The verdict is computed: each backup against a copy of the disk made before the server started,
byte for byte; the file system in it with e2fsck; the space that the old data took, from the
meta context x-fleecenbd:access. Exit status 1 if anything is not as it should be.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbd
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

KIB = 1 << 10
MIB = 1 << 20

PULL_LENGTH = 2 * MIB  # the pull with TRIM: read, store, make durable, release this much
WRITES_PER_SECOND = 1500
WRITE_LENGTHS = [4 * KIB] * 4 + [16 * KIB] * 2 + [64 * KIB]
LOOK_INTERVAL_S = 0.2  # how often the server is asked what it keeps
START_TIMEOUT_S = 20.0

ACCESS = "x-fleecenbd:access"
READABLE, HELD = 1, 2  # its bits: may still be read; old data held in the temp image

console = Console(highlight=False)

# mkfs.ext4 and e2fsck live where only root looks.
os.environ["PATH"] += ":/usr/sbin:/sbin"


@dataclass
class Run:
    """What one of the two runs has come to. Counts are bytes, but for `writes`."""

    title: str
    size: int
    pulled: int = 0
    released: int = 0
    held: int = 0
    held_peak: int = 0
    writes: int = 0
    written: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


# --- the two pulls --------------------------------------------------------------------------------


def pull_with_nbdcopy(uri: str, target: Path, run: Run, pace: int) -> None:
    """nbdcopy writes the export to a pipe; we take it from there at our pace."""
    with (
        target.open("wb", buffering=0) as backup,
        subprocess.Popen(["nbdcopy", uri, "-"], stdout=subprocess.PIPE, bufsize=0) as nbdcopy,
    ):
        assert nbdcopy.stdout is not None
        start = time.monotonic()
        while data := nbdcopy.stdout.read(MIB):
            backup.write(data)
            run.pulled += len(data)
            _keep_pace(start, run.pulled, pace)
    if nbdcopy.returncode != 0:
        run.faults.append(f"nbdcopy exited with {nbdcopy.returncode}")


def pull_with_trim(uri: str, target: Path, run: Run, pace: int) -> None:
    """Read, write, make durable, and only then release."""
    client = nbd.NBD()
    client.connect_uri(uri)
    with target.open("wb") as backup:  # write() stores all, or raises
        start = time.monotonic()
        for offset in range(0, run.size, PULL_LENGTH):
            length = min(PULL_LENGTH, run.size - offset)
            backup.write(client.pread(length, offset))
            backup.flush()
            os.fdatasync(backup.fileno())
            client.trim(length, offset)
            run.pulled += length
            _keep_pace(start, run.pulled, pace)
    client.shutdown()


def _keep_pace(start: float, done: int, pace: int) -> None:
    """Sleep until `done` bytes are due at `pace` bytes a second, as if the target were that far."""
    ahead = start + done / pace - time.monotonic()
    if ahead > 0:
        time.sleep(ahead)


# --- what goes on meanwhile: a guest that writes, somebody who looks ------------------------------


def overwrite_at_random(uri: str, run: Run, stop: threading.Event) -> None:
    """The guest: random data to random places, the same in both runs, until told to stop."""
    guest = nbd.NBD()
    guest.connect_uri(uri)
    dice = random.Random("guest")
    start = time.monotonic()
    while not stop.is_set():
        length = min(dice.choice(WRITE_LENGTHS), run.size)
        offset = dice.randrange(0, run.size - length + 1, 4 * KIB)
        guest.pwrite(dice.randbytes(length), offset)
        run.writes += 1
        run.written += length
        stop.wait(max(0.0, start + run.writes / WRITES_PER_SECOND - time.monotonic()))
    guest.flush()
    guest.shutdown()


class Look:
    """Asks the server which clusters it still keeps, through the export's own meta context."""

    def __init__(self, uri: str, run: Run) -> None:
        self.run = run
        self.client = nbd.NBD()
        self.client.add_meta_context(ACCESS)
        self.client.connect_uri(uri)

    def __call__(self) -> None:
        """Bring `released`, `held` and `held_peak` up to date."""
        released = held = offset = 0

        def count(_context: str, _offset: int, entries: list[int], _error: object) -> int:
            nonlocal released, held, offset
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                released += 0 if flags & READABLE else length
                held += length if flags & HELD else 0
                offset += length
            return 0

        while offset < self.run.size:
            self.client.block_status(self.run.size - offset, offset, count)
        self.run.released, self.run.held = released, held
        self.run.held_peak = max(self.run.held_peak, held)


@contextmanager
def running(target: object, *arguments: object) -> Iterator[None]:
    """A thread for the length of a block; what it raises is raised here."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            target(*arguments)  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        for argument in arguments:
            if isinstance(argument, threading.Event):
                argument.set()
        thread.join()
    if failures:
        raise failures[0]


# --- one run --------------------------------------------------------------------------------------


@contextmanager
def served(disk: Path) -> Iterator[str]:
    """`fleecenbd serve` with a session begun; its Unix socket."""
    folder = disk.parent
    program = Path(sys.executable).with_name("fleecenbd")
    options = ["--begin", "nightly", "-U", "f.sock"]
    console.print(f"[bold]$[/] fleecenbd serve {disk.name} {' '.join(options)}")
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    log = folder / "server.log"
    with log.open("wb") as log_file:
        server = subprocess.Popen(
            [program, "serve", disk.name, *options, "--state-dir", "state", "-P", ready],
            cwd=folder,
            stderr=log_file,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"demo: fleecenbd serve did not start\n{log.read_text()}")
            time.sleep(0.02)
        yield str(folder / "f.sock")
    except BaseException:
        console.print(log.read_text(), markup=False)
        raise
    finally:
        server.terminate()
        server.wait()


def perform(run: Run, disk: Path, target: Path, pace: int, trim: bool) -> None:
    """Serve the disk, let the guest write, pull, and show it; counts go to `run`."""
    with served(disk) as socket:
        guest = f"nbd+unix:///vm?socket={socket}"
        export = f"nbd+unix:///vm@nightly?socket={socket}"
        if trim:
            console.print("  and libnbd: pread, pwrite, fdatasync, [bold]trim[/], 2 MiB at a time")
        else:
            console.print("[bold]$[/] nbdcopy 'nbd+unix:///vm@nightly?socket=f.sock' - > backup")
        look = Look(export, run)
        stop_guest, pulled = threading.Event(), threading.Event()

        def pull() -> None:
            try:
                (pull_with_trim if trim else pull_with_nbdcopy)(export, target, run, pace)
            finally:
                pulled.set()

        start = time.monotonic()
        with running(overwrite_at_random, guest, run, stop_guest), Show(run) as show:
            with running(pull):
                while not pulled.wait(LOOK_INTERVAL_S):
                    look()
                    show()
            look()
            show(last=True)
        run.seconds = time.monotonic() - start
        look.client.shutdown()


class Show:
    """A bar on a terminal, a line a second anywhere else."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.next_line = 0.0

    def __enter__(self) -> "Show":
        if console.is_terminal:
            self.bar = Progress(BarColumn(None), TextColumn("{task.description}"), console=console)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.run.size)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, *, last: bool = False) -> None:
        run = self.run
        text = (
            f"pulled {100 * run.pulled // run.size:3} %  guest wrote {run.written // MIB:3} MiB  "
            f"released {run.released // MIB:3} MiB  temp image {run.held // MIB:3} MiB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=run.pulled, description=text)
        elif last or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + 1.0
            console.print(f"  {text}", soft_wrap=True)


def _mib(count: int) -> str:
    return f"{count / MIB:6.1f} MiB"


# --- before and after: the disk, the verdict ------------------------------------------------------


def make_disk(path: Path, size: int) -> None:
    """An ext4 file system with files on it, filling about 60 % of the disk; needs no root."""
    dice = random.Random("files")
    tree = path.with_name("tree")
    (tree / "photos").mkdir(parents=True)
    (tree / "letters").mkdir()
    for index in range(40):
        letter = f"Letter {index}: all is well, and was at the moment of the backup.\n"
        (tree / "letters" / f"{index:02}.txt").write_text(letter * 50)
        photo = dice.randbytes(size * 6 // 10 // 40)
        (tree / "photos" / f"{index:02}.jpg").write_bytes(photo)
    with path.open("wb") as image:
        image.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, path], check=True)


def copy_disk(source: Path, target: Path) -> None:
    """Copy an image, holes included."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def judge(run: Run, before: Path, backup: Path, disk: Path) -> None:
    """Append to `run.faults` whatever is wrong with the backup."""
    difference = first_difference(before, backup)
    if difference is not None:
        run.faults.append(f"the backup differs from the disk at arming at offset {difference}")
    if first_difference(before, disk) is None:
        run.faults.append("the guest has not changed the disk, so this has shown nothing")
    check = subprocess.run(["e2fsck", "-f", "-n", backup], capture_output=True, text=True)
    if check.returncode != 0:
        run.faults.append(f"e2fsck finds faults in the backup:\n{check.stdout}")


def first_difference(left: Path, right: Path) -> int | None:
    """The first offset where two images differ in bytes or end, or None."""
    offset = 0
    with left.open("rb") as one, right.open("rb") as other:
        while True:
            data, expected = one.read(MIB), other.read(MIB)
            if data != expected:
                same = zip(data, expected, strict=False)
                return offset + next(
                    (index for index, (a, b) in enumerate(same) if a != b),
                    min(len(data), len(expected)),
                )
            if not data:
                return None
            offset += len(data)


def verdict(plain: Run, trimmed: Run) -> int:
    """Print how it went; the exit status."""
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("")
    table.add_column("nbdcopy, no TRIM", justify="right")
    table.add_column("libnbd, with TRIM", justify="right")
    runs = (plain, trimmed)
    table.add_row("pulled", *(_mib(run.pulled) for run in runs))
    table.add_row("guest wrote meanwhile", *(_mib(run.written) for run in runs))
    table.add_row("temp image, at most", *(_mib(run.held_peak) for run in runs))
    table.add_row("temp image, in the end", *(_mib(run.held) for run in runs))
    words = ("[red]no[/]" if run.faults else "[green]yes[/]" for run in runs)
    table.add_row("backup equals disk at arming", *words)
    console.print()
    console.print(table)
    console.print()
    if trimmed.held_peak >= plain.held_peak or trimmed.held != 0:
        trimmed.faults.append("TRIM has not saved any space")
    for run in runs:
        for fault in run.faults:
            console.print(f"[red]FAULT[/] ({run.title}): {fault}", soft_wrap=True)
    if plain.faults or trimmed.faults:
        return 1
    saved = 100 * (1 - trimmed.held_peak / plain.held_peak)
    console.print(
        f"Both backups equal the disk at arming, byte for byte, and e2fsck finds them clean.\n"
        f"TRIM saved {saved:.0f} % of the temp image at its peak, and all of it in the end.",
        soft_wrap=True,
    )
    return 0


def main() -> int:
    """Parse the options, perform both runs, judge."""
    parser = argparse.ArgumentParser(description="Back up a disk while it is being overwritten.")
    parser.add_argument("--size", type=int, default=384, metavar="MIB", help="of the disk (384)")
    parser.add_argument(
        "--pace", type=int, default=64, metavar="MIB", help="pulled per second (64)"
    )
    options = parser.parse_args()
    size, pace = options.size * MIB, options.pace * MIB
    plain, trimmed = Run("nbdcopy", size), Run("with TRIM", size)

    with tempfile.TemporaryDirectory(prefix="fleecenbd-demo-") as name:
        folder = Path(name)
        disk, before, backup = (folder / n for n in ("vm.raw", "before.raw", "backup.raw"))
        console.print(f"A disk of {options.size} MiB with an ext4 file system and 80 files: vm.raw")
        make_disk(before, size)
        for number, (run, trim) in enumerate([(plain, False), (trimmed, True)], 1):
            console.print(f"\n[bold]{number}. A backup {'with' if trim else 'without'} TRIM[/]")
            copy_disk(before, disk)
            perform(run, disk, backup, pace, trim)
            judge(run, before, backup, disk)
        return verdict(plain, trimmed)


if __name__ == "__main__":
    sys.exit(main())
