"""Everything at once against one server, again and again: what is left is looked at byte by byte.

    python -m tests.e2e.stress --runs 20

One run: two disks, `vda` and `vdb`, in one session. fio writes at random to both guest exports and
verifies what it wrote, all the while. `vda@nightly` is pulled by two nbdcopys at once, over and
over. From `vdb@nightly` a client reads pieces in random order, compares them, and releases them.
On both, an nbdcopy is started and killed, over and over, after a random time.

In the end: every pull equals the disk at arming, in size and bytes; so does what the trimmer read;
what was released is refused; fio is content; the server has no descriptor more than before, says
nothing of tasks or exceptions, stops at once, and leaves nothing in its state directory.
A client that hangs runs into its time limit, which fails the run.
"""

import argparse
import errno
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nbd
import pytest

from tests.disks import KIB, MIB, copy_disk, first_difference, make_disk
from tests.serving import COMMAND_TIMEOUT_S, Serving, connected, run, serving

SIZE = 64 * MIB + 512
FIO_SIZE = 64 * MIB
SETTLE_TIMEOUT_S = 20.0  # until the server has noticed that its last client is gone
KILL_AFTER_MAX_S = 0.08

LOG_FAULTS = ("Traceback", "never awaited", "never retrieved", "was destroyed")


@dataclass
class Counts:
    """What a run met; a run that met nothing has shown nothing."""

    pulls: int = 0
    kills: int = 0
    trims: int = 0
    refused: int = 0
    seconds: float = 0.0


def one_run(folder: Path, seed: int, *, loops: int, words: Sequence[str] = ()) -> Counts:
    """One run as told above; `loops` is how often fio writes each block, `words` are more options
    of the server. Raises what went wrong."""
    counts = Counts()
    start = time.monotonic()
    disks = [make_disk(folder / f"{name}.raw", SIZE, seed=seed + n) for n, name in _DISKS]
    before = [copy_disk(disk, disk.with_suffix(".before")) for disk in disks]
    with serving(folder, *disks, "--begin", "nightly", "--end-sessions", *words) as server:
        _warm_up(server)
        open_files = _kinds_of_open_files(server)
        writing = threading.Event()
        writing.set()
        with ThreadPoolExecutor(8) as pool:
            guests = [pool.submit(_fio, server, folder, n, name, loops) for n, name in _DISKS]
            others = [
                pool.submit(_pull, server, before[0], folder / "one.raw", writing, counts),
                pool.submit(_pull, server, before[0], folder / "other.raw", writing, counts),
                pool.submit(_read_and_trim, server, before[1], seed, counts),
                pool.submit(_kill, server, seed, writing, counts),
            ]
            try:
                for guest in guests:
                    guest.result()
            finally:
                writing.clear()
            for other in others:
                other.result()
        _settle(server, open_files)
        for fault in LOG_FAULTS:
            assert fault not in server.messages(), server.messages()
    for disk in disks:
        assert disk.stat().st_size == SIZE
    assert first_difference(before[0], disks[0]) is not None, "fio has changed nothing"
    left = [path for path in (folder / "state").rglob("*") if path.stat().st_blocks * 512 >= MIB]
    assert not left, f"left in the state directory: {left}"
    counts.seconds = time.monotonic() - start
    return counts


_DISKS = ((0, "vda"), (1, "vdb"))


def _warm_up(server: Serving) -> None:
    """Let the server open whatever it opens once: one short visit to each export."""
    for name in ("vda", "vdb", "vda@nightly", "vdb@nightly"):
        with connected(server.uri(name)) as client:
            client.pread(4096, 0)
    # The last visitors may not have been waved off yet.
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    fewest = len(server.open_files())
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = len(server.open_files())
        if now == fewest:
            return
        fewest = now


def _kinds_of_open_files(server: Serving) -> Counter[str]:
    """How many descriptors refer to what; the numbers of sockets and pipes left out."""
    return Counter(re.sub(r":\[\d+\]", "", name) for name in server.open_files())


def _settle(server: Serving, expected: Counter[str]) -> None:
    """Wait until the server holds no more descriptors than before."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while more := _kinds_of_open_files(server) - expected:
        assert time.monotonic() < deadline, f"descriptors left over: {dict(more)}"
        time.sleep(0.05)


def _fio(server: Serving, folder: Path, number: int, name: str, loops: int) -> None:
    """Random writes of one guest, each block read back and checked."""
    run(
        *("fio", f"--name={name}", "--ioengine=nbd", f"--uri={server.uri(name)}", "--rw=randwrite"),
        *("--bsrange=4k-32k", "--bs_unaligned=0", f"--size={FIO_SIZE}", "--iodepth=16"),
        *(f"--randseed={number + 1}", f"--loops={loops}", "--verify=crc32c", "--verify_fatal=1"),
        *("--verify_backlog=512", "--do_verify=1", "--allrandrepeat=0", f"--aux-path={folder}"),
        timeout_s=4 * COMMAND_TIMEOUT_S,
    )


def _pull(
    server: Serving, before: Path, target: Path, writing: threading.Event, counts: Counts
) -> None:
    """nbdcopy the whole disk, compare, again, for as long as the guest writes; once more then."""
    again = True
    while again:
        again = writing.is_set()
        target.unlink(missing_ok=True)
        run("nbdcopy", server.uri("vda@nightly"), target)
        difference = first_difference(before, target)
        assert difference is None, difference
        counts.pulls += 1


def _read_and_trim(server: Serving, before: Path, seed: int, counts: Counts) -> None:
    """Cut the disk into pieces; read, compare and release each, in any order."""
    dice = random.Random(f"trimmer {seed}")
    content = before.read_bytes()
    # Mostly whole clusters; a few ends lie inside of one, whose parts must add up.
    inside = dice.sample(range(1, SIZE, 4 * KIB), 40)
    ends = sorted({0, SIZE, *inside, *dice.sample(range(0, SIZE, 4 * KIB), 2500)})
    pieces = [(offset, end - offset) for offset, end in pairwise(ends)]
    dice.shuffle(pieces)
    with connected(server.uri("vdb@nightly")) as client:
        for offset, length in pieces:
            assert bytes(client.pread(length, offset)) == content[offset : offset + length], (
                f"a fleecing read differs in [{offset}, {offset + length})"
            )
            client.trim(length, offset)
            counts.trims += 1
        # All parts together are all clusters: nothing may be read any more.
        for offset in (0, SIZE - 1, *(dice.randrange(SIZE) for _ in range(50))):
            with pytest.raises(nbd.Error) as caught:
                client.pread(1, offset)
            assert caught.value.errnum == errno.EINVAL, caught.value.string
            counts.refused += 1


def _kill(server: Serving, seed: int, writing: threading.Event, counts: Counts) -> None:
    """Start an nbdcopy, and kill it wherever it is by then."""
    dice = random.Random(f"killer {seed}")
    while writing.is_set():
        name = dice.choice(["vda@nightly", "vdb@nightly"])
        options = dice.choice([[], ["--request-size=32M"], ["--connections=8", "--requests=128"]])
        client = subprocess.Popen(
            ["nbdcopy", *options, server.uri(name), "null:"], stderr=subprocess.DEVNULL
        )
        try:
            client.wait(dice.uniform(0, KILL_AFTER_MAX_S))
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
            counts.kills += 1


def main() -> int:
    """Some runs, one after the other, each told in a line; the first fault ends them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--loops", type=int, default=4, help="how often fio writes each block")
    parser.add_argument("--serve", default="", help="more options of the server: '--temp qcow2'")
    options = parser.parse_args()
    total = Counts()
    for seed in range(options.seed, options.seed + options.runs):
        folder = Path(tempfile.mkdtemp(prefix="fleecenbd-stress-"))
        try:
            counts = one_run(folder, seed, loops=options.loops, words=options.serve.split())
        except BaseException:
            print(
                f"seed {seed} failed; its disks and logs are kept in {folder}; again: "
                f"python -m tests.e2e.stress --runs 1 --seed {seed}",
                file=sys.stderr,
            )
            raise
        shutil.rmtree(folder)
        print(
            f"seed {seed}: {counts.pulls} pulls equal, {counts.trims} pieces read and released, "
            f"{counts.refused} reads refused after it, {counts.kills} clients killed, "
            f"{counts.seconds:.1f} s",
            flush=True,
        )
        for field in vars(total):
            setattr(total, field, getattr(total, field) + getattr(counts, field))
    print(
        f"{options.runs} runs passed: {total.pulls} pulls, {total.trims} pieces, "
        f"{total.kills} kills, {total.seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
