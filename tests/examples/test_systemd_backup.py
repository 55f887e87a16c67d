"""The backup of examples/systemd: two restarts, whatever happens between them.

The server runs on sockets as the units ask for; the test plays systemd behind a `systemctl`.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.examples.units import (
    INSTANCE,
    Systemctl,
    UnitServer,
    first_steps,
    start_words,
    unit_server,
)
from tests.serving import connected, run, try_run

JOB = "opt/fleecenbd/examples/systemd/backup.sh"


class Night:
    """The server of `web` under its backup, as the README installs it, and an older target."""

    def __init__(self, folder: Path, server: UnitServer) -> None:
        self.folder = folder
        self.server = server
        self.disk = make_disk(folder / "web.raw", 4 * MIB)
        self.conf = folder / "fleecenbd" / INSTANCE / "session.conf"
        self.guest = f"nbd+unix:///vda?socket={folder / 'fleecenbd' / INSTANCE / 'guest.sock'}"
        (folder / "backups").mkdir()
        self.target = folder / "backups" / "web.raw"
        self.target.write_text("last night's")
        self.systemctl = Systemctl(folder / "systemctl")
        root = folder / "root"
        first_steps(root)
        self.job = root / JOB
        text = self.job.read_text()
        assert "/run/fleecenbd/" in text
        self.job.write_text(text.replace("/run/fleecenbd/", f"{folder}/fleecenbd/"))
        self.copier = self.job.parents[1] / "backup-nbdcopy.sh"
        server.start_with(start_words(folder, self.disk))

    def back_up(self, answer: Callable[[int, int], int]) -> tuple[int, str]:
        """Run it; `answer` is given the number of a restart and the job's process id."""
        return self.systemctl.run([self.job, INSTANCE, "vda", self.target], answer)

    def restart(self) -> None:
        """What systemd does."""
        assert self.server.end_by(signal.SIGTERM) == 0, self.server.log.read_text()
        self.server.start_with(start_words(self.folder, self.disk))

    def restarted(self, _number: int, _pid: int) -> int:
        """A restart that succeeds."""
        self.restart()
        return 0

    def assert_over(self) -> None:
        """Whatever came of it: two restarts, no session, and the target alone."""
        assert self.systemctl.calls() == [f"restart fleecenbd@{INSTANCE}"] * 2
        assert not self.conf.exists()
        assert [path.name for path in self.target.parent.iterdir()] == [self.target.name]
        listed = run("nbdinfo", "--list", self.guest)
        assert re.findall('export="(.*)"', listed) == ["vda"]


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Night]:
    """A night before its backup."""
    with unit_server(tmp_path) as server:
        yield Night(tmp_path, server)


def test_a_backup_is_the_disk_as_it_was_at_the_first_restart(night: Night) -> None:
    before = night.folder / "before.raw"

    def answer(number: int, _pid: int) -> int:
        assert night.conf.exists() == (number == 1)
        night.restart()
        if number == 1:
            copy_disk(night.disk, before)
            with connected(night.guest) as guest:
                guest.pwrite(b"today" * 1000, 5000)
        return 0

    status, said = night.back_up(answer)
    assert status == 0, said
    assert first_difference(before, night.target) is None
    assert first_difference(night.disk, night.target) is not None
    night.assert_over()


def test_a_backup_that_fails_keeps_its_status_and_ends_the_session(night: Night) -> None:
    # Its own word for whether a server that crashed now would begin another session.
    night.copier.write_text(f'#!/bin/sh\n[ ! -e "{night.conf}" ] || exit 99\nexit 7\n')
    assert night.back_up(night.restarted) == (7, "")
    assert night.target.read_text() == "last night's"
    night.assert_over()


def test_a_server_that_comes_back_without_a_session_fails_the_backup(night: Night) -> None:
    def answer(number: int, _pid: int) -> int:
        night.conf.unlink(missing_ok=True)
        night.restart()
        if number == 1:
            night.conf.touch()  # for the job to remove
        return 0

    status, said = night.back_up(answer)
    assert (status, "not a fleecing export" in said) == (1, True), said
    assert night.target.read_text() == "last night's"
    night.assert_over()


def test_a_first_restart_that_fails_is_followed_by_one_without_a_session(night: Night) -> None:
    status, _ = night.back_up(lambda number, pid: 5 if number == 1 else night.restarted(2, pid))
    assert status == 5
    assert night.target.read_text() == "last night's"
    night.assert_over()


@pytest.mark.parametrize("backup", [0, 7])
def test_a_last_restart_that_fails_is_no_success(night: Night, backup: int) -> None:
    night.copier.write_text(f"#!/bin/sh\nexit {backup}\n")
    status, said = night.back_up(
        lambda number, pid: 5 if number == 2 else night.restarted(number, pid)
    )
    assert status == (backup or 1)
    assert f"fleecenbd@{INSTANCE} failed to restart" in said
    assert not night.conf.exists()


def test_a_job_that_is_told_to_end_ends_the_session_first(night: Night) -> None:
    def answer(number: int, pid: int) -> int:
        if number == 1:
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGTERM)  # impatient; but this restart has to be
        return night.restarted(number, pid)

    status, said = night.back_up(answer)
    assert status == 128 + signal.SIGTERM, said
    assert night.target.read_text() == "last night's"
    night.assert_over()


def test_a_second_backup_of_the_vm_is_refused_and_the_first_goes_on(night: Night) -> None:
    def answer(number: int, pid: int) -> int:
        if number == 1:
            second = try_run(night.job, INSTANCE, "vda", night.target)
            assert (second.returncode, second.stdout) == (1, "")
            assert "another backup of web is running" in second.stderr
            assert night.conf.exists()
        return night.restarted(number, pid)

    status, said = night.back_up(answer)
    assert status == 0, said
    assert first_difference(night.disk, night.target) is None
    night.assert_over()


def test_a_vm_without_sockets_is_not_restarted(night: Night) -> None:
    ended = try_run(night.job, "wbe", "vda", night.target)
    assert ended.returncode == 1
    assert "systemctl start fleecenbd-backup@wbe.socket" in ended.stderr
    assert try_run(night.job, INSTANCE, "vda").returncode == 2
