"""What a device over NBD does beyond the contract suite."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from fleecenbd.storage.remote import RemoteDevice


class Client:
    """An NbdClient whose flushes and writes end when they are told to."""

    def __init__(self) -> None:
        self.size = 1 << 20
        self.generation = 0
        self.is_connected = True
        self.facts = SimpleNamespace(block_size_min=1, contexts=frozenset())
        self.waiting: list[asyncio.Future[None]] = []

    async def _wait(self, *_words: Any) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        await future

    flush = pwrite = _wait

    def close(self) -> None:
        """Nothing."""

    async def wait_closed(self) -> None:
        """Nothing."""

    async def end(self, error: OSError | None = None) -> None:
        """The oldest call."""
        future = self.waiting.pop(0)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        await _settle()


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def _begun(call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(call)
    await _settle()
    return task


async def test_a_flush_is_not_needed_only_where_everything_is_durable() -> None:
    client = Client()
    device = RemoteDevice(client, "r")  # type: ignore[arg-type]
    assert device.flush_now()
    write = await _begun(device.pwrite(0, b"x"))
    assert not device.flush_now()
    await client.end()
    await write
    first = await _begun(device.flush())
    assert not device.flush_now(), "one that is on its way has made nothing durable yet"
    await client.end()
    await first
    assert device.flush_now()
    write = await _begun(device.pwrite(0, b"x"))
    flush = await _begun(device.flush())
    await client.end()
    await client.end()
    await asyncio.gather(write, flush)
    assert not device.flush_now(), "the write ended after the flush had begun"
    flush = await _begun(device.flush())
    await client.end(OSError(5, "no"))
    with pytest.raises(OSError, match="no"):
        await flush
    assert not device.flush_now()


async def test_a_connection_that_was_lost_before_a_flush_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client()
    device = RemoteDevice(client, "r")  # type: ignore[arg-type]
    for lost, is_told in ((0, False), (1, True), (0, False)):
        caplog.clear()
        write = await _begun(device.pwrite(0, b"x"))
        await client.end()
        await write
        client.generation += lost
        flush = await _begun(device.flush())
        await client.end()
        await flush
        assert ("a connection was lost since it was flushed last" in caplog.text) is is_told


async def test_what_hangs_does_not_keep_a_device_from_being_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleecenbd.storage.remote.CLOSE_S", 0.01)
    client = Client()
    device = RemoteDevice(client, "r")  # type: ignore[arg-type]
    write = await _begun(device.pwrite(0, b"x"))
    device.close()
    await device.wait_closed()
    write.cancel()
