"""Meta contexts told from bits: what an answer holds, and how much is looked at for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleecenbd.engine import bit_status
from fleecenbd.engine.bit_status import access_extents, dirty_extents
from fleecenbd.engine.bitmap import Bitmap

CLUSTER = 4096
CLUSTERS = 1000


class Counted(Bitmap):
    """Counts the runs that are taken."""

    taken = 0

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        for run in super().runs(offset, length):
            self.taken += 1
            yield run


def every_second() -> Counted:
    bitmap = Counted(CLUSTERS * CLUSTER, CLUSTER)
    bitmap.bits[::2] = 1
    return bitmap


def filled() -> Counted:
    return Counted(CLUSTERS * CLUSTER, CLUSTER, fill=True)


def test_the_first_extent_alone_is_told_without_a_look_at_the_rest() -> None:
    size = CLUSTERS * CLUSTER
    own = every_second()
    assert dirty_extents(own, 0, size, one=True) == [(CLUSTER, 1)]
    assert own.taken == 2
    access = every_second()
    assert access_extents(access, filled(), 0, size, one=True) == [(CLUSTER, 3)]
    assert access.taken == 2
    done = every_second()
    assert access_extents(filled(), done, CLUSTER, size - CLUSTER, one=True) == [(CLUSTER, 1)]
    assert done.taken == 2


def test_an_extent_that_is_all_is_told_whole() -> None:
    size = CLUSTERS * CLUSTER
    for one in (False, True):
        assert dirty_extents(filled(), 100, size - 100, one=one) == [(size - 100, 1)]
        assert access_extents(filled(), filled(), 0, size, one=one) == [(size, 3)]


def test_without_one_every_run_is_told() -> None:
    size = CLUSTERS * CLUSTER
    runs = [(CLUSTER, 1 - index % 2) for index in range(CLUSTERS)]
    assert dirty_extents(every_second(), 0, size, one=False) == runs
    assert access_extents(every_second(), Bitmap(size, CLUSTER), 0, size, one=False) == runs


def test_an_answer_ends_with_the_extent_that_passed_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bit_status, "STATUS_EXTENTS_MAX", 4)
    size = CLUSTERS * CLUSTER
    assert len(dirty_extents(every_second(), 0, size, one=False)) == 5
    assert len(access_extents(every_second(), filled(), 0, size, one=False)) == 5
    assert len(access_extents(filled(), every_second(), 0, size, one=False)) == 5
