"""What is to be copied: every byte that is wanted and not durable, once, in order."""

from __future__ import annotations

import asyncio
import random

import pytest

from fleecenbd.client import plan as module
from fleecenbd.client.plan import DIRTY, Item, Plan, Windows, overlay
from fleecenbd.engine.bitmap import Bitmap
from tests.client.fakes import UNIT, FakeSource

BLOCK = 64 << 10


async def _items(plan: Plan) -> list[Item]:
    await plan.scan()
    mapping = asyncio.create_task(plan.map())
    found = []
    while (item := await plan.next()) is not None:
        found.append(item)
    await mapping
    return found


def _disk(dice: random.Random, blocks: int) -> bytes:
    parts = []
    for _ in range(blocks * BLOCK // UNIT):
        parts.append(dice.randbytes(UNIT) if dice.random() < 0.4 else bytes(UNIT))
        if dice.random() < 0.05:
            parts += [bytes(UNIT)] * 40
    return b"".join(parts)[: blocks * BLOCK - 777]


@pytest.mark.parametrize("align", [1, 16 << 10])
@pytest.mark.parametrize("bitmap", [None, "monday"])
@pytest.mark.parametrize("seed", range(8))
async def test_items_cover_what_is_wanted_and_not_durable_exactly_once(
    seed: int, bitmap: str | None, align: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUNS_AHEAD_MAX", 5)
    monkeypatch.setattr(module, "WINDOW_LENGTH", BLOCK + UNIT)
    monkeypatch.setattr(module, "WINDOW_LENGTH_MIN", BLOCK - UNIT)
    monkeypatch.setattr(module, "ZERO_LENGTH_MIN", 2 * UNIT)
    monkeypatch.setattr(module, "ZERO_BLOCKS_MAX", 3)
    dice = random.Random(seed)
    source = FakeSource(_disk(dice, 20))
    if bitmap is not None:
        source.contexts |= {f"{DIRTY}{bitmap}"}
        source.dirty = {u for u in range(20 * 16) if dice.random() < 0.6}
    durable = Bitmap(source.size, BLOCK)
    for block in range(20):
        durable.bits[block] = dice.random() < 0.3
    plan = Plan(source, durable, bitmap=bitmap, align=align)
    seen = [0] * source.size
    last = -1
    for item in await _items(plan):
        assert item.first > last
        last = item.first + item.count - 1
        assert not durable.bits[item.first : last + 1].any()
        for offset, length in item.data:
            seen[offset : offset + length] = [1] * length
            assert item.count == 1
        for offset, length in item.zeroes:
            seen[offset : offset + length] = [2] * length
            assert not any(source.content[offset : offset + length])
            if item.data:
                assert length >= 2 * UNIT
        assert item.wanted == sum(length for _, length in item.data + item.zeroes)
    for unit in range(-(-source.size // UNIT)):
        found = set(seen[unit * UNIT : (unit + 1) * UNIT])
        if durable.bits[unit * UNIT // BLOCK] or (bitmap and unit not in source.dirty):
            assert found == {0}
        elif any(source.content[unit * UNIT : (unit + 1) * UNIT]):
            assert found == {1}
        else:
            assert found in ({1}, {2})
    assert plan.data_left == 0
    wanted = source.size if bitmap is None else sum(_length(source, u) for u in source.dirty)
    assert plan.to_copy == wanted
    assert plan.to_copy - plan.resumed == sum(1 for what in seen if what)


def _length(source: FakeSource, unit: int) -> int:
    return min(UNIT, source.size - unit * UNIT)


async def test_what_is_read_begins_and_ends_at_multiples_of_align() -> None:
    dice = random.Random(1)
    source = FakeSource(_disk(dice, 20))
    plan = Plan(source, Bitmap(source.size, BLOCK), bitmap=None, align=16 << 10)
    for item in await _items(plan):
        for offset, length in item.data:
            assert offset % (16 << 10) == 0
            assert (offset + length) % (16 << 10) == 0 or offset + length == source.size


async def test_many_blocks_of_zeroes_are_one_item_up_to_what_is_durable() -> None:
    source = FakeSource(bytes(20 * BLOCK))
    durable = Bitmap(source.size, BLOCK)
    durable.bits[7] = 1
    items = await _items(Plan(source, durable, bitmap=None))
    assert [(item.first, item.count) for item in items] == [(0, 7), (8, 12)]
    assert all(item.data == [] for item in items)


async def test_how_much_data_is_left_is_known_early_and_exactly_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RUNS_AHEAD_MAX", 10)
    monkeypatch.setattr(module, "WINDOW_LENGTH", BLOCK)
    monkeypatch.setattr(module, "WINDOW_LENGTH_MIN", BLOCK)
    monkeypatch.setattr(module, "WINDOW_LENGTH_MAX", BLOCK)
    half = b"".join((b"x" * UNIT, bytes(UNIT))) * (20 * BLOCK // UNIT // 2)
    source = FakeSource(half)
    plan = Plan(source, Bitmap(source.size, BLOCK), bitmap=None)
    await plan.scan()
    assert plan.data_left == source.size
    mapping = asyncio.create_task(plan.map())
    await plan.next()
    assert plan.data_left == source.size // 2 - BLOCK // 2  # as dense as so far
    mapping.cancel()


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_wanted_of_a_range_is_counted(seed: int) -> None:
    dice = random.Random(seed)
    units = 3 * (1 << 20) // UNIT
    source = FakeSource(bytes(units * UNIT + 100), contexts=(f"{DIRTY}b",))
    source.dirty = {unit for unit in range(units + 1) if dice.random() < 0.3}
    plan = Plan(source, Bitmap(source.size, 1 << 20), bitmap="b")
    await plan.scan()
    for _ in range(50):
        start, end = sorted(dice.randrange(source.size + 1) for _ in range(2))
        expected = sum(
            max(0, min(end, unit * UNIT + _length(source, unit)) - max(start, unit * UNIT))
            for unit in source.dirty
        )
        assert plan.wanted_bytes(start, end - start) == expected


def test_a_window_shrinks_where_extents_are_many_and_grows_where_they_are_few() -> None:
    windows = Windows()
    first = windows.length
    windows.saw(module.WINDOW_EXTENTS + 1)
    assert windows.length == first // 2
    windows.saw(module.WINDOW_EXTENTS // 2)
    assert windows.length == first // 2
    windows.saw(0)
    windows.saw(0)
    assert windows.length == first * 2
    for _ in range(50):
        windows.saw(0)
    assert windows.length == module.WINDOW_LENGTH_MAX
    for _ in range(50):
        windows.saw(1 << 30)
    assert windows.length == module.WINDOW_LENGTH_MIN


def test_maps_laid_over_each_other_change_where_one_of_them_does() -> None:
    one, other = [(4, 0), (4, 1)], [(2, 7), (3, 8), (3, 7)]
    assert list(overlay(one, other)) == [(2, (0, 7)), (2, (0, 8)), (1, (1, 8)), (3, (1, 7))]
    assert list(overlay(one)) == [(4, (0,)), (4, (1,))]
