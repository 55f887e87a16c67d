"""Stamps: what they say at every moment at which a kill could come."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleecenbd.storage import stamps as module
from fleecenbd.storage.mapped import MappedFile
from fleecenbd.storage.stamps import Stamps, stamps_of


@pytest.fixture
def file(tmp_path: Path) -> MappedFile:
    return MappedFile.create(tmp_path / "disk", {"kind": "disk"}, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time that the stamps are given: the last of the list."""
    times = [1000]
    monkeypatch.setattr(module, "time_ns", lambda: times[-1])
    return times


def test_each_write_stamps_its_beginning_and_the_last_one_its_end(
    file: MappedFile, clock: list[int]
) -> None:
    stamps = Stamps()
    stamps.attach(file, mtime_ns=900)
    assert stamps_of(file) == (1000, 1000, 0)
    for time, call, expected in (
        (1010, stamps.begin, (1010, 1000, 1)),
        (1020, stamps.begin, (1020, 1000, 2)),
        (1030, stamps.end, (1020, 1000, 1)),
        (1040, stamps.end, (1020, 1040, 0)),
    ):
        clock.append(time)
        call()
        assert stamps_of(file) == expected


def test_writes_in_flight_when_the_file_comes_are_counted(
    file: MappedFile, clock: list[int]
) -> None:
    stamps = Stamps()
    stamps.begin()
    assert not stamps.is_attached
    stamps.attach(file, mtime_ns=0)
    assert stamps.is_attached
    assert stamps_of(file)[2] == 1
    clock.append(1500)
    stamps.end()
    assert stamps_of(file) == (1000, 1500, 0)


def test_an_image_from_the_future_is_not_taken_for_a_changed_one(
    file: MappedFile, clock: list[int]
) -> None:
    stamps = Stamps()
    stamps.attach(file, mtime_ns=5000)
    assert stamps_of(file) == (1000, 5000, 0)


def test_without_a_file_nothing_is_stored(file: MappedFile, clock: list[int]) -> None:
    stamps = Stamps()
    stamps.attach(file, mtime_ns=0)
    stamps.detach()
    clock.append(2000)
    stamps.begin()
    assert stamps_of(file) == (1000, 1000, 0)


def test_a_kill_between_two_stores_finds_a_stamp_for_every_write_that_is_counted(
    file: MappedFile, clock: list[int]
) -> None:
    """The order of the stores: stamp first, number second, at both ends."""
    order: list[int] = []

    class Watched:
        def __setitem__(self, cell: int, value: int) -> None:
            order.append(cell)

    stamps = Stamps()
    stamps._cells = Watched()  # type: ignore[assignment]
    stamps.begin()
    assert order == [module.BEGAN, module.IN_FLIGHT]
    stamps.end()
    assert order[2:] == [module.ENDED, module.IN_FLIGHT]
