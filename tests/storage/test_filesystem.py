"""What the file system lets us do inline is found out at open."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleecenbd.storage import filesystem
from fleecenbd.storage.filesystem import (
    Medium,
    hole_size_of,
    medium_of,
    reads_nowait,
    stores_may_fail,
    type_of,
)


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    return os.open(path, os.O_RDWR)


@pytest.mark.parametrize("directory", ["/dev/shm", "/proc/self", "/"])
def test_the_type_is_the_mount_tables(directory: str) -> None:
    handle = os.open(directory, os.O_RDONLY)
    with open("/proc/self/mounts") as mounts:
        types = {line.split()[1]: line.split()[2] for line in mounts}
    mount = max((path for path in types if f"{directory}/".startswith(path)), key=len)
    assert type_of(handle) == types[mount]
    os.close(handle)


@pytest.mark.parametrize(
    ("kind", "nowait", "medium"),
    [
        ("tmpfs", False, Medium.MEMORY),
        ("ext4", True, Medium.CACHED),
        ("xfs", True, Medium.CACHED),
        ("ext4", False, Medium.UNCACHED_READS),
        ("nfs4", True, Medium.SLOW),
        ("fuse.sshfs", True, Medium.SLOW),
        ("a file system of tomorrow", True, Medium.SLOW),
        ("", True, Medium.SLOW),
    ],
)
def test_the_medium_follows_from_the_type_and_a_try(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, kind: str, nowait: bool, medium: Medium
) -> None:
    monkeypatch.setattr(filesystem, "type_of", lambda descriptor: kind)
    monkeypatch.setattr(filesystem, "reads_nowait", lambda descriptor: nowait)
    assert medium_of(descriptor) is medium
    os.close(descriptor)


@pytest.mark.parametrize(
    ("error", "answer"),
    [(None, True), (errno.EAGAIN, True), (errno.EOPNOTSUPP, False), (errno.EINVAL, False)],
)
def test_a_file_system_that_refuses_nowait_is_found_out(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, error: int | None, answer: bool
) -> None:
    def preadv(*arguments: object) -> int:
        if error is not None:
            raise OSError(error, os.strerror(error))
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert reads_nowait(descriptor) is answer
    os.close(descriptor)


def test_without_proc_nothing_is_known(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*arguments: object, **keywords: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr("builtins.open", no_proc)
    assert type_of(descriptor) == ""
    os.close(descriptor)


@pytest.mark.parametrize(("block", "hole"), [(512, 512), (1024, 1024), (4096, 4096), (6000, 8192)])
def test_the_hole_size_is_the_file_systems_block_size_rounded_up_to_a_power_of_two(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, block: int, hole: int
) -> None:
    class Answer:
        f_bsize = block

    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: Answer)
    assert hole_size_of(descriptor) == hole
    os.close(descriptor)


@pytest.mark.parametrize(
    ("kind", "release", "may"),
    [
        ("btrfs", "6.1.0-44-amd64", True),
        ("btrfs", "6.18.44", False),
        ("btrfs", "7.0-rc1", False),
        ("ext4", "6.1.0-44-amd64", False),
    ],
)
def test_which_file_systems_may_refuse_a_store(
    kind: str, release: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert stores_may_fail(kind) is may
