"""Rounds: every suite once, its subjects one after the other, in an order that turns each time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images
from benchmarks.suites import Subject, Suite
from benchmarks.work import MIB, Place

Figures = dict[str, float | str]

ROOM = 3.5
"""Times the image's size that a medium must have free: the image, ten others, a temp image."""


@dataclass(frozen=True)
class Media:
    """Where images lie in memory and on a disk, and how large they are (bytes)."""

    memory: Path
    disk: Path
    size: int
    limit_s: float


@contextlib.contextmanager
def places(media: Media, suites: Sequence[Suite]) -> Iterator[Callable[[Suite], Place]]:
    """The image of each medium that a suite needs, made now and gone in the end.

    Raises RuntimeError where a medium has too little room.
    """
    made: dict[bool, Place] = {}
    with contextlib.ExitStack() as stack:
        for on_disk in sorted({suite.on_disk for suite in suites}):
            parent = media.disk if on_disk else media.memory
            free = shutil.disk_usage(parent).free
            if free < media.size * ROOM:
                raise RuntimeError(
                    f"{parent} has {free // MIB} MiB free, and {int(media.size * ROOM) // MIB} are "
                    f"needed: use a smaller --size, or another folder"
                )
            name = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="fleecenbd-bench-", dir=parent)
            )
            image = Path(name) / "vm.raw"
            images.make_image(image, media.size)
            made[on_disk] = Place(Path(name), image, media.size, media.limit_s)
        yield lambda suite: made[suite.on_disk]


def measure(
    number: int,
    suites: Sequence[Suite],
    place: Callable[[Suite], Place],
    tell: Callable[[str], None],
) -> dict[str, dict[str, Figures]]:
    """suite -> subject -> metric -> figure, or a sentence on what went wrong.

    Every second round (``number`` odd) goes through the subjects in the other direction.
    """
    figures: dict[str, dict[str, Figures]] = {}
    for suite in suites:
        subjects = suite.subjects if number % 2 == 0 else suite.subjects[::-1]
        figures[suite.name] = {}
        for subject in subjects:
            tell(f"{suite.name}: {subject.name}")
            _settle(place(suite))
            figures[suite.name][subject.name] = _measure_one(subject, place(suite))
    return figures


def _measure_one(subject: Subject, place: Place) -> Figures:
    """All steps of a subject; after one that failed, the rest has no ground to stand on."""
    figures: Figures = {}
    wrong = "was not measured"
    try:
        with subject.start(place) as server:
            for step in subject.steps:
                figures.update(step.work(server, place))
    # A row that fails is told in the table, whatever it was, and the others go on.
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    for step in subject.steps:
        for metric in step.metrics:
            figures.setdefault(metric, wrong)
    return figures


def _settle(place: Place) -> None:
    """Nobody pays for what the one before has left to be written."""
    with place.image.open("rb+") as image:
        os.fsync(image.fileno())
