"""What the tests with other people's clients share. A missing tool is an error, never a skip."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from tests.disks import KIB, MIB, copy_disk, make_disk
from tests.serving import Serving, connected, serving

TOOLS = (
    "nbdcopy",
    "nbdinfo",
    "nbdsh",
    "qemu-img",
    "qemu-io",
    "qemu-storage-daemon",
    "fio",
    "nbdkit",
)

OVERWRITTEN = b"\xc3"


@pytest.fixture(scope="session", autouse=True)
def _every_tool_is_there() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


@dataclass(frozen=True)
class Fleeced:
    """A disk `vm` under session `nightly`, and a copy of what it held when that was armed."""

    server: Serving
    disk: Path
    before: Path
    size: int

    @property
    def guest(self) -> str:
        """URI of the guest export."""
        return self.server.uri("vm")

    @property
    def backup(self) -> str:
        """URI of the fleecing export."""
        return self.server.uri("vm@nightly")


@pytest.fixture
def fleeced(tmp_path: Path) -> Iterator[Fleeced]:
    """A disk of 8 MiB and 512 bytes that the guest has partly overwritten since it was armed."""
    size = 8 * MIB + 512
    disk = make_disk(tmp_path / "vm.raw", size)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly", tcp=True) as server:
        with connected(server.uri("vm")) as guest:
            overwrite(guest, [(0, 70 * KIB), (3 * MIB + 5, 200 * KIB), (size - 512, 512)])
        yield Fleeced(server, disk, before, size)


def overwrite(guest: nbd.NBD, ranges: list[tuple[int, int]]) -> None:
    """Fill (offset, length) ranges with a byte that no disk of make_disk() repeats like that."""
    for offset, length in ranges:
        guest.pwrite(OVERWRITTEN * length, offset)


def extents(handle: nbd.NBD, context: str, length: int, offset: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of each extent of a meta context over a range, neighbours merged."""
    merged: list[tuple[int, int]] = []

    def collect(name: str, _at: int, entries: list[int], _error: object) -> int:
        if name == context:
            for piece, flags in zip(entries[::2], entries[1::2], strict=True):
                if merged and merged[-1][1] == flags:
                    piece += merged.pop()[0]
                merged.append((piece, flags))
        return 0

    end = offset + length
    while offset < end:
        before = sum(piece for piece, _ in merged)
        handle.block_status(end - offset, offset, collect)
        covered = sum(piece for piece, _ in merged) - before
        assert covered > 0, f"no progress at {offset}"
        offset += covered
    return merged
