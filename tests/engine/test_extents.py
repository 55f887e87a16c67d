"""Lists of extents: what is joined, and how far a device is asked."""

from __future__ import annotations

import pytest

from fleecenbd.engine import extents as module
from fleecenbd.engine.extents import append_extent, windowed_status
from fleecenbd.storage.device import Extent

from .scene import simulated


def test_extents_of_the_same_kind_are_one() -> None:
    extents: list[Extent] = []
    append_extent(extents, 10, 0)
    append_extent(extents, 1, 0)
    append_extent(extents, 5, 3)
    append_extent(extents, 5, 0)
    assert extents == [(11, 0), (5, 3), (5, 0)]


@pytest.mark.parametrize("length", [0, -1])
def test_an_extent_of_nothing_is_left_out(length: int) -> None:
    extents: list[Extent] = []
    append_extent(extents, length, 1)
    assert extents == []


class Asked:
    """A device of runs that alternate; remembers what it was asked."""

    def __init__(self, run: int, *, short_after: int | None = None) -> None:
        self.run = run
        self.short_after = short_after
        self.calls: list[tuple[int, int]] = []

    async def status(self, offset: int, length: int) -> list[Extent]:
        self.calls.append((offset, length))
        if self.short_after is not None and len(self.calls) > self.short_after:
            length -= 1
        answer = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.run + 1) * self.run)
            answer.append((stop - offset, offset // self.run % 2))
            offset = stop
        return answer


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 bytes to 32, an answer of 4 extents."""
    monkeypatch.setattr(module, "STATUS_WINDOW", 8)
    monkeypatch.setattr(module, "STATUS_WINDOW_MAX", 32)
    monkeypatch.setattr(module, "STATUS_EXTENTS_MAX", 4)


@pytest.mark.usefixtures("windows")
@simulated
async def test_windows_double_up_to_the_longest_and_join() -> None:
    asked = Asked(1000)
    assert await windowed_status(asked.status, 100, 130, one=False) == [(130, 0)]
    assert asked.calls == [(100, 8), (108, 16), (124, 32), (156, 32), (188, 32), (220, 10)]


@pytest.mark.usefixtures("windows")
@simulated
async def test_an_answer_ends_with_the_window_that_passed_the_most_extents() -> None:
    asked = Asked(2)
    assert await windowed_status(asked.status, 0, 1000, one=False) == [
        (2, run % 2) for run in range(12)
    ]
    assert asked.calls == [(0, 8), (8, 16)], "four extents are not more than four"


@pytest.mark.usefixtures("windows")
@simulated
async def test_the_first_extent_alone_is_known_once_a_second_begins() -> None:
    asked = Asked(20)
    assert await windowed_status(asked.status, 0, 1000, one=True) == [(20, 0)]
    assert asked.calls == [(0, 8), (8, 32)]


@simulated
async def test_who_wants_the_first_extent_alone_begins_with_a_short_window() -> None:
    asked = Asked(4096)
    assert await windowed_status(asked.status, 8192, 1 << 31, one=True) == [(4096, 0)]
    assert asked.calls == [(8192, module.STATUS_WINDOW_ONE)]
    asked = Asked(1 << 40)
    assert await windowed_status(asked.status, 0, 1 << 31, one=True) == [(1 << 31, 0)]
    assert len(asked.calls) < 10


@pytest.mark.usefixtures("windows")
@simulated
async def test_an_answer_ends_where_a_device_told_about_less() -> None:
    asked = Asked(1000, short_after=1)
    assert await windowed_status(asked.status, 0, 100, one=False) == [(23, 0)]
    assert asked.calls == [(0, 8), (8, 16)]
