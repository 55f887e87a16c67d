"""Images that change their size while they are open: what a device then refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fleecenbd.storage.device import Resizable
from fleecenbd.storage.direct import DirectDevice
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.filesystem import Medium

SIZE = 1 << 20


@pytest.mark.parametrize("kind", ["cached", "slow", "memory", "direct"])
async def test_changes_beyond_the_end_are_refused_and_nothing_else(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * SIZE)
    if kind == "direct":
        device: FileDevice = DirectDevice.open(path)
    else:
        device = FileDevice(os.open(path, os.O_RDWR), str(path), medium=Medium[kind.upper()])
    assert isinstance(device, Resizable)
    writes_now = device.pwrite_now
    os.truncate(path, SIZE // 2)
    assert await device.present_size() == SIZE // 2
    device.limit(SIZE // 2)
    data = b"y" * 8192
    for offset in (SIZE // 2 - 1, SIZE // 2, SIZE - 8192):
        for call in (
            device.pwrite(offset, data),
            device.zero(offset, 8192),
            device.trim(offset, 8192),
        ):
            with pytest.raises(OSError, match=f"ends at {SIZE // 2} now") as refused:
                await call
            assert refused.value.errno == errno.EIO
        with pytest.raises(OSError, match="ends at"):
            device.pwrite_now(offset, data)
        with pytest.raises(OSError, match="shrank"):
            await device.pread(offset, 8192)
    await device.pwrite(SIZE // 2 - 8192, data)
    assert await device.pread(SIZE // 2 - 8192, 8192) == data
    await device.trim(SIZE // 2 - 4096, 4096)
    assert await device.present_size() == SIZE // 2
    device.limit(SIZE // 4)
    with pytest.raises(OSError, match=f"ends at {SIZE // 4} now"):
        await device.pwrite(SIZE // 4, data)
    os.truncate(path, SIZE)
    device.limit(None)
    assert device.pwrite_now == writes_now, "as fast as before"
    await device.pwrite(SIZE - 8192, data)
    assert await device.pread(SIZE - 8192, 8192) == data
    device.close()
    await device.wait_closed()
    with pytest.raises(OSError, match="closed"):
        await device.present_size()
