"""What a bitmap refuses; what it holds is in test_models.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fleecenbd.engine.bitmap import MAPPED_LENGTH_MIN, Bitmap, cluster_runs

CLUSTER = 4096


def test_the_smallest_disk_has_one_cluster() -> None:
    bitmap = Bitmap(1, CLUSTER, fill=True)
    assert (bitmap.size, bitmap.cluster_size, bitmap.shift, bitmap.clusters) == (1, CLUSTER, 12, 1)
    assert bitmap.count_bytes() == 1


def test_clusters_may_be_bytes() -> None:
    bitmap = Bitmap(5, 1)
    assert (bitmap.shift, bitmap.clusters) == (0, 5)


def test_a_disk_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte, not 0"):
        Bitmap(0, CLUSTER)


@pytest.mark.parametrize("cluster_size", [0, -4096, 3, 4097, 6144])
def test_a_cluster_size_that_is_no_power_of_two_is_refused(cluster_size: int) -> None:
    with pytest.raises(ValueError, match=f"{cluster_size} is not a power of two"):
        Bitmap(CLUSTER, cluster_size)


def test_a_buffer_is_not_filled() -> None:
    with pytest.raises(ValueError, match="fill must be left out"):
        Bitmap(CLUSTER, CLUSTER, fill=True, buffer=bytearray(1))


def test_a_buffer_has_exactly_the_length_that_the_bits_take() -> None:
    size = 9 * CLUSTER
    assert Bitmap.bitmap_length(size, CLUSTER) == 2
    assert Bitmap.bitmap_length(size - CLUSTER, CLUSTER) == 1
    assert Bitmap.bitmap_length(size - CLUSTER + 1, CLUSTER) == 2
    with pytest.raises(ValueError, match="a buffer of 8 bits cannot hold 9 clusters"):
        Bitmap(size, CLUSTER, buffer=bytearray(1))
    with pytest.raises(ValueError, match="a buffer of 3 bytes is not what"):
        Bitmap(size, CLUSTER, buffer=bytearray(3))
    assert Bitmap(size, CLUSTER, buffer=bytearray(2)).clusters == 9


def test_a_span_of_no_bytes_is_empty() -> None:
    bitmap = Bitmap(8 * CLUSTER, CLUSTER, fill=True)
    assert bitmap.span(3 * CLUSTER, 0) == (3, 3)
    assert not bitmap.any(3 * CLUSTER, 0)
    assert bitmap.all(3 * CLUSTER, 0)


def test_cluster_runs_stay_inside_of_what_is_asked() -> None:
    bits = Bitmap(8 * CLUSTER, CLUSTER, fill=True).bits
    bits[3] = 0
    assert list(cluster_runs(bits, 0, 8)) == [(0, 3), (4, 8)]
    assert list(cluster_runs(bits, 1, 6)) == [(1, 3), (4, 6)]
    assert list(cluster_runs(bits, 3, 4)) == []
    assert list(cluster_runs(bits, 0, 3)) == [(0, 3)]


def test_the_bytes_of_clusters_end_with_the_disk() -> None:
    bitmap = Bitmap(2 * CLUSTER + 100, CLUSTER)
    assert bitmap.bytes_of(1, 2) == (CLUSTER, CLUSTER)
    assert bitmap.bytes_of(1, 3) == (CLUSTER, CLUSTER + 100)


@pytest.mark.parametrize("more", [-8, -1, 0, 1, 5, 8])
@pytest.mark.parametrize("fill", [False, True])
def test_a_bitmap_with_memory_of_its_own_is_like_any_other(fill: bool, more: int) -> None:
    clusters = MAPPED_LENGTH_MIN * 8 + more
    size = clusters * CLUSTER - 1
    bitmap = Bitmap(size, CLUSTER, fill=fill)
    assert bitmap.clusters == clusters
    assert bitmap.count_bytes() == (size if fill else 0)
    assert bitmap.bits.count(1) == (clusters if fill else 0)  # nothing is set past the end
    bitmap.set(size - 1, 1)
    bitmap.clear(0, 1)
    assert bitmap.bits[clusters - 1] == 1
    assert bitmap.bits[0] == 0
    assert list(bitmap.runs(0, 2 * CLUSTER)) == (
        [(0, CLUSTER, False), (CLUSTER, CLUSTER, True)] if fill else [(0, 2 * CLUSTER, False)]
    )


RESIDENT = """
import sys
from fleecenbd.engine.bitmap import Bitmap
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
bitmap = Bitmap(64 << 20, 1, fill=sys.argv[1] == "filled")
print(resident() - before)
"""


def test_memory_of_a_clear_bitmap_is_taken_as_it_is_written() -> None:
    def resident(how: str) -> int:
        command = [sys.executable, "-c", RESIDENT, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert resident("filled") > 7 << 20
    assert resident("clear") < 1 << 20
