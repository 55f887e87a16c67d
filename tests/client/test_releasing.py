"""Which TRIMs are sent for which blocks: whole clusters, joined, once each."""

from __future__ import annotations

import pytest

from fleecenbd.client import releasing as module
from fleecenbd.client.plan import Plan
from fleecenbd.client.releasing import Releasing, joined
from fleecenbd.engine.bitmap import Bitmap
from tests.client.fakes import FakeSource

BLOCK = 4096


def _releasing(source: FakeSource, durable: Bitmap | None = None) -> Releasing:
    plan = Plan(source, durable or Bitmap(source.size, BLOCK), bitmap=None)
    return Releasing(source, plan, failed=lambda *_: None)


async def test_neighbours_are_released_by_one_trim() -> None:
    source = FakeSource(bytes(20 * BLOCK - 5), cluster=512)
    releasing = _releasing(source)
    releasing.add([(3, 1), (1, 2), (18, 2), (7, 1)])
    assert releasing.is_ready
    await releasing.release()
    assert sorted(source.trims) == [
        (BLOCK, 3 * BLOCK),
        (7 * BLOCK, BLOCK),
        (18 * BLOCK, 2 * BLOCK - 5),
    ]
    assert releasing.released == 6 * BLOCK - 5
    assert not releasing.is_ready


async def test_a_cluster_of_several_blocks_waits_for_the_last_of_them() -> None:
    source = FakeSource(bytes(10 * BLOCK), cluster=4 * BLOCK)
    releasing = _releasing(source)
    releasing.add([(0, 3)])
    await releasing.release()
    assert source.trims == []
    releasing.add([(3, 2)])
    await releasing.release()
    assert source.trims == [(0, 4 * BLOCK)]
    releasing.add([(5, 5)])
    await releasing.release()
    assert source.trims[1:] == [(4 * BLOCK, 6 * BLOCK)]


async def test_what_an_earlier_pull_made_durable_is_released_first() -> None:
    source = FakeSource(bytes(10 * BLOCK), cluster=BLOCK)
    durable = Bitmap(source.size, BLOCK)
    durable.bits[2:5] = 1
    releasing = _releasing(source, durable)
    assert releasing.is_ready
    await releasing.release()
    assert source.trims == [(2 * BLOCK, 3 * BLOCK)]


async def test_a_long_run_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIM_LENGTH_MAX", 4 * BLOCK)
    source = FakeSource(bytes(10 * BLOCK), cluster=BLOCK)
    releasing = _releasing(source)
    releasing.add([(0, 10)])
    await releasing.release()
    assert sorted(source.trims) == [
        (0, 4 * BLOCK),
        (4 * BLOCK, 4 * BLOCK),
        (8 * BLOCK, 2 * BLOCK),
    ]


def test_runs_are_sorted_and_neighbours_made_one() -> None:
    assert joined([(5, 1), (0, 2), (2, 3), (9, 1)]) == [(0, 6), (9, 1)]
