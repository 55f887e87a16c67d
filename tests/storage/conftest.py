"""Tests of what drives sockets by itself run twice: under uvloop, and under asyncio's own loop."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

TWICE = ("test_nbd_client.py", "test_nbd_reconnect.py")


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.name in TWICE:
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
    return {"asyncio": asyncio.SelectorEventLoop}
