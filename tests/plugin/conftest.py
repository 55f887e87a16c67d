"""What the tests of the plugin share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behind_nbdkit import behind_nbdkit
from tests.disks import MIB, copy_disk, make_disk
from tests.serving import Serving

SIZE = 2 * MIB + 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image of SIZE bytes; ``before.raw`` beside it is a copy."""
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    copy_disk(disk, tmp_path / "before.raw")
    return disk


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Serving]:
    """It behind nbdkit, with session n."""
    with behind_nbdkit(tmp_path, disk, "--begin", "n") as server:
        yield server
