"""The journal's file: locked, whole after a failed append, replaced in one step."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fleecenbd.client import journal_file
from fleecenbd.client.journal_file import DurableFile, default_path
from fleecenbd.client.leftovers import write_durably
from tests.descriptors import descriptors_of


async def test_what_was_appended_and_replaced_is_there(tmp_path: Path) -> None:
    path = tmp_path / "t.journal"
    file = DurableFile.open(str(path))
    await file.append(b"one\n")
    await file.append(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    await file.replace(b"three\n")
    await file.append(b"four\n")
    await file.close()
    assert path.read_bytes() == b"three\nfour\n"
    assert os.listdir(tmp_path) == ["t.journal"]
    assert path.stat().st_mode & 0o777 == 0o600
    again = DurableFile.open(str(path))
    assert again.content == b"three\nfour\n"
    await again.remove()
    assert os.listdir(tmp_path) == []


async def test_two_pulls_do_not_share_one(tmp_path: Path) -> None:
    path = str(tmp_path / "t.journal")
    file = DurableFile.open(path)
    for _ in range(2):
        with pytest.raises(OSError, match="another pull is at work") as caught:
            DurableFile.open(path)
        assert caught.value.errno == errno.EBUSY
        await file.replace(b"made anew: another file, and still locked\n")
    await file.close()
    await DurableFile.open(path).close()


async def test_a_file_that_was_replaced_while_it_was_being_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.journal"
    path.write_bytes(b"old")
    real = journal_file._lock

    def lock(descriptor: int, name: str) -> None:
        monkeypatch.setattr(journal_file, "_lock", real)
        new = tmp_path / "new"
        new.write_bytes(b"new")
        new.rename(path)
        real(descriptor, name)

    monkeypatch.setattr(journal_file, "_lock", lock)
    file = DurableFile.open(str(path))
    assert file.content == b"new"
    await file.close()


async def test_a_failed_append_leaves_no_half_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.journal"
    file = DurableFile.open(str(path))
    await file.append(b"one\n")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            await file.append(b"two\n")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"one\n"
    await file.append(b"three\n")
    await file.close()
    assert path.read_bytes() == b"one\nthree\n"


async def test_a_failed_replacement_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.journal"
    file = DurableFile.open(str(path))
    await file.append(b"one\n")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            await file.replace(b"two\n")
    await file.close()
    assert path.read_bytes() == b"one\n"
    assert os.listdir(tmp_path) == ["t.journal"]


async def test_one_whose_folder_cannot_be_synced_goes_on_in_the_file_that_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.journal"
    file = DurableFile.open(str(path))
    before = descriptors_of(tmp_path)

    def fail(_path: str) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(journal_file, "sync_folder", fail)
        with pytest.raises(OSError, match="broken"):
            await file.replace(b"new\n")
    await file.append(b"more\n")
    assert path.read_bytes() == b"new\nmore\n"
    assert descriptors_of(tmp_path) == before
    await file.close()


def test_a_journal_elsewhere_is_named_after_its_target(tmp_path: Path) -> None:
    one = default_path("/dev/vg/backup", tmp_path)
    assert one.startswith(f"{tmp_path}/dev-vg-backup-")
    assert one.endswith(".journal")
    assert one != default_path("/dev/vg-backup", tmp_path)


def test_a_small_file_is_written_whole_though_the_kernel_takes_it_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:3], at))
    monkeypatch.setattr(os, "write", lambda fd, data: pwrite(fd, bytes(data)[:3], 0))
    write_durably(str(tmp_path / "small"), b"a small file")
    assert (tmp_path / "small").read_bytes() == b"a small file"
    assert os.listdir(tmp_path) == ["small"]
