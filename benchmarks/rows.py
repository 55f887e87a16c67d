"""The rows of the table: what is measured, against whom, and what there is to reach."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers import DIRECT, FLEECENBD, NBDKIT, QEMU, QEMU_NBD

HIGHER = "higher"
LOWER = "lower"

WITH_TRIM = "with TRIM"
WITHOUT_TRIM = "without TRIM"
ONE_PROCESS = "one process"
TEN_PROCESSES = "ten processes"


@dataclass(frozen=True)
class Row:
    """One line: the metric of a suite, ours against theirs.

    ``least`` and ``aim`` are ratios, ours to theirs; where ``absolute``, figures in ``unit``.
    Of what is better ``lower`` they are the most that is allowed. None: printed, nothing to reach.
    """

    key: str
    title: str
    suite: str
    metric: str
    theirs: str
    unit: str
    least: float | None = None
    aim: float | None = None
    better: str = HIGHER
    ours: str = FLEECENBD
    absolute: bool = False

    def reached(self, figure: float, target: float) -> bool:
        """Is a ratio (where ``absolute``, a figure) as good as a target?"""
        return figure >= target if self.better == HIGHER else figure <= target


def _lower(
    key: str,
    title: str,
    suite: str,
    metric: str,
    theirs: str,
    unit: str,
    least: float | None = None,
    aim: float | None = None,
) -> Row:
    return Row(key, title, suite, metric, theirs, unit, least, aim, LOWER)


def _qemu_client() -> list[Row]:
    """QEMU's own client, as a guest without a backup: against no server at all, and others."""
    targets = {DIRECT: (0.6, 0.9), NBDKIT: (1.0, 1.3), QEMU_NBD: (1.0, 1.3)}
    work = {"read": "read", "write": "write, a flush every 16"}
    return [
        Row(
            f"qemu-{kind}-{depth}-{theirs.split(' ')[0]}",
            f"QEMU's own client, no backup: {words}, depth {depth}",
            "qemu client",
            f"{kind}-{depth}",
            theirs,
            "/s",
            *targets[theirs],
        )
        for theirs in targets
        for depth in (16, 1)
        for kind, words in work.items()
    ]


def _media() -> list[Row]:
    """A file system on a disk, and TCP: printed beside the others."""
    rows = []
    for key, words in (("cold", "cold cache"), ("warm", "warm cache")):
        for theirs in (QEMU, NBDKIT):
            name = theirs.split(" ")[0].lower()
            rows.append(
                Row(
                    f"disk-pull-{key}-{name}",
                    f"on a disk, {words}: pull, quiet guest",
                    "disk fleecing",
                    f"pull-{key}",
                    theirs,
                    "MB/s",
                )
            )
    rows.append(
        Row(
            "disk-first-touch",
            "on a disk: guest random write 4 KiB, first touch",
            "disk fleecing",
            "first-touch",
            QEMU,
            "/s",
        )
    )
    for theirs in (QEMU_NBD, NBDKIT):
        name = theirs.split(" ")[0]
        for key, words, metric in (
            ("disk-read-cold", "on a disk, cold cache: guest random read", "read-32-cold"),
            ("disk-read-warm", "on a disk, warm cache: guest random read", "read-32-warm"),
            ("disk-write", "on a disk: guest random write, no session,", "write-32"),
        ):
            title = f"{words} 4 KiB, depth 32"
            rows.append(Row(f"{key}-{name}", title, "disk guest", metric, theirs, "/s"))
    for theirs in (QEMU, NBDKIT):
        name = theirs.split(" ")[0].lower()
        title = "over TCP: pull, quiet guest"
        rows.append(Row(f"tcp-pull-{name}", title, "tcp fleecing", "pull", theirs, "MB/s"))
    for theirs in (QEMU_NBD, NBDKIT):
        name = theirs.split(" ")[0]
        for metric, words in (
            ("read-32", "random read 4 KiB, depth 32"),
            ("read-1", "random read 4 KiB, depth 1"),
            ("write-32", "random write 4 KiB, no session, depth 32"),
        ):
            title = f"over TCP: guest {words}"
            rows.append(Row(f"tcp-{metric}-{name}", title, "tcp guest", metric, theirs, "/s"))
    return rows


ROWS: tuple[Row, ...] = (
    *_qemu_client(),
    Row("pull-qemu", "pull, quiet guest", "fleecing", "pull", QEMU, "MB/s", 2.5, 4.0),
    Row("pull-nbdkit", "pull, quiet guest", "fleecing", "pull", NBDKIT, "MB/s", 1.0, 1.3),
    Row(
        "pull-copied",
        "pull, 25 % of the 4 KiB blocks written at random",
        "fleecing",
        "pull-copied",
        QEMU,
        "MB/s",
        2.0,
        3.0,
    ),
    Row("read-32", "guest random read 4 KiB, depth 32", "guest", "read-32", QEMU_NBD, "/s", 2.2, 3),
    Row("read-1", "guest random read 4 KiB, depth 1", "guest", "read-1", QEMU_NBD, "/s", 1.3, 1.6),
    Row("read-32-nbdkit", "guest random read 4 KiB, depth 32", "guest", "read-32", NBDKIT, "/s"),
    Row("read-1-nbdkit", "guest random read 4 KiB, depth 1", "guest", "read-1", NBDKIT, "/s"),
    Row(
        "write-32",
        "guest random write 4 KiB, depth 32, no session",
        "guest",
        "write-32",
        QEMU_NBD,
        "/s",
        2.0,
        3.0,
    ),
    Row(
        "write-32-nbdkit",
        "guest random write 4 KiB, depth 32, no session",
        "guest",
        "write-32",
        NBDKIT,
        "/s",
    ),
    Row(
        "first-touch",
        "guest random write 4 KiB, depth 32, first touch",
        "fleecing",
        "first-touch",
        QEMU,
        "/s",
        3.5,
        6.0,
    ),
    Row(
        "second-touch",
        "guest random write 4 KiB, depth 32, second touch",
        "fleecing",
        "second-touch",
        QEMU,
        "/s",
        2.5,
        4.0,
    ),
    _lower(
        "p99",
        "guest write p99, depth 1, while a backup pulls at full speed",
        "latency",
        "p99",
        QEMU,
        "us",
        1.0,
        0.5,
    ),
    Row("p99-pull", "the pull meanwhile", "latency", "pull", QEMU, "MB/s"),
    _lower(
        "temp-size",
        "temp image after the same first-touch writes to 1/16 of the blocks",
        "fleecing",
        "temp-size",
        QEMU,
        "MiB",
        0.25,
        0.1,
    ),
    Row(
        "temp-peak",
        "temp image's peak, pull under a write storm",
        "trim",
        "temp-peak",
        WITHOUT_TRIM,
        "MiB",
        0.5,
        0.2,
        LOWER,
        ours=WITH_TRIM,
    ),
    Row(
        "temp-peak-pull",
        "the pull meanwhile",
        "trim",
        "pull",
        WITHOUT_TRIM,
        "MB/s",
        ours=WITH_TRIM,
    ),
    _lower("cpu-pull", "CPU seconds per GiB pulled", "fleecing", "cpu-pull", QEMU, "s", 1.0, 0.6),
    _lower(
        "cpu-first-touch",
        "CPU seconds per million guest writes, first touch",
        "fleecing",
        "cpu-first-touch",
        QEMU,
        "s",
        1.0,
        0.6,
    ),
    _lower(
        "cpu-second-touch",
        "CPU seconds per million guest writes, second touch",
        "fleecing",
        "cpu-second-touch",
        QEMU,
        "s",
        1.0,
        0.6,
    ),
    Row(
        "ten-disks",
        "ten busy disks, half reads, half writes: in one process, in ten",
        "ten disks",
        "mixed",
        TEN_PROCESSES,
        "/s",
        ours=ONE_PROCESS,
    ),
    Row(
        "memory",
        "memory: 1 TiB disk, one session, 64 clients",
        "1 TiB",
        "memory",
        QEMU,
        "MiB",
        160.0,
        100.0,
        LOWER,
        absolute=True,
    ),
    _lower(
        "start", "start to first reply, 1 TiB sparse disk", "1 TiB", "start", QEMU, "ms", 1.0, None
    ),
    *_media(),
)
