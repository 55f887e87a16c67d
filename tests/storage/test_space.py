"""Zeroing and freeing: which calls are made, and what happens where they are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fleecenbd.storage import system_calls
from fleecenbd.storage.space import PUNCH, ZERO, Space

SIZE = 1 << 20


class Kernel:
    """fallocate's answers: zeroes for the modes that it knows, ENOTSUP for others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.knows = {PUNCH, ZERO}
        self.calls: list[tuple[int, int, int]] = []
        monkeypatch.setattr(system_calls, "fallocate", self.fallocate)

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int, name: str) -> None:
        self.calls.append((mode, offset, length))
        if mode not in self.knows:
            raise OSError(errno.ENOTSUP, "Operation not supported", name)
        os.pwrite(descriptor, bytes(length), offset)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    path = tmp_path / "image"
    path.write_bytes(b"\xff" * SIZE)
    return os.open(path, os.O_RDWR)


def file_space(descriptor: int) -> Space:
    return Space(descriptor, "disk")


def block_space(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> Space:
    monkeypatch.setattr(system_calls, "block_size", lambda descriptor: 4096)
    return Space(descriptor, "disk")


def zeroed(descriptor: int, offset: int, length: int) -> bool:
    """Whether the range is zero, and nothing else."""
    expected = b"\xff" * offset + bytes(length) + b"\xff" * (SIZE - offset - length)
    return os.pread(descriptor, SIZE, 0) == expected


def test_a_file_is_punched_where_its_space_may_go(descriptor: int, kernel: Kernel) -> None:
    file_space(descriptor).zero(100, 9000, True, True)
    assert kernel.calls == [(PUNCH, 100, 9000)]
    assert zeroed(descriptor, 100, 9000)


def test_a_file_keeps_its_space_where_it_may_not_go(descriptor: int, kernel: Kernel) -> None:
    file_space(descriptor).zero(100, 9000, False, True)
    assert kernel.calls == [(ZERO, 100, 9000)]


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_that_cannot_be_punched_is_zeroed_otherwise(
    descriptor: int, kernel: Kernel, fast: bool
) -> None:
    kernel.knows = {ZERO}
    space = file_space(descriptor)
    space.zero(100, 9000, True, fast)
    space.zero(100, 9000, True, fast)
    assert kernel.calls == [(PUNCH, 100, 9000), (ZERO, 100, 9000), (ZERO, 100, 9000)]


def test_zeroes_are_written_in_pieces_where_nothing_else_is_known(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.knows = set()
    monkeypatch.setattr(system_calls, "ZEROES_LENGTH", 1000)
    lengths = []
    pwrite = os.pwrite

    def recording(descriptor: int, data: bytes, offset: int) -> int:
        lengths.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", recording)
    file_space(descriptor).zero(500, 2500, True, False)
    assert zeroed(descriptor, 500, 2500)
    assert lengths == [1000, 1000, 500]


def test_a_fast_zero_that_would_write_is_refused_and_changes_nothing(
    descriptor: int, kernel: Kernel
) -> None:
    kernel.knows = set()
    with pytest.raises(OSError, match="not be faster") as caught:
        file_space(descriptor).zero(0, 65536, True, True)
    assert caught.value.errno == errno.ENOTSUP
    assert zeroed(descriptor, 0, 0)


def test_an_error_that_is_no_refusal_is_passed_on(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(system_calls, "fallocate", failing)
    space = file_space(descriptor)
    with pytest.raises(OSError, match="Input/output error"):
        space.zero(0, 4096, True, False)
    with pytest.raises(OSError, match="Input/output error"):
        space.trim(0, 4096)


def test_a_block_devices_whole_blocks_are_zeroed_by_the_device_and_the_rest_by_writing(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_space(descriptor, monkeypatch).zero(1000, 20000, False, False)
    assert kernel.calls == [(ZERO, 4096, 16384)]
    assert zeroed(descriptor, 1000, 20000)


def test_less_than_a_block_of_a_block_device_is_written(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = block_space(descriptor, monkeypatch)
    space.zero(1000, 4000, True, False)
    assert kernel.calls == []
    assert zeroed(descriptor, 1000, 4000)
    with pytest.raises(OSError, match="not be faster"):
        space.zero(1000, 4000, True, True)


def test_a_fast_zero_does_not_ask_a_block_device_for_what_may_end_in_writing(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.knows = {ZERO}
    with pytest.raises(OSError, match="not be faster"):
        block_space(descriptor, monkeypatch).zero(0, 65536, True, True)
    assert [mode for mode, _, _ in kernel.calls] == [PUNCH]
    assert zeroed(descriptor, 0, 0)


def test_a_trim_that_is_refused_does_nothing_and_says_so(descriptor: int, kernel: Kernel) -> None:
    kernel.knows = set()
    space = file_space(descriptor)
    assert not space.trim(0, 65536)
    assert zeroed(descriptor, 0, 0)


def test_a_trim_zeroes_the_parts_of_blocks_around_what_it_frees(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = block_space(descriptor, monkeypatch)
    assert space.trim(1000, 20000)
    assert kernel.calls == [(PUNCH, 4096, 16384)]
    assert zeroed(descriptor, 1000, 20000)
    assert not space.trim(1 << 19, 4000)


def test_a_discard_that_promises_no_zeroes_takes_the_ioctl_on_whole_blocks(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.knows = set()
    discarded: list[tuple[int, int]] = []
    monkeypatch.setattr(
        system_calls, "discard", lambda _, offset, length, name: discarded.append((offset, length))
    )
    file_space(descriptor).discard(0, 8192)
    assert discarded == [], "a file has no such ioctl"
    block_space(descriptor, monkeypatch).discard(100, 20000)
    assert discarded == [(4096, 12288)]


def test_a_discard_that_is_refused_is_not_asked_for_again(
    descriptor: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.knows = set()
    asked: list[int] = []

    def refuse(_: int, offset: int, length: int, name: str) -> None:
        asked.append(offset)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", name)

    monkeypatch.setattr(system_calls, "discard", refuse)
    space = block_space(descriptor, monkeypatch)
    space.discard(0, 8192)
    space.discard(8192, 8192)
    assert asked == [0]


def test_an_ioctl_that_fails_names_the_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, pytest.raises(OSError, match="disk") as caught:
        system_calls.discard(file.fileno(), 0, 4096, "disk")
    assert caught.value.errno == errno.ENOTTY
