"""A session whose temp image shares blocks with the disk: XFS and btrfs, from the command's end."""

import os
import random
from pathlib import Path

import pytest

from tests.disks import MIB
from tests.mounts import CAN_MOUNT, blocks, mounted
from tests.serving import FLEECENBD, connected, run, serving

pytestmark = pytest.mark.skipif(not CAN_MOUNT, reason="needs root and loop devices")

SIZE = 32 * MIB + 512
HOLE = range(8 * MIB, 12 * MIB)
LONG = [(0, MIB), (2 * MIB, 512 << 10), (20 * MIB + 4096, MIB)]
BEGIN = ("--begin", "nightly", "--temp-reserve", "none")
"""On file systems that are smaller than the reserve is by default."""
"""(offset, length) of guest writes over data, of whole clusters, that are long enough to clone."""


def _temp_image(state: Path) -> Path:
    """The only file in the state directory that is as long as the disk."""
    (found,) = (path for path in state.rglob("*") if path.is_file() and path.stat().st_size >= SIZE)
    return found


def _make_disk(path: Path) -> bytes:
    """An image of data with a hole in it, all of it on the disk."""
    dice = random.Random(1)
    content = bytearray(dice.randbytes(SIZE))
    content[HOLE.start : HOLE.stop] = bytes(len(HOLE))
    with path.open("wb") as image:
        image.write(content[: HOLE.start])
        image.seek(HOLE.stop)
        image.write(content[HOLE.stop :])
        image.flush()
        os.fsync(image.fileno())
    return bytes(content)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_backup_over_shared_blocks_is_the_disk_at_its_moment(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path) as folder:
        image = folder / "vda.raw"
        content = _make_disk(image)
        places = blocks(image)
        with serving(folder, f"vda={image}", *BEGIN) as server:
            dice = random.Random(2)
            with connected(server.uri("vda")) as guest:
                for offset, length in LONG:
                    guest.pwrite(dice.randbytes(length), offset)
                # Over the hole and data on both sides; short ones; the last, partial cluster.
                for offset, length in [
                    (HOLE.start - MIB, MIB + (256 << 10)),
                    (HOLE.stop - 65536, MIB),
                    (24 * MIB + 100, 5000),
                    (SIZE - MIB, MIB),
                ]:
                    guest.pwrite(dice.randbytes(length), offset)
                guest.zero(MIB, 28 * MIB)
                guest.flush()
            shared = blocks(_temp_image(folder / "state"))
            for offset, length in LONG:
                for block in range(offset // 4096, (offset + length) // 4096):
                    assert shared[block] == places[block]
            assert not any(HOLE.start <= block * 4096 < HOLE.stop for block in shared)
            target = tmp_path / "backup.raw"
            run(FLEECENBD, "pull", server.uri("vda@nightly"), target)
            assert target.read_bytes() == content
            assert image.read_bytes() != content


def test_where_no_blocks_are_shared_the_session_is_none_the_worse(tmp_path: Path) -> None:
    """The disk on XFS, its temp image on another."""
    with mounted("xfs", tmp_path) as folder, mounted("xfs", tmp_path, "other") as other:
        image = other / "vda.raw"
        content = _make_disk(image)
        with serving(folder, f"vda={image}", *BEGIN) as server:
            with connected(server.uri("vda")) as guest:
                for offset, length in LONG:
                    guest.pwrite(bytes(length), offset)
            with connected(server.uri("vda@nightly")) as backup:
                for offset, length in LONG:
                    assert backup.pread(length, offset) == content[offset : offset + length]


def test_while_space_is_short_the_temp_image_has_blocks_of_its_own(tmp_path: Path) -> None:
    """A guest's write to shared blocks takes new ones, which might not be there."""
    with mounted("xfs", tmp_path) as folder:
        image = folder / "vda.raw"
        content = _make_disk(image)
        room = os.statvfs(folder)
        with (folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - 48 * MIB)
        places = blocks(image)
        with serving(folder, f"vda={image}", *BEGIN) as server:
            with connected(server.uri("vda")) as guest:
                for offset, length in LONG:
                    guest.pwrite(bytes(length), offset)
                guest.flush()
            assert not set(places.values()) & set(blocks(_temp_image(folder / "state")).values())
            assert blocks(image) == places
            with connected(server.uri("vda@nightly")) as backup:
                for offset, length in LONG:
                    assert backup.pread(length, offset) == content[offset : offset + length]
