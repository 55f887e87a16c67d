"""The clients that work is done with, and what their output says."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nbd

RUN_TIMEOUT_S = 600.0
PULL_LENGTH = 1 << 20
PULLS_IN_FLIGHT = 16
SAMPLE_INTERVAL_S = 0.002


@dataclass(frozen=True)
class FioResult:
    """What fio tells of its jobs together: requests, requests a second, and the p99 in seconds."""

    requests: int
    rate: float
    p99_s: float


def run(command: Sequence[str], timeout_s: float = RUN_TIMEOUT_S) -> str:
    """The standard output of a command. Raises RuntimeError with what it said if it fails."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is missing: make tools installs it") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{shlex.join(command)} took more than {timeout_s:g} s") from None
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip())[-500:]
        raise RuntimeError(f"{shlex.join(command)} exited with {result.returncode}: {said}")
    return result.stdout


def nbdcopy(uri: str) -> float:
    """Seconds that nbdcopy takes for the whole export, to nowhere."""
    started = time.monotonic()
    run(["nbdcopy", uri, "null:"])
    return time.monotonic() - started


def fio(
    uris: Sequence[str],
    kind: str,
    *,
    depth: int,
    size: int,
    length: int = 0,
    limit_s: float = 60.0,
    once: bool = True,
    timed: bool = False,
) -> FioResult:
    """Requests of 4 KiB at random: a job for each URI, over the first ``size`` bytes of its disk.

    ``length`` bytes in all for each job, or less where ``limit_s`` comes first; ``timed``: the
    whole of ``limit_s``. ``once``: no block twice before all had their turn, which takes fio a
    bit for each block. The same arguments give the same blocks in the same order, and a shorter
    ``length`` gives the first of them.
    """
    command = ["fio", "--ioengine=nbd", f"--rw={kind}", "--bs=4k", f"--iodepth={depth}"]
    command += [f"--size={size}", "--randseed=1", "--allrandrepeat=1", "--output-format=json"]
    command += [f"--runtime={max(1, round(limit_s))}"]
    if length:
        command += [f"--io_size={length}"]
    if timed:
        command += ["--time_based"]
    if not once:
        command += ["--norandommap", "--random_generator=tausworthe64"]
    for number, uri in enumerate(uris):
        command += [f"--name=disk{number}", f"--uri={uri}"]
    return parse_fio(run(command, limit_s + RUN_TIMEOUT_S))


def parse_fio(text: str) -> FioResult:
    """fio's JSON, which may come after warnings: rates add up, the p99 is the worst job's."""
    try:
        jobs: list[dict[str, Any]] = json.loads(text[text.index("{") :])["jobs"]
    except (ValueError, KeyError):
        raise RuntimeError(f"fio printed no JSON with jobs: {text[:200]}") from None
    requests, rate, p99_ns = 0, 0.0, 0
    for job in jobs:
        if job.get("error"):
            raise RuntimeError(f"fio's job {job.get('jobname')} ended with error {job['error']}")
        for side in (job["read"], job["write"]):
            requests += side["total_ios"]
            rate += side["iops"]
            p99_ns = max(p99_ns, side["clat_ns"].get("percentile", {}).get("99.000000", 0))
    if not requests:
        raise RuntimeError("fio made no request")
    return FioResult(requests, rate, p99_ns / 1e9)


def qemu_bench(place: str, *, write: bool, depth: int, count: int) -> float:
    """Requests a second of QEMU's own client: 4 KiB, cache=none, spread over the disk.

    ``place`` is a path or a URI. Of writes every 16th is followed by a flush.
    """
    command = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-c", str(count), "-d", str(depth)]
    # A step that shares no factor with a disk of 2^n blocks: every block has its turn.
    command += ["-s", "4096", "-S", str(4096 * 1021)]
    if write:
        # By default it writes zeroes, which a server may keep for nothing ever after.
        command += ["-w", "--pattern=165", "--flush-interval=16"]
    return count / parse_qemu_bench(run([*command, place]))


def parse_qemu_bench(text: str) -> float:
    """Seconds of ``qemu-img bench``."""
    found = re.search(r"Run completed in ([0-9.]+) seconds", text)
    if found is None:
        raise RuntimeError(f"qemu-img bench did not say how long it took: {text[:200]}")
    # It prints milliseconds; less than half of one would be nothing.
    return max(float(found[1]), 0.0005)


def pull(uri: str, *, release: bool) -> int:
    """Read the whole export by libnbd, 16 MiB in flight; ``release``: TRIM what has come."""
    client = connect(uri)
    size = client.get_size()
    # Buffers stand beside their reads, so that each lives as long as libnbd may write to it.
    reads: deque[tuple[int, int, nbd.Buffer]] = deque()
    trims: deque[int] = deque()
    offset = 0
    while offset < size or reads or trims:
        while offset < size and len(reads) < PULLS_IN_FLIGHT:
            length = min(PULL_LENGTH, size - offset)
            buffer = nbd.Buffer(length)
            reads.append((client.aio_pread(buffer, offset), offset, buffer))
            offset += length
        while reads and client.aio_command_completed(reads[0][0]):
            _, done, buffer = reads.popleft()
            if release:
                trims.append(client.aio_trim(buffer.size(), done))
        while trims and client.aio_command_completed(trims[0]):
            trims.popleft()
        if reads or trims:
            client.poll(1000)
    client.shutdown()
    return int(size)


def connect(uri: str) -> nbd.NBD:
    """A libnbd client."""
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


@contextlib.contextmanager
def pulling(uri: str, size: int) -> Iterator[Callable[[], float]]:
    """nbdcopy of the export over and over, until the block ends; a call gives the bytes pulled."""
    done = _Pulls(uri, size)
    thread = threading.Thread(target=done.repeat, name="pulling")
    thread.start()
    try:
        yield done.pulled_bytes
    finally:
        done.stop()
        thread.join()
    if done.error is not None:
        raise RuntimeError(done.error)


class _Pulls:
    """nbdcopy, started again whenever it has come to its end."""

    def __init__(self, uri: str, size: int) -> None:
        self.error: str | None = None
        self._uri = uri
        self._size = size
        self._percent = 0
        self._wholes = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False

    def pulled_bytes(self) -> float:
        return (self._wholes + self._percent / 100) * self._size

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            if self._process is not None:
                self._process.terminate()

    def repeat(self) -> None:
        while self._once():
            pass

    def _once(self) -> bool:
        with self._lock:
            if self._stopping:
                return False
            self._process = subprocess.Popen(
                ["nbdcopy", "--progress=1", self._uri, "null:"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        with self._process as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                self._percent = int(line.partition("/")[0])
            said = process.stderr.read()
        if process.returncode and not self._stopping:
            self.error = f"nbdcopy exited with {process.returncode}: {said[-500:]}"
            return False
        if not process.returncode:
            self._wholes += 1
            self._percent = 0
        return True


@contextlib.contextmanager
def storm(uri: str, size: int, started: Callable[[], bool]) -> Iterator[None]:
    """fio writes 4 KiB at random, 32 at a time, while the block runs; it begins once the first
    write has shown (``started``)."""
    command = ["fio", "--name=storm", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k"]
    command += ["--iodepth=32", f"--size={size}", "--randseed=1", "--norandommap"]
    command += ["--time_based", f"--runtime={round(RUN_TIMEOUT_S)}"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        while not started():
            try:
                process.wait(SAMPLE_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"fio exited with {process.returncode}: {process.stderr.read()}")
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the storm ended early: {process.stderr.read()}")
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def peak(value: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Look at a value every 2 ms while the block runs; a call gives the largest so far."""
    largest = value()
    ended = threading.Event()

    def look() -> None:
        nonlocal largest
        while not ended.wait(SAMPLE_INTERVAL_S):
            largest = max(largest, value())

    thread = threading.Thread(target=look, name="peak")
    thread.start()
    try:
        yield lambda: largest
    finally:
        ended.set()
        thread.join()
