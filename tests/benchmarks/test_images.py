"""Images for the benchmarks, and the page cache."""

import os
from pathlib import Path

import pytest

from benchmarks import images
from benchmarks.images import NOISE_LENGTH, RESIDENT_MAX, drop, file_system, make_image, warm


def test_an_image_has_the_size_that_was_asked_for_and_no_block_of_zeroes(tmp_path: Path) -> None:
    size = 2 * NOISE_LENGTH + 5 * 4096
    path = tmp_path / "vm.raw"
    make_image(path, size)
    content = path.read_bytes()
    assert len(content) == size
    blocks = {content[offset : offset + 4096] for offset in range(0, size, 4096)}
    assert bytes(4096) not in blocks
    # A turn by one byte makes every block another one.
    assert len(blocks) == size // 4096


def test_a_warm_image_is_in_the_page_cache_and_a_dropped_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    make_image(path, 4 << 20)
    if file_system(tmp_path) == "tmpfs":
        with pytest.raises(RuntimeError, match="stays in the page cache"):
            drop(path)
        return
    warm(path)
    assert images.resident(path) > 0.9
    drop(path)
    assert images.resident(path) <= RESIDENT_MAX


def test_an_image_in_memory_cannot_be_made_cold() -> None:
    path = Path(f"/dev/shm/fleecenbd-test-{os.getpid()}.raw")
    assert file_system(path.parent) == "tmpfs"
    try:
        make_image(path, 1 << 20)
        with pytest.raises(RuntimeError, match="use a disk's folder"):
            drop(path)
    finally:
        path.unlink()


def test_the_file_system_of_a_mount_below_another_is_the_inner_one() -> None:
    assert file_system(Path("/proc/self")) == "proc"
