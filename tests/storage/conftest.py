"""Tests of what drives sockets by itself run twice: under uvloop, and under asyncio's own loop."""

import asyncio
import gc
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests.descriptors import no_new_descriptor, open_descriptors

TWICE = ("test_nbd_client.py", "test_nbd_reconnect.py")


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.name in TWICE:
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
    return {"asyncio": asyncio.SelectorEventLoop}


@pytest.fixture(autouse=True)
def no_descriptor_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever such a test does, it leaves no socket behind."""
    if request.path.name not in TWICE:
        yield
        return
    uvloop.new_event_loop().close()  # the first one opens what all share
    with no_new_descriptor():
        before = open_descriptors()
        yield
        if open_descriptors().keys() - before.keys():
            gc.collect()  # a test's own frames
