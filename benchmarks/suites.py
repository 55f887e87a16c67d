"""What is measured on whom: suites, their subjects, and the steps these go through.

The rows of a suite come from the same start of a server, in an order in which none spoils the
next. A suite is made of subjects (a server, and the steps it goes through), a step gives metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import images, peers, work
from benchmarks.peers import DIRECT, FLEECENBD, NBDKIT, QEMU, QEMU_NBD, Server
from benchmarks.rows import ONE_PROCESS, TEN_PROCESSES, WITH_TRIM, WITHOUT_TRIM
from benchmarks.work import Place

Start = Callable[[Place], contextlib.AbstractContextManager[Server]]


@dataclass(frozen=True)
class Step:
    """Work, and the names of what it measures; it may measure nothing and prepare the next."""

    metrics: tuple[str, ...]
    work: Callable[[Server, Place], dict[str, float]]


@dataclass(frozen=True)
class Subject:
    """Somebody to be measured."""

    name: str
    start: Start
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Suite:
    """Subjects that are measured in turn; on a disk, or else in memory."""

    name: str
    subjects: tuple[Subject, ...]
    on_disk: bool = False


# --- servers ---------------------------------------------------------------------------------


def _on_image(
    start: Callable[..., contextlib.AbstractContextManager[Server]], **options: bool
) -> Start:
    """A server on the place's image."""
    return lambda place: start(place.folder, place.image, **options)


def _ours(*, session: bool = True, tcp: bool = False) -> Start:
    """fleecenbd on the place's image."""
    return lambda place: peers.fleecenbd(
        place.folder, place.image, session=session, tcp=tcp, checkout=place.checkout
    )


def _on_large(start: Start) -> Start:
    """A server on a disk of 1 TiB that is one hole."""

    @contextlib.contextmanager
    def starting(place: Place) -> Iterator[Server]:
        with _files(place, "large", 1) as (image,):
            images.make_sparse(image, work.LARGE_SIZE)
            with start(replace(place, image=image)) as server:
                yield server

    return starting


@contextlib.contextmanager
def _ten_in_one(place: Place) -> Iterator[Server]:
    with (
        _ten_images(place) as disks,
        peers.fleecenbd(place.folder, *disks, checkout=place.checkout) as server,
    ):
        yield server


@contextlib.contextmanager
def _one_in_each(place: Place) -> Iterator[Server]:
    with _ten_images(place) as disks, contextlib.ExitStack() as stack:
        servers = []
        for disk in disks:
            folder = place.folder / disk.stem
            folder.mkdir(exist_ok=True)
            servers.append(
                stack.enter_context(peers.fleecenbd(folder, disk, checkout=place.checkout))
            )
        yield Server(
            tuple(server.guest for server in servers),
            tuple(server.fleece for server in servers),
            tuple(pid for server in servers for pid in server.pids),
            servers[0].started,
        )


@contextlib.contextmanager
def _ten_images(place: Place) -> Iterator[list[Path]]:
    with _files(place, "busy", work.DISKS) as disks:
        for disk in disks:
            images.make_image(disk, work.whole(place.size // work.DISKS))
        yield disks


@contextlib.contextmanager
def _files(place: Place, name: str, count: int) -> Iterator[list[Path]]:
    """Names of files that are removed in the end."""
    paths = [place.folder / f"{name}{number}.raw" for number in range(count)]
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


# --- suites ----------------------------------------------------------------------------------

_PULL = Step(("pull", "cpu-pull"), partial(work.pull, "pull"))

_FLEECING = (
    _PULL,
    Step(("first-touch", "cpu-first-touch", "temp-size"), work.first_touch),
    Step((), work.fill),
    Step(("pull-copied",), partial(work.pull, "pull-copied")),
    Step(("second-touch", "cpu-second-touch"), work.second_touch),
)

_GUEST = (
    Step(("read-32",), partial(work.random_requests, "read", 32, 2)),
    Step(("read-1",), partial(work.random_requests, "read", 1, 16)),
    Step(("write-32",), partial(work.random_requests, "write", 32, 2)),
)

_QEMU_CLIENT = tuple(
    Step((f"{kind}-{depth}",), partial(work.qemu_client, kind, depth))
    for kind in ("read", "write")
    for depth in (16, 1)
)

_DISK_FLEECING = (
    Step(("pull-cold",), work.cold_pull),
    Step(("pull-warm",), work.warm_pull),
    Step(("first-touch",), work.first_touch),
)

_DISK_GUEST = (
    Step(("read-32-cold",), work.cold_read),
    Step(("read-32-warm",), work.warm_read),
    Step(("write-32",), partial(work.random_requests, "write", 32, 16)),
)

_LARGE = (Step(("start",), work.first_reply), Step(("memory",), work.memory))


def _guests(tcp: bool, steps: tuple[Step, ...]) -> tuple[Subject, ...]:
    """The servers of a guest's disk, without a session."""
    return (
        Subject(FLEECENBD, _ours(session=False, tcp=tcp), steps),
        Subject(QEMU_NBD, _on_image(peers.qemu_nbd, tcp=tcp), steps),
        Subject(NBDKIT, _on_image(peers.nbdkit_file, tcp=tcp), steps),
    )


SUITES: tuple[Suite, ...] = (
    Suite(
        "qemu client",
        (
            *_guests(tcp=False, steps=_QEMU_CLIENT),
            Subject(DIRECT, _on_image(peers.direct), _QEMU_CLIENT),
        ),
    ),
    Suite(
        "fleecing",
        (
            Subject(FLEECENBD, _ours(), _FLEECING),
            Subject(QEMU, _on_image(peers.qemu_fleecing), _FLEECING),
            Subject(NBDKIT, _on_image(peers.nbdkit_file), (_PULL,)),
        ),
    ),
    Suite("guest", _guests(tcp=False, steps=_GUEST)),
    Suite(
        "latency",
        (
            Subject(FLEECENBD, _ours(), (Step(("p99", "pull"), work.latency),)),
            Subject(QEMU, _on_image(peers.qemu_fleecing), (Step(("p99", "pull"), work.latency),)),
        ),
    ),
    Suite(
        "trim",
        tuple(
            Subject(
                name,
                _ours(),
                (Step(("temp-peak", "pull"), partial(work.storm, release)),),
            )
            for name, release in ((WITH_TRIM, True), (WITHOUT_TRIM, False))
        ),
    ),
    Suite(
        "ten disks",
        (
            Subject(ONE_PROCESS, _ten_in_one, (Step(("mixed",), work.mixed),)),
            Subject(TEN_PROCESSES, _one_in_each, (Step(("mixed",), work.mixed),)),
        ),
    ),
    Suite(
        "1 TiB",
        (
            Subject(FLEECENBD, _on_large(_ours()), _LARGE),
            Subject(QEMU, _on_large(_on_image(peers.qemu_fleecing)), _LARGE),
        ),
    ),
    Suite(
        "disk fleecing",
        (
            Subject(FLEECENBD, _ours(), _DISK_FLEECING),
            Subject(QEMU, _on_image(peers.qemu_fleecing), _DISK_FLEECING),
            Subject(NBDKIT, _on_image(peers.nbdkit_file), _DISK_FLEECING[:2]),
        ),
        on_disk=True,
    ),
    Suite("disk guest", _guests(tcp=False, steps=_DISK_GUEST), on_disk=True),
    Suite(
        "tcp fleecing",
        (
            Subject(FLEECENBD, _ours(tcp=True), (_PULL,)),
            Subject(QEMU, _on_image(peers.qemu_fleecing, tcp=True), (_PULL,)),
            Subject(NBDKIT, _on_image(peers.nbdkit_file, tcp=True), (_PULL,)),
        ),
    ),
    Suite("tcp guest", _guests(tcp=True, steps=_GUEST)),
)
