"""Checksums of blocks that come in any order, and what docs/pull.md says of them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from fleecenbd.client.checksums import BLOCK_SIZE, Checksums, algorithms, checksum_text
from tests.client.fakes import FakeSource
from tests.client.test_pull import Pulling, content
from tests.durability.recomputed import recomputed


async def test_pieces_and_zeroes_are_as_the_bytes_they_stand_for() -> None:
    sums = Checksums("sha256", 3 << 20)
    data = random.Random(1).randbytes(100_000)
    whole = data + bytes(3_000_000) + data
    assert await sums.of([data, 3_000_000, data]) == hashlib.sha256(whole).digest()
    assert sums.of_zeroes(BLOCK_SIZE) == hashlib.sha256(bytes(BLOCK_SIZE)).digest()


def test_the_root_takes_a_block_without_digest_for_zeroes() -> None:
    size = 2 * BLOCK_SIZE + 5
    sums = Checksums("blake2b", size)
    digests = {0: hashlib.blake2b(b"a").digest()}
    expected = hashlib.blake2b(digests[0])
    expected.update(hashlib.blake2b(bytes(BLOCK_SIZE)).digest())
    expected.update(hashlib.blake2b(bytes(5)).digest())
    assert sums.root(range(3), digests) == expected.hexdigest()


def test_those_there_are_have_a_length_of_their_own() -> None:
    assert {"blake2b", "sha256", "sha3_256"} <= set(algorithms())
    assert not any(name.startswith("shake") for name in algorithms())
    with pytest.raises(OSError, match="there is no checksum 'md4'"):
        Checksums("md4", 1)


def test_the_file_is_text_with_a_word_a_line() -> None:
    assert checksum_text("sha256", 9, "ab", None) == (
        "fleecenbd checksum 1\nalgorithm sha256\nblock 1048576\nsize 9\nroot ab\n"
    )
    assert checksum_text("sha256", 9, "ab", [(0, 4), (8, 1)]).endswith(
        "root ab\nrange 0 4\nrange 8 1\n"
    )


async def test_anyone_can_compute_it_anew_with_the_lines_in_the_docs(tmp_path: Path) -> None:
    pulling = Pulling(tmp_path / "vm.raw", FakeSource(content(4, extra=777)))
    done = await pulling(checksum="sha256")
    assert done.checksum is not None
    written = tmp_path / "vm.raw.sha256"
    assert f"root {done.checksum.root}\n" in written.read_text()
    assert recomputed(written, pulling.path) == done.checksum.root
    damaged = bytearray(pulling.path.read_bytes())
    damaged[-1] ^= 1
    pulling.path.write_bytes(damaged)
    assert recomputed(written, pulling.path) != done.checksum.root


async def test_a_bitmap_s_checksum_is_of_its_ranges_and_of_nothing_else(tmp_path: Path) -> None:
    source = FakeSource(content(5))
    source.contexts |= {"qemu:dirty-bitmap:monday"}
    source.dirty = {0, 1, 255, 256, 257, 300, *range(600, 900)}
    pulling = Pulling(tmp_path / "vm.raw", source)
    done = await pulling(bitmap="monday", checksum="blake2b")
    assert done.checksum is not None
    written = tmp_path / "vm.raw.blake2b"
    assert recomputed(written, pulling.path) == done.checksum.root
    other = bytearray(pulling.path.read_bytes())
    other[4096 * 2] ^= 1  # not dirty
    pulling.path.write_bytes(other)
    assert recomputed(written, pulling.path) == done.checksum.root
    other[4096 * 300] ^= 1
    pulling.path.write_bytes(other)
    assert recomputed(written, pulling.path) != done.checksum.root
