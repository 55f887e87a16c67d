"""Zeroes within data, and what a target is told of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecenbd.client.block_io import ZERO_RUN, BlockIO, data_runs
from fleecenbd.client.plan import Item
from fleecenbd.client.rate import Rate
from tests.client.fakes import FakeSource

K = 1024


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(0, 5000),
    st.sampled_from([ZERO_RUN, 4 * ZERO_RUN]),
)
def test_runs_cover_the_data_and_zeroes_are_zeroes(
    shape: list[tuple[bool, int]], tail: int, zero_min: int
) -> None:
    data = b"".join((b"x" if full else b"\0") * ZERO_RUN * count for full, count in shape)
    data += bytes(tail)
    position = 0
    for start, length, is_data in data_runs(data, zero_min):
        assert start == position
        position += length
        if not is_data:
            assert data[start : start + length] == bytes(length)
            assert length >= zero_min
    assert position == len(data)


class Noting:
    """A target that notes what it is told."""

    name = "t"
    requests = 4
    write_unit = 1

    def __init__(self, *, is_zero: bool) -> None:
        self.is_zero = is_zero
        self.told: list[tuple[str, int, int]] = []

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Noted."""
        self.told.append(("write", offset, len(data)))

    async def zero(self, offset: int, length: int) -> None:
        """Noted."""
        self.told.append(("zero", offset, length))

    async def pread(self, offset: int, length: int) -> bytes:
        """Nobody asks."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Nothing."""

    complete = keep = discard = flush


@pytest.mark.parametrize("is_zero", [True, False])
async def test_a_target_that_is_zero_is_told_of_data_only(is_zero: bool) -> None:
    dice = random.Random(1)
    content = dice.randbytes(64 * K) + bytes(128 * K) + dice.randbytes(4 * K) + bytes(60 * K)
    source, target = FakeSource(content), Noting(is_zero=is_zero)
    io = BlockIO(source, target, Rate())
    item = Item(0, 1, [(0, 256 * K)], [(256 * K, 4096 * K)])
    parts = await io.read_item(item)
    assert io.read == 256 * K
    await io.write_parts(parts)
    data = [("write", 0, 64 * K), ("write", 192 * K, 4 * K)]
    if is_zero:
        assert sorted(target.told) == data
    else:
        assert ("zero", 64 * K, 128 * K) in target.told
        assert ("zero", 256 * K, 4096 * K) in target.told
        assert sum(length for _, _, length in target.told) == 256 * K + 4096 * K


async def test_reads_are_cut_and_put_together_in_order() -> None:
    content = random.Random(2).randbytes(100 * K)
    source = FakeSource(content)
    io = BlockIO(source, Noting(is_zero=True), Rate(), read_length=16 * K)
    parts = await io.read_item(Item(0, 1, [(0, 100 * K)], []))
    assert b"".join(piece for _, piece in parts if not isinstance(piece, int)) == content
    assert max(length for _, length in source.reads) == 16 * K


async def test_too_few_bytes_are_an_error() -> None:
    source = FakeSource(bytes(100 * K))
    source.content = source.content[: 50 * K]
    io = BlockIO(source, Noting(is_zero=True), Rate())
    with pytest.raises(OSError, match="51200 bytes came for 102400 at 0"):
        await io.read_item(Item(0, 1, [(0, 100 * K)], []))
