"""MappedFile: what it holds after a kill, and the errors of a disk that is full or read-only."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bitarray import bitarray

from fleecenbd.storage.mapped import CAUSE_LENGTH_MAX, PAGE, MappedFile, lock_file

IDENTITY = {"kind": "fleece", "session": "nightly", "size": 1 << 40}


def _create(path: Path) -> MappedFile:
    return MappedFile.create(path, IDENTITY, {"access": 5000, "done": 5000, "own": 3})


def test_a_file_is_allocated_in_full_and_its_areas_begin_on_pages(tmp_path: Path) -> None:
    file = _create(tmp_path / "f")
    status = os.stat(tmp_path / "f")
    assert status.st_size == PAGE + 2 * 2 * PAGE + PAGE
    assert status.st_blocks * 512 >= status.st_size
    assert bytes(file.area("access")) == bytes(5000)
    with file.area("own") as own:
        own[:] = b"end"
    assert (tmp_path / "f").read_bytes()[5 * PAGE : 5 * PAGE + 4] == b"end\0"
    assert file.has_area("own")
    assert not file.has_area("copy")


def test_it_holds_what_it_held_when_it_is_opened_again(tmp_path: Path) -> None:
    file = _create(tmp_path / "f")
    file.area("done")[4999] = 7
    file.close()
    again = MappedFile.open(tmp_path / "f")
    assert again.identity == IDENTITY
    assert again.area("done")[4999] == 7
    assert again.area("access")[4999] == 0
    assert again.broken is None


KILLED = """
import os, signal, sys
from fleecenbd.storage.mapped import MappedFile

file = MappedFile.create(sys.argv[1], {"kind": "fleece"}, {"access": 4096})
file.area("access")[1] = 42
file.mark_broken("the temp image is full")
file.area("access")[2] = 43
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_every_store_before_a_kill_is_there_afterwards(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "f"], check=False)
    assert killed.returncode == -signal.SIGKILL
    file = MappedFile.open(tmp_path / "f")
    assert bytes(file.area("access")[:4]) == bytes([0, 42, 43, 0])
    assert file.broken == "the temp image is full"


def test_the_first_cause_of_a_break_stays_and_is_cut_where_it_is_too_long(tmp_path: Path) -> None:
    file = _create(tmp_path / "f")
    file.mark_broken("x" * 5000)
    file.mark_broken("second")
    assert file.broken == "x" * CAUSE_LENGTH_MAX
    assert MappedFile.open(tmp_path / "f").area("access")[0] == 0
    other = _create(tmp_path / "g")
    other.mark_broken("a half \udcff and an é" + "é" * 1000)
    assert other.broken is not None
    assert other.broken.startswith("a half ? and an é")


def test_the_flag_is_set_after_the_cause_and_never_without_it(tmp_path: Path) -> None:
    stores: list[int] = []

    class Watched(mmap.mmap):
        def __setitem__(self, key: object, value: object) -> None:
            super().__setitem__(key, value)  # type: ignore[index,assignment]
            stores.append(int.from_bytes(self[2048:2052], "little"))

    file = _create(tmp_path / "f")
    with open(tmp_path / "f", "r+b") as opened:
        file._map = Watched(opened.fileno(), 0)
        file.mark_broken("why")
    assert stores == [0]
    assert file.broken == "why"


def test_a_bitmap_over_an_area_keeps_the_map_alive(tmp_path: Path) -> None:
    file = _create(tmp_path / "f")
    bits = bitarray(buffer=file.area("access"), endian="little")
    file.close()
    bits[9] = 1
    assert (tmp_path / "f").read_bytes()[PAGE : PAGE + 2] == b"\0\2"
    del bits
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.area("access")


def test_sync_and_unlink(tmp_path: Path) -> None:
    file = _create(tmp_path / "f")
    file.sync()
    file.unlink()
    file.unlink()
    assert not (tmp_path / "f").exists()
    file.area("access")[0] = 1  # nobody's file, and no harm done


def test_a_file_that_is_there_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        _create(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(OSError, match="symbolic links"):
        MappedFile.open(tmp_path / "link")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_an_error_with_the_path_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="access") as caught:
        MappedFile.create(tmp_path / "access", IDENTITY, {"access": 4096})
    assert caught.value.errno == number
    assert os.listdir(tmp_path) == []


def test_too_long_an_identity_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        MappedFile.create(tmp_path / "f", {"disk": "x" * 3000}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda whole: whole[:100], "it has 100 bytes only"),
        (lambda whole: whole[: 5 * PAGE + 2], f"it has {5 * PAGE + 2} bytes of {5 * PAGE + 3}"),
        (lambda whole: bytes(len(whole)), "it does not begin as one"),
        (lambda whole: whole[:8] + b"\x02" + whole[9:], "it is of version 2"),
        (lambda whole: whole[:30] + b"\xff" + whole[31:], "its header is damaged"),
        (lambda whole: whole[:12] + b"\xff" * 4 + whole[16:], "its header is damaged"),
    ],
)
def test_what_is_no_whole_file_is_refused(tmp_path: Path, change: object, cause: str) -> None:
    _create(tmp_path / "f").close()
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(change(whole))  # type: ignore[operator]
    with pytest.raises(OSError, match=cause) as caught:
        MappedFile.open(tmp_path / "f")
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(tmp_path / "f")


def test_a_lock_is_one_description_s_and_goes_with_it(tmp_path: Path) -> None:
    first = lock_file(tmp_path / "lock")
    with pytest.raises(BlockingIOError) as caught:
        lock_file(tmp_path / "lock")
    assert caught.value.filename == str(tmp_path / "lock")
    os.close(first)
    os.close(lock_file(tmp_path / "lock"))
