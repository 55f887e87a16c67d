"""System calls that Python lacks: made again, and named when they fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecenbd.storage import system_calls
from fleecenbd.storage.system_calls import fallocate, image_size

BLOCK = 65536
SIZE = 16 * BLOCK


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(number, SIZE)
    os.pwrite(number, b"\xff" * BLOCK, BLOCK)
    yield number
    os.close(number)


def test_an_interrupted_fallocate_is_made_again(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [errno.EINTR, errno.EINTR, 0]

    def interrupted(*arguments: int) -> int:
        answer = answers.pop(0)
        system_calls.ctypes.set_errno(answer)
        return -1 if answer else 0

    monkeypatch.setattr(system_calls, "_fallocate", interrupted)
    fallocate(descriptor, 0, 0, 4096, "disk")
    assert answers == []


def test_a_failed_fallocate_names_the_image(descriptor: int) -> None:
    with pytest.raises(OSError, match="Invalid argument: 'disk'"):
        fallocate(descriptor, 0, 0, 0, "disk")


@pytest.mark.parametrize("call", ["pread", "pwrite"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_read_or_write_names_the_image(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    original = getattr(os, call)
    counts = iter(range(2))

    def failing(number: int, what: int | memoryview, offset: int) -> bytes | int:
        if next(counts) == after:
            raise OSError(errno.EIO, "Input/output error")
        part: bytes | int = original(number, 100 if call == "pread" else what[:100], offset)
        return part

    monkeypatch.setattr(os, call, failing)
    tried = system_calls.read_all if call == "pread" else system_calls.write_zeroes
    with pytest.raises(OSError, match="Input/output error") as caught:
        tried(descriptor, BLOCK, 4096, "disk")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "disk")


def test_a_write_that_makes_no_progress_ends_in_an_error(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *arguments: 0)
    with pytest.raises(OSError, match="nothing could be written at offset 512"):
        system_calls.write_all(descriptor, 512, b"data", "disk")


def test_the_size_is_the_end(descriptor: int) -> None:
    assert image_size(descriptor) == SIZE
