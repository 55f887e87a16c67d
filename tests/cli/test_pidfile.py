"""A pidfile takes the place of nothing but a pidfile, and goes when its server does."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecenbd.cli.errors import CommandError, UsageError
from fleecenbd.cli.pidfile import check_pidfile, pidfile
from fleecenbd.cli.values import DiskSpec
from tests.cli.conftest import Fails

VM = DiskSpec("vm", "vm.raw")


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 1 MiB in the current directory."""
    monkeypatch.chdir(tmp_path)
    image = Path("vm.raw")
    image.write_bytes(bytes(1 << 20))
    return image


@pytest.mark.parametrize("content", ["4711\n", "4711", " 4711 \n", "1" * 32])
def test_an_older_pidfile_is_replaced(content: str) -> None:
    path = Path("pid")
    path.write_text(content)
    check_pidfile(path, [VM])
    with pidfile(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert sorted(os.listdir()) == ["vm.raw"]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"vda 4711", b"4711 4712", bytes(1 << 20), b"1" * 33, b"-1", b"12\xb2"]
)
def test_a_file_that_is_no_pidfile_is_neither_written_over_nor_left_with_a_draft(
    content: bytes,
) -> None:
    path = Path("data.raw")
    path.write_bytes(content)
    with pytest.raises(CommandError, match=r"the pidfile data\.raw: .* is no pidfile"):
        check_pidfile(path, [VM])
    with pytest.raises(CommandError, match="is no pidfile"), pidfile(path):
        raise AssertionError("it was written")
    assert path.read_bytes() == content
    assert sorted(os.listdir()) == ["data.raw", "vm.raw"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.symlink("nowhere", "pid"),
        lambda: os.mkfifo("pid"),
        lambda: os.mknod("pid", stat.S_IFSOCK),
    ],
    ids=["link", "pipe", "socket"],
)
def test_what_is_no_regular_file_stays_what_it_is(make: Callable[[], None]) -> None:
    make()
    before = os.lstat("pid")
    with pytest.raises(CommandError, match="is no pidfile"):
        check_pidfile(Path("pid"), [VM])
    with pytest.raises(CommandError, match="is no pidfile"), pidfile(Path("pid")):
        raise AssertionError("it was written")
    assert os.path.samestat(os.lstat("pid"), before)


@pytest.mark.parametrize("path", ["vm.raw", "./vm.raw", "hard.raw", "soft.raw"])
def test_a_disk_is_no_place_for_a_pid_even_where_it_looks_like_one(image: Path, path: str) -> None:
    image.write_text("4711\n")
    os.link(image, "hard.raw")
    os.symlink(image, "soft.raw")
    with pytest.raises(UsageError, match="is the disk vm; choose another file"):
        check_pidfile(Path(path), [DiskSpec("other", "missing.raw"), VM])
    assert image.read_text() == "4711\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [(("vm.raw", "-P", "data.raw"), 1), (("-P", "data.raw", "vm.raw"), 1), (("-P", "vm.raw"), 2)],
    ids=["a file", "a file, first", "a disk"],
)
def test_the_command_loses_no_image_to_a_pidfile(
    fails: Fails, words: tuple[str, ...], status: int
) -> None:
    data = Path("data.raw")
    data.write_bytes(b"precious" * 512)
    words = (*words, "vm.raw") if status == 2 else words
    line = fails("serve", *words, "-U", "missing/f.sock", status=status)
    assert words[words.index("-P") + 1] in line
    assert "pidfile" in line
    assert data.read_bytes() == b"precious" * 512
    assert Path("vm.raw").read_bytes() == bytes(1 << 20)


def test_a_pidfile_is_looked_at_before_any_image(fails: Fails) -> None:
    line = fails("serve", "missing.raw", "-P", "vm.raw")
    assert line == (
        "fleecenbd: cannot write the pidfile vm.raw: there is a file of this name that is no "
        "pidfile, and would be lost; choose another name, or remove it"
    )


@pytest.mark.parametrize("path", [".", "..", "/", "folder"])
def test_a_directory_is_no_pidfile(fails: Fails, path: str) -> None:
    Path("folder").mkdir()
    line = fails("serve", "vm.raw", "-P", path)
    assert line == (
        f"fleecenbd: cannot write the pidfile {path}: there is a directory of this name; "
        "name a file in it"
    )


def test_a_pidfile_without_a_name_is_wrong_usage(fails: Fails) -> None:
    line = fails("serve", "vm.raw", "-P", "", status=2)
    assert (
        line == "fleecenbd: --pidfile: '' names nothing; leave the option out, or give it a value"
    )


def test_what_took_a_pidfile_s_place_meanwhile_stays() -> None:
    path = Path("pid")
    for content in ("1\n", "x" * 100_000):
        with pidfile(path):
            path.write_text(content)
        assert path.read_text() == content
        path.unlink()
