"""Reading the target back, and comparing it with what was read from the source."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

from fleecenbd.client.checksums import Checksums
from fleecenbd.client.endpoints import Target
from fleecenbd.client.plan import Plan
from fleecenbd.client.together import together

AT_A_TIME = 8
"""Blocks."""


class Differs(OSError):
    """What was read back is not what was written."""

    def __init__(self, name: str, blocks: Sequence[int], first: int) -> None:
        """``first``: the offset of the first wrong byte's block."""
        count = len(blocks)
        super().__init__(
            errno.EIO,
            f"read back, it is not what was written: it differs first in the MiB that begins at "
            f"{first}"
            + (f", and in {count - 1} others" if count > 1 else "")
            + "; its disk, or what is before it, loses data",
            name,
        )
        self.blocks = tuple(blocks)


async def verify(
    target: Target, plan: Plan, checksums: Checksums, digests: Mapping[int, bytes]
) -> None:
    """Compare every block that is wanted with its digest; one without is zeroes.

    Raises Differs once all were compared.
    """
    wrong: dict[int, int] = {}
    """Offsets of blocks."""
    waiting: list[tuple[int, list[tuple[int, int]]]] = []
    for block in wanted_blocks(plan):
        waiting.append(block)
        if len(waiting) == AT_A_TIME:
            await _verify(target, checksums, digests, waiting, wrong)
            waiting = []
    await _verify(target, checksums, digests, waiting, wrong)
    if wrong:
        blocks = sorted(wrong)
        raise Differs(target.name, blocks, wrong[blocks[0]])


async def _verify(
    target: Target,
    checksums: Checksums,
    digests: Mapping[int, bytes],
    blocks: Sequence[tuple[int, list[tuple[int, int]]]],
    wrong: dict[int, int],
) -> None:
    async def compare(block: int, ranges: list[tuple[int, int]]) -> None:
        pieces = [await target.pread(offset, length) for offset, length in ranges]
        expected = digests.get(block)
        if expected is None:
            expected = checksums.of_zeroes(sum(length for _, length in ranges))
        if await checksums.of(pieces) != expected:
            wrong[block] = ranges[0][0]

    await together(compare(block, ranges) for block, ranges in blocks)


def wanted_blocks(plan: Plan) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each block that is wanted, with (offset, length) of what is wanted of it, in order."""
    size = plan.block_size
    if plan.dirty is None:
        for block in range(plan.durable.clusters):
            yield block, [plan.durable.bytes_of(block, block + 1)]
        return
    block = -1
    ranges: list[tuple[int, int]] = []
    for offset, length in zip(plan.dirty[::2], plan.dirty[1::2], strict=True):
        end = offset + length
        while offset < end:
            if offset // size != block:
                if ranges:
                    yield block, ranges
                block, ranges = offset // size, []
            stop = min(end, (block + 1) * size)
            ranges.append((offset, stop - offset))
            offset = stop
    if ranges:
        yield block, ranges
