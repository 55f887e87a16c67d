"""Full backups by stock clients, run as a user runs them while a guest writes."""

import os
import re
import select
import shutil
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.examples.conftest import (
    EXAMPLES,
    Busy,
    busy_server,
    command_of,
    example,
    example_without_space,
)
from tests.serving import CLIENTS_PATH, COMMAND_TIMEOUT_S, FLEECENBD, START_TIMEOUT_S, run, serving

PULLS = ["pull-with-trim.py", "pull-with-trim.sh"]  # with more in test_pulls.py
BACKUPS = {"backup-nbdcopy.sh": "raw", "backup-qcow2.sh": "qcow2"}
each_backup = pytest.mark.parametrize("name", BACKUPS)
each_of_one_disk = pytest.mark.parametrize("name", [*BACKUPS, *PULLS])


def _as_raw(name: str, target: Path) -> Path:
    """What a backup holds, as a raw file."""
    if BACKUPS.get(name, "raw") == "raw":
        return target
    raw = target.with_name("converted.raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw)
    return raw


def _left_beside(target: Path) -> list[str]:
    """Names beside a target that begin as its own does, its own left out."""
    return sorted(
        path.name for path in target.parent.glob(f"{target.name}*") if path.name != target.name
    )


@each_backup
def test_a_full_backup_equals_the_disk_at_arming_while_the_guest_writes(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "a b:c.backup"
    target.write_text("the backup of last night")
    writes = busy.guest.writes
    done = example(name, busy.backup, target)
    assert done.status == 0, done.stderr
    assert done.stdout == ""
    assert busy.has_written_since(writes)
    assert first_difference(busy.before["vm"], _as_raw(name, target)) is None
    assert target.stat().st_blocks * 512 < 20 * MIB, "zeroes take space"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "a guest's disk is not for everybody"
    assert _left_beside(target) == []


@each_of_one_disk
def test_a_backup_under_run_needs_no_other_server(tmp_path: Path, name: str) -> None:
    disk = make_disk(tmp_path / "vm.raw", 2 * MIB + 512)
    # QEMU would take what stands before a colon for a protocol.
    line = f'{EXAMPLES / name} "$uri" vm:1'
    subprocess.run(
        [FLEECENBD, "serve", disk, "--begin", "n", "--state-dir", tmp_path, "--run", line],
        cwd=tmp_path,
        env={**os.environ, "PATH": CLIENTS_PATH},
        timeout=COMMAND_TIMEOUT_S,
        check=True,
    )
    assert first_difference(disk, _as_raw(name, tmp_path / "vm:1")) is None


@each_of_one_disk
def test_the_wrong_number_of_arguments_is_answered_with_the_usage(name: str) -> None:
    done = example(name, "nbd://localhost")
    assert done.status == 2
    assert re.match(rf"usage: \S*{name} URI TARGET\n$", done.stderr)


@each_of_one_disk
def test_no_server_is_a_clear_failure(tmp_path: Path, name: str) -> None:
    target = tmp_path / "backup"
    done = example(name, f"nbd+unix:///vm@nightly?socket={tmp_path}/none.sock", target)
    assert done.status == 1
    assert "No such file" in done.stderr
    assert not target.exists()
    assert _left_beside(target) == []


@each_of_one_disk
def test_the_guests_own_export_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        done = example(name, server.uri("vm"), tmp_path / "backup")
    assert done.status == 1
    assert "not a fleecing export" in done.stderr
    assert not (tmp_path / "backup").exists()
    assert first_difference(disk, before) is None


@each_of_one_disk
def test_a_target_that_is_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    (tmp_path / "backup").mkdir()
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        done = example(name, server.uri("vm@nightly"), tmp_path / "backup")
    assert done.status == 1
    assert "not a file" in done.stderr
    assert _left_beside(tmp_path / "backup") == []
    assert list((tmp_path / "backup").iterdir()) == []


@each_backup
def test_no_space_in_the_target_is_a_clear_failure_and_leaves_nothing(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    done, left = example_without_space(tmp_path, name, busy.backup, "1m")
    assert done.status == 1, done.stderr
    assert "No space left" in done.stderr
    assert "no backup of" in done.stderr
    assert list(left.iterdir()) == []


@each_backup
def test_a_range_that_is_gone_is_a_clear_failure_and_leaves_the_old_backup(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    run("nbdsh", "-c", f"h.connect_uri('{busy.backup}')", "-c", "h.trim(65536, 0)")
    target = tmp_path / "backup"
    target.write_text("the backup of last night")
    done = example(name, busy.backup, target)
    assert done.status == 1
    assert "no backup of" in done.stderr
    assert target.read_text() == "the backup of last night"
    assert _left_beside(target) == []


def test_all_disks_of_a_session_are_backed_up_as_they_were_at_one_moment(tmp_path: Path) -> None:
    names = ("vda", "vdb", "data")
    target = tmp_path / "vm 2026-11-22"
    with busy_server(tmp_path, *names) as busy:
        writes = busy.guest.writes
        done = example("backup-session.py", busy.server.unix, "nightly", target)
        assert done.status == 0, done.stderr
        assert busy.has_written_since(writes)
        again = example("backup-session.py", busy.server.unix, "nightly", target)
        assert again.status == 1
        assert "is there already" in again.stderr
        other = example("backup-session.py", busy.server.unix, "weekly", tmp_path / "weekly")
        assert other.status == 1
        assert "no session weekly" in other.stderr
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{n}.raw" for n in names)
    for name in names:
        assert first_difference(busy.before[name], target / f"{name}.raw") is None
    assert not (tmp_path / "weekly").exists()
    assert _left_beside(target) == []


def test_a_disk_that_cannot_be_read_fails_the_whole_session_s_backup(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    with busy_server(tmp_path, "vda", "vdb") as busy:
        uri = busy.server.uri("vdb@nightly")
        run("nbdsh", "-c", f"h.connect_uri('{uri}')", "-c", "h.trim(65536, 0)")
        done = example("backup-session.py", busy.server.unix, "nightly", target)
    assert done.status == 1
    assert "no backup of vdb@nightly" in done.stderr
    assert not target.exists()
    assert _left_beside(target) == []


def test_a_session_that_ends_during_its_backup_fails_it_though_another_has_its_name(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    target = tmp_path / "backup"
    begun, go = tmp_path / "begun", tmp_path / "go"
    os.mkfifo(begun)
    os.mkfifo(go)
    # An nbdcopy that tells when it has begun, and waits until it may go on.
    real = shutil.which("nbdcopy")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nbdcopy"
    wrapper.write_text(f'#!/bin/sh\necho >{begun}\nread _ <{go}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    with ExitStack() as stack:
        signals = [os.open(path, os.O_RDWR) for path in (begun, go)]
        for descriptor in signals:
            stack.callback(os.close, descriptor)
        with serving(tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
            backup = subprocess.Popen(
                [*command_of("backup-session.py"), server.unix, "nightly", target],
                env={**os.environ, "PATH": f"{wrapper.parent}:{CLIENTS_PATH}"},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(backup)
            readable, _, _ = select.select(signals[:1], [], [], START_TIMEOUT_S)
            assert readable, "no nbdcopy was started"
        with serving(tmp_path, disk, "--begin", "nightly"):
            os.write(signals[1], b"\n")
            _, told = backup.communicate(timeout=COMMAND_TIMEOUT_S)
    assert backup.returncode == 1
    assert "session nightly has ended meanwhile" in told
    assert not target.exists()
    assert _left_beside(target) == []


def test_a_session_s_backup_without_a_server_or_arguments_says_so(tmp_path: Path) -> None:
    done = example("backup-session.py", tmp_path / "none.sock", "nightly", tmp_path / "backup")
    assert done.status == 1
    assert "No such file" in done.stderr
    done = example("backup-session.py", tmp_path / "none.sock")
    assert done.status == 2
    assert done.stderr.startswith("usage: ")
