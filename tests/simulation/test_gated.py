"""The gated device: what it leaves behind when the test lets a call fail."""

from __future__ import annotations

import asyncio
import errno

import pytest

from .gated import GatedDevice
from .loop import simulate

BLOCK = 4096


def test_a_write_that_fails_leaves_garbage_that_is_neither_old_nor_new() -> None:
    async def main() -> None:
        old, new = b"\x11" * BLOCK, b"\x77" * BLOCK
        device = GatedDevice("d", 2 * BLOCK, old * 2)
        device.gate("write")
        write = asyncio.ensure_future(device.pwrite(0, new))
        (await device.reached("write")).fail(errno.ENOSPC)
        with pytest.raises(OSError, match="write failed by the test") as caught:
            await write
        assert caught.value.errno == errno.ENOSPC
        assert device.content[:BLOCK] not in (old, new, bytes(BLOCK))
        assert device.content[BLOCK:] == old

    simulate(main())
