"""Files whose owner may be killed: who finds which of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleecenbd.storage import unowned
from fleecenbd.storage.unowned import OwnedFile, remove_unowned

NAMES = ("a-", ".t")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_there_until_it_is_removed(tmp_path: Path) -> None:
    file = OwnedFile(str(tmp_path), *NAMES)
    path = Path(file.path)
    assert path.name.startswith("a-")
    assert path.suffix == ".t"
    assert path.stat().st_mode & 0o777 == 0o600
    remove_unowned(str(tmp_path), *NAMES)
    assert path.exists(), "it is locked"
    file.remove()
    assert not path.exists()


def test_what_a_killed_owner_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys, time; from fleecenbd.storage.unowned import OwnedFile;"
        f"file = OwnedFile({str(tmp_path)!r}, 'a-', '.t'); print(file.path, flush=True);"
        "time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    left = Path(owner.stdout.readline().strip())
    others = {"a-other", "other.t", "b-x.t"}
    for name in others:
        (tmp_path / name).touch()
    mine = OwnedFile(str(tmp_path), *NAMES)
    remove_unowned(str(tmp_path), *NAMES)
    assert left.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    remove_unowned(str(tmp_path), *NAMES)
    assert _names(tmp_path) == others | {Path(mine.path).name}
    mine.remove()


def test_a_file_that_is_found_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweeper comes between the making and the lock."""
    flock = unowned.fcntl.flock
    swept = []

    def late(descriptor: int, how: int) -> None:
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            monkeypatch.setattr(unowned.fcntl, "flock", flock)
            remove_unowned(str(tmp_path), *NAMES)
        flock(descriptor, how)

    monkeypatch.setattr(unowned.fcntl, "flock", late)
    file = OwnedFile(str(tmp_path), *NAMES)
    assert not Path(swept[0]).exists()
    assert _names(tmp_path) == {Path(file.path).name}
    file.remove()
