"""A qemu-storage-daemon of ours: who is cancelled leaves none."""

from __future__ import annotations

import asyncio

from fleecenbd.storage.qemu import QemuChild


async def test_a_start_that_is_cancelled_leaves_no_child() -> None:
    child = QemuChild("image")
    starting = asyncio.ensure_future(child.start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert child._process is not None, "who is known can be ended"
    await child.kill()
    assert child._process.returncode is not None
