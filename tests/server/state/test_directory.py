"""The state directory: one server's at a time, replaced whole, and never a crash loop."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fleecenbd.server.state import directory as module
from fleecenbd.server.state.description import Description
from fleecenbd.server.state.directory import DAMAGED_MAX, StateDirectory
from fleecenbd.storage.temp import TempImage
from tests.server.state.entries import WHOLE


def test_it_is_made_with_what_it_needs_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "a" / "state")
    assert sorted(os.listdir(state.path)) == ["files", "state.lock"]
    assert (state.path / "files").stat().st_mode & 0o777 == 0o700
    assert state.read() is None
    assert not state.is_marked()
    assert (state.path / "state.lock").read_text() == f"{os.getpid()}\n"


def test_two_live_servers_never_have_it_both(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path)
    with pytest.raises(OSError, match=rf"another live server \(pid {os.getpid()}\) uses") as caught:
        StateDirectory.open(tmp_path)
    assert caught.value.errno == errno.EBUSY
    assert caught.value.filename == str(tmp_path)
    state.close()
    state.close()
    StateDirectory.open(tmp_path).close()


HOLDER = """
import pathlib, sys
from fleecenbd.server.state.directory import StateDirectory
state = StateDirectory.open(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_comes_free_when_its_server_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=rf"pid {process.pid}\)"):
            StateDirectory.open(tmp_path)
        process.kill()
        process.wait()
    StateDirectory.open(tmp_path).close()


@pytest.mark.parametrize("durable", [True, False])
def test_the_description_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    state = StateDirectory.open(tmp_path)
    state.write(Description("boot"), durable=durable)
    state.write(WHOLE, durable=durable)
    assert state.read() == WHOLE
    assert sorted(os.listdir(tmp_path)) == ["files", "state.json", "state.lock"]


def test_what_fails_leaves_the_old_description_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDirectory.open(tmp_path)
    state.write(WHOLE, durable=False)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"state\.json") as caught:
        state.write(Description("boot"), durable=True)
    assert caught.value.errno == errno.ENOSPC
    assert state.read() == WHOLE
    assert not list(tmp_path.glob("*.draft"))


def test_a_mark_vouches_for_one_description_only(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path)
    state.mark(state.write(WHOLE, durable=True))
    assert state.is_marked()
    state.write(Description("boot"), durable=False)
    assert not state.is_marked()
    state.mark(state.write(WHOLE, durable=True))
    state.unmark()
    assert not state.is_marked()
    state.unmark()
    (tmp_path / "state.clean").write_text("yes")
    assert not state.is_marked()


def _elsewhere(state: StateDirectory, folder: Path, name: str) -> Path:
    target = folder / f"fleecenbd-{name}"
    (state.files / name).symlink_to(target)
    return target


def test_a_temp_image_elsewhere_goes_with_its_link(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "state")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = _elsewhere(state, elsewhere, "temp-1")
    target.write_text("")
    _elsewhere(state, elsewhere, "temp-2")  # a kill came before it was made
    (elsewhere / "other").write_text("")
    (state.files / "temp-3").symlink_to(elsewhere / "other")
    assert sorted(state.sweep(set())) == ["temp-1", "temp-2", "temp-3"]
    assert os.listdir(elsewhere) == ["other"]


def test_what_is_not_mounted_is_not_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory.open(tmp_path / "state")
    target = _elsewhere(state, tmp_path / "elsewhere", "temp-1")
    assert state.sweep(set()) == []
    assert "temp-1 is left over, and stays" in caplog.text
    target.parent.mkdir()
    target.write_text("")
    assert state.sweep(set()) == ["temp-1"]
    assert not target.exists()


def test_a_copied_directory_sweeps_nothing_of_a_live_server_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory.open(tmp_path / "state")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    temp = TempImage.create_named(_elsewhere(state, elsewhere, "temp-1"), 1 << 20)
    copy = StateDirectory.open(tmp_path / "copy")
    _elsewhere(copy, elsewhere, "temp-1")
    assert copy.sweep(set()) == []
    assert "temp-1 is left over, and stays" in caplog.text
    assert os.listdir(elsewhere) == ["fleecenbd-temp-1"]
    temp.close()


def test_the_mark_s_removal_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDirectory.open(tmp_path)
    state.mark(state.write(WHOLE, durable=True))
    synced: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((tmp_path / "state.clean").exists())

    monkeypatch.setattr(os, "fsync", watched)
    state.unmark()
    assert synced == [False]


def test_a_damaged_description_is_told_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory.open(tmp_path)
    (tmp_path / "state.json").write_bytes(bytes(512))
    assert state.read() is None
    assert "state.json is damaged" in caplog.text
    assert "a full backup is needed" in caplog.text
    assert (tmp_path / "damaged" / "state.json").read_bytes() == bytes(512)
    assert state.read() is None


def test_what_is_set_aside_is_kept_under_names_of_its_own_and_not_for_ever(
    tmp_path: Path,
) -> None:
    state = StateDirectory.open(tmp_path)
    for number in range(DAMAGED_MAX + 5):
        (state.files / "bits").write_text(str(number))
        os.utime(state.files / "bits", (number, number))
        state.set_aside("bits")
    kept = {path.read_text() for path in (tmp_path / "damaged").iterdir()}
    assert kept == {str(number) for number in range(5, DAMAGED_MAX + 5)}


@pytest.mark.parametrize(
    ("document", "number", "words"),
    [
        ({"format": "fleecenbd state", "version": 3}, errno.ENOTSUP, "of version 3"),
        ({"volumes": []}, errno.EEXIST, "none of fleecenbd's"),
    ],
)
def test_a_newer_or_a_foreign_description_is_refused_and_left_alone(
    tmp_path: Path, document: dict[str, object], number: int, words: str
) -> None:
    state = StateDirectory.open(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(document))
    with pytest.raises(OSError, match=words) as caught:
        state.read()
    assert caught.value.errno == number
    assert "--state-dir" in str(caught.value)
    assert json.loads((tmp_path / "state.json").read_text()) == document


def test_what_nobody_knows_is_swept_and_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory.open(tmp_path)
    for name in ("bits-1", "temp-1", "left-over"):
        (state.files / name).write_text(name)
    (state.files / "folder").mkdir()
    (tmp_path / "state.json.draft").write_text("half a")
    assert state.sweep({"bits-1", "temp-1"}) == ["left-over"]
    assert sorted(os.listdir(state.files)) == ["bits-1", "folder", "temp-1"]
    assert sorted(os.listdir(tmp_path)) == ["files", "state.lock"]


def test_what_cannot_be_swept_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory.open(tmp_path)
    (state.files / "left-over").write_text("")

    def refuse(path: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(os, "unlink", refuse)
    assert state.sweep(set()) == []
    assert "left-over is left over, and stays: Operation not permitted" in caplog.text


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_used_is_an_error_with_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(module, "lock_file", refuse)
    with pytest.raises(OSError, match=r"state\.lock") as caught:
        StateDirectory.open(tmp_path)
    assert caught.value.errno == number


def test_a_full_disk_lets_go_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"state\.lock"):
            StateDirectory.open(tmp_path)
    StateDirectory.open(tmp_path).close()


def test_a_link_where_the_description_should_be_is_not_followed(tmp_path: Path) -> None:
    state = StateDirectory.open(tmp_path / "state")
    (tmp_path / "secret").write_bytes(msgspec.json.encode(WHOLE))
    (state.path / "state.json").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        state.read()


@pytest.mark.parametrize("may", [False, True])
def test_a_file_system_that_may_end_the_server_is_told(
    tmp_path: Path, may: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "stores_may_fail", lambda _: may)
    StateDirectory.open(tmp_path / "state").close()
    assert (f"{tmp_path / 'state'} is on btrfs: when that is full" in caplog.text) is may
