"""Servers that the tests of a module share, each a process of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disks import copy_disk, make_disk
from tests.serving import Serving, serving
from tests.wire.errno_table import SIZE


@dataclass(frozen=True)
class Served:
    """Disk ``vm`` with session ``n``: ``read_only`` or not."""

    server: Serving
    disk: Path
    before: Path
    """What the disk held when the session was armed."""

    @property
    def path(self) -> Path:
        """Of the socket."""
        return self.server.unix


def _served(directory: Path, *options: str) -> Iterator[Served]:
    disk = make_disk(directory / "vm.raw", SIZE)
    before = copy_disk(disk, directory / "before.raw")
    with serving(directory, disk, "--begin", "n", *options) as server:
        yield Served(server, disk, before)


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory.mktemp("writable"))


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory.mktemp("read_only"), "--read-only")
