"""The source of a pull: a fleecing export of ours, or somebody else's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecenbd.client.endpoints import SourceLost
from fleecenbd.client.source import open_source
from tests.disks import MIB, copy_disk, make_disk
from tests.serving import Serving, serving

SIZE = 8 * MIB + 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "vm.raw", SIZE)


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Serving]:
    with serving(tmp_path, disk, "--begin", "n") as server:
        yield server


async def test_a_fleecing_export_is_read_mapped_and_released(
    server: Serving, disk: Path, tmp_path: Path
) -> None:
    before = copy_disk(disk, tmp_path / "before.raw").read_bytes()
    source = await open_source(server.uri("vm@n"))
    assert source.size == SIZE
    assert source.cluster == 65536
    assert source.can_trim
    assert source.session_id is not None
    assert f"session n {source.session_id}" in await description(source)
    assert await source.pread(SIZE - 70000, 70000) == before[-70000:]
    await source.trim(0, 65536)
    access = await source.extents("x-fleecenbd:access", 4096, SIZE - 4096)
    assert access == [(61440, 0), (SIZE - 65536, 1)]
    with pytest.raises(OSError, match="was released by a TRIM") as caught:
        await source.pread(0, 4096)
    assert caught.value.errno == errno.EINVAL
    assert not isinstance(caught.value, SourceLost)
    await source.close()


async def description(source: object) -> str:
    text: str = source._client.facts.description  # type: ignore[attr-defined]
    return text


async def test_a_guests_export_is_never_trimmed(server: Serving) -> None:
    source = await open_source(server.uri("vm"))
    assert source.session_id is None
    assert not source.can_trim
    assert "x-fleecenbd:access" not in source.contexts
    await source.close()


async def test_an_export_that_is_not_there_is_lost_with_the_servers_text(server: Serving) -> None:
    with pytest.raises(SourceLost, match="there is no export called 'vm@other'"):
        await open_source(server.uri("vm@other"))
