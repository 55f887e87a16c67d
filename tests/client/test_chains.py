"""A chain is ended while QEMU can still open it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fleecenbd.client import chains
from fleecenbd.client.chains import backing_name, why_too_long
from fleecenbd.client.records import BackedUp, Found, Record

SIZE = 1 << 20


def _night(number: int) -> str:
    return f"2026-11-22T20-15-03Z-{number:08d}"


def _found(path: Path) -> Found:
    disk = BackedUp("vda", SIZE, path.name, "qcow2", "increment")
    return Found(path, Record("id", "backup", 0.0, [disk]), disk)


class Overlays:
    """qcow2 files, quickly: one of qemu-img's, with another name of the same length in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name.encode()
        path = folder / "overlay"
        _make(path, name)
        self._content = path.read_bytes()
        assert self._content.count(self._name) == 1

    def make(self, path: Path, backing: str) -> None:
        assert len(backing) == len(self._name)
        path.write_bytes(self._content.replace(self._name, backing.encode()))


def _make(path: Path, backing: str | None) -> None:
    names = () if backing is None else ("-b", backing, "-F", "qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", *names, path, str(SIZE)], check=True
    )


def _opens(path: Path) -> bool:
    return subprocess.run(["qemu-img", "map", path], capture_output=True).returncode == 0


def test_a_chain_of_nights_ends_while_qemu_can_open_it_and_not_much_before(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    overlays = Overlays(tmp_path, f"../{_night(0)}/vda.qcow2")

    def path_of(number: int) -> Path:
        return folder / _night(number) / "vda.qcow2"

    (folder / _night(0)).mkdir()
    _make(path_of(0), None)
    last = 0
    while why_too_long(_found(path_of(last)), path_of(last + 1)) is None:
        (folder / _night(last + 1)).mkdir()
        overlays.make(path_of(last + 1), f"../{_night(last)}/vda.qcow2")
        last += 1
    assert _opens(path_of(last))
    deeper = tmp_path / ("d" * 120)
    folder.rename(deeper)
    assert _opens(deeper / _night(last) / "vda.qcow2"), "it can be moved"
    deeper.rename(folder)
    for more in range(last + 1, last + 15):
        (folder / _night(more)).mkdir()
        overlays.make(path_of(more), f"../{_night(more - 1)}/vda.qcow2")
    assert not _opens(path_of(more)), "there was a reason"


def test_a_chain_in_one_folder_ends_by_the_number_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "FILES_MAX", 5)
    overlays = Overlays(tmp_path, "0.qcow2")
    _make(tmp_path / "0.qcow2", None)
    for number in range(1, 5):
        overlays.make(tmp_path / f"{number}.qcow2", f"{number - 1}.qcow2")
    new = tmp_path / "new.qcow2"
    assert why_too_long(_found(tmp_path / "3.qcow2"), new) is None
    why = why_too_long(_found(tmp_path / "4.qcow2"), new)
    assert why is not None
    assert "4.qcow2 is as long as QEMU can open it" in why


@pytest.mark.parametrize(
    "content", [b"", b"QFI", b"raw" * 100, b"QFI\xfb" + bytes(100), b"QFI\xfb" + b"\xff" * 100]
)
def test_what_builds_on_nothing_has_no_name_in_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert backing_name(tmp_path / "file") is None


def test_the_name_is_the_one_that_qemu_img_has_written(tmp_path: Path) -> None:
    path = tmp_path / "overlay"
    _make(path, "../a b/ü.qcow2")
    assert backing_name(path) == "../a b/ü.qcow2"
