"""One script against both servers, step by step.

Both have a copy of one disk, and one session (QEMU: one copy-before-write node) from the start,
with clusters of 64 KiB, which is what QEMU's are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.differential.daemon import fleecing_daemon, qemu_version
from tests.differential.differences import (
    FAULTY_BEFORE,
    SPARED_TRIM,
    WRONG_ACROSS,
    Unexplained,
    explain,
)
from tests.differential.peer import Answer, Peer, peer
from tests.differential.script import CLUSTER, Step
from tests.differential.truth import Truth
from tests.disks import KIB, MIB, copy_disk, make_disk
from tests.serving import Serving, serving

# An odd number of sectors: the last cluster is a part of one.
DISK_SIZE = 3 * MIB + 12 * KIB + 512


@dataclass
class Report:
    """What a script met: how often each difference, and whatever is wrong, in order."""

    steps: int = 0
    met: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # Most bytes that the temp images held after a step.
    space: int = 0
    space_in_qemu: int = 0

    def __str__(self) -> str:
        met = ", ".join(f"{count} x {name}" for name, count in sorted(self.met.items()))
        space = f"temp space at most {self.space // KIB} KiB here"
        return f"{self.steps} steps: {met}; {space}, {self.space_in_qemu // KIB} KiB in QEMU"


@dataclass(frozen=True)
class Both:
    """Both servers running, a client on each export, and what each keeps."""

    server: Serving
    ours: Peer
    theirs: Peer
    temp_in_qemu: Path
    content: bytes


@contextmanager
def both(directory: Path) -> Iterator[Both]:
    """Start both servers on copies of one disk, in a folder of their own."""
    disk = make_disk(directory / "vm.raw", DISK_SIZE)
    content = disk.read_bytes()
    copy = copy_disk(disk, directory / "qemu.raw")
    temp = directory / "qemu-temp.raw"
    with (
        serving(directory, disk, "--begin", "nightly", "--cluster-size", str(CLUSTER)) as server,
        fleecing_daemon(directory, copy, temp) as qemu,
        peer(server.uri("vm"), server.uri("vm@nightly")) as ours,
        peer(qemu.uri("vm"), qemu.uri("vm@nightly")) as theirs,
    ):
        yield Both(server, ours, theirs, temp, content)


def compare(directory: Path, steps: Sequence[Step]) -> Report:
    """Play a script to both servers. The report's `wrong` decides."""
    report = Report()
    with both(directory) as running:
        truth = Truth(running.content)
        for step in steps:
            _play(step, running.ours, running.theirs, truth, report)
            report.space = max(report.space, running.server.temp_bytes())
            space = running.temp_in_qemu.stat().st_blocks * 512
            report.space_in_qemu = max(report.space_in_qemu, space)
    return report


def offers(directory: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """What the exports offer here and in QEMU, by (side, name), where that differs."""
    with both(directory) as running:
        ours, theirs = running.ours.offers(), running.theirs.offers()
    assert ours.keys() == theirs.keys()
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def _play(step: Step, our_peer: Peer, their_peer: Peer, truth: Truth, report: Report) -> None:
    ours, theirs = our_peer.play(step), _play_to_qemu(step, their_peer, report)
    report.steps += 1
    for who, answer in [("we are", ours), ("QEMU is", theirs)]:
        fault = truth.wrong(step, answer)
        if fault is None:
            continue
        if who == "QEMU is" and _is_known_fault(step, answer, truth):
            report.met[WRONG_ACROSS] += 1
            break
        report.wrong.append(f"step {step.number}: {step}: {who} wrong: {fault}")
    else:
        for name in explain(step, ours, theirs, truth):
            if isinstance(name, Unexplained):
                report.wrong.append(str(name))
            else:
                report.met[name] += 1
    truth.apply(step)


def _play_to_qemu(step: Step, their_peer: Peer, report: Report) -> Answer:
    if qemu_version() < FAULTY_BEFORE and (step.side, step.request) == ("backup", "trim"):
        start = -(-step.offset // CLUSTER) * CLUSTER
        whole = replace(step, offset=start, length=step.end // CLUSTER * CLUSTER - start)
        if whole != step and step.length and step.end <= DISK_SIZE:
            report.met[SPARED_TRIM] += 1
            return their_peer.play(whole) if whole.length > 0 else Answer()
    return their_peer.play(step)


def _is_known_fault(step: Step, answer: Answer, truth: Truth) -> bool:
    """Whether a wrong answer of QEMU's is the one that versions before 8.0 are known for."""
    if qemu_version() >= FAULTY_BEFORE or step.side != "backup" or len(step.clusters) < 2:
        return False
    if answer.data is None:
        return not truth.touched.isdisjoint(step.clusters)
    right = truth.before[step.offset : step.end]
    return all(
        index // CLUSTER in truth.touched
        for index, (got, byte) in enumerate(zip(answer.data, right, strict=True), step.offset)
        if got != byte
    )
