"""Chains of ``fleecenbd backup`` under a guest that writes, with failures in between.

What is left is restored by qemu-img alone, and must be the disk as it was when its session began.
"""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli.main import run as run_command
from fleecenbd.client.block_io import READ_LENGTH_MAX
from fleecenbd.engine.recording import GRANULARITY_DEFAULT
from tests.controlling import Control
from tests.disks import KIB, MIB, make_disk
from tests.interop.test_nightly import SCRIPT
from tests.remembering import Moment, RememberingGuest, granules, remembering
from tests.serving import (
    CLIENTS_PATH,
    FLEECENBD,
    Serving,
    run,
    serving,
)

SIZE = 4 * MIB + 4 * KIB + 512  # no multiple of a bitmap's granule, nor of a page
READS = 4
PAUSE_S = 0.02  # of the guest between writes: a night does not change the whole disk


class Backing:
    """A server, its guests, and the backups that were made of it."""

    def __init__(
        self, server: Serving, guests: list[RememberingGuest], capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.server = server
        self.guests = guests
        self._capfd = capfd
        self.control = Control(f"{server.unix}.control")

    def call(self, *words: str | Path, status: int = 0) -> tuple[list[Path], str]:
        """What it prints, and what it says."""
        self._capfd.readouterr()
        assert run_command(["backup", *map(str, words)]) == status, self._capfd.readouterr()
        out, err = self._capfd.readouterr()
        return [Path(line) for line in out.splitlines()], err

    def moments(self) -> list[Moment]:
        """Now, of each disk."""
        return [Moment([guest]) for guest in self.guests]

    def good(self, *words: str | Path) -> list[Path]:
        """One that succeeds, and is the disks as they were at its moment."""
        self.guests[0].wait(10)
        moments = self.moments()
        files, _ = self.call(*words)
        check(moments, files)
        return files

    def sessions(self) -> list[dict[str, Any]]:
        return list(self.control.call("GET", "sessions")["sessions"])

    def wait_for_reads(self) -> None:
        """Until the guest has changed so much that the next backup needs several reads: a rate
        lets the first pass at once."""
        guest = self.guests[0]
        first = len(guest.writes)
        touched = set[int]()
        while len(touched) * GRANULARITY_DEFAULT < READS * READ_LENGTH_MAX:
            guest.wait(10)
            written = [(offset, data) for offset, data in guest.writes[first:] if any(data)]
            touched = granules(written, GRANULARITY_DEFAULT)

    def killed(self, *words: str | Path) -> None:
        """One that is killed while it copies."""
        self.wait_for_reads()  # there is something to copy, for seconds
        command = [FLEECENBD, "backup", *words, "--rate", "64k", "--progress", "json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "progress" and event["read"]:
                    break
            process.kill()
        assert self.sessions()[-1]["state"] == "active"


def check(moments: list[Moment], files: list[Path]) -> None:
    """Each file is its disk at that moment, which is over."""
    for moment in moments:
        moment.is_over()
    for moment, path in zip(moments, files, strict=True):
        assert moment.is_shown_by(restored(path)), path


def restored(path: Path) -> bytes:
    """By qemu-img. qcow2 counts in sectors: the sizes here are multiples of one."""
    raw = path.parent / "restored"
    form = "raw" if path.suffix == ".raw" else "qcow2"
    run("qemu-img", "convert", "-f", form, "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


@contextmanager
def _served(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
) -> Iterator[Backing]:
    monkeypatch.setenv("PATH", CLIENTS_PATH)
    disks = [make_disk(tmp_path / f"{name}.raw", SIZE, islands=60) for name in names]
    with serving(tmp_path, *disks) as server:
        monkeypatch.setenv("FLEECENBD_CONTROL", f"{server.unix}.control")
        guests = [
            RememberingGuest(server.uri(name), disk.read_bytes(), pause_s=PAUSE_S)
            for name, disk in zip(names, disks, strict=True)
        ]
        with remembering(*guests):
            yield Backing(server, guests, capfd)


def _chain(path: Path) -> list[str]:
    """The names of the files that a backup needs, as qemu-img lists them."""
    info = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", path))
    return [Path(one["filename"]).name for one in info]


def test_a_chain_goes_on_over_failures_of_every_kind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    with _served(tmp_path, capfd, monkeypatch, "vm") as backing:
        backing.good("vm", folder / "full.raw", "--bitmap", "chain")

        def night(number: int) -> tuple[str, ...]:
            return ("vm", f"qcow2:{folder}/{number}.qcow2", "--incremental", "chain")

        backing.good(*night(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
        try:
            backing.call(*night(2), status=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        backing.good(*night(2))
        # It is killed.
        backing.killed(*night(3))
        backing.good(*night(3))
        # The session breaks.
        words = ("--temp-limit", "4k", "--no-trim", "--rate", "8k", "--cbw-timeout", "1")
        backing.wait_for_reads()
        _, err = backing.call(*night(4), *words, status=1)
        assert "temp image" in err
        backing.good(*night(4))
        # A new chain fails: the old one goes on.
        backing.killed("vm", folder / "new.raw", "--bitmap", "chain")
        (last,) = backing.good(*night(5))
        assert _chain(last) == [*(f"{n}.qcow2" for n in (5, 4, 3, 2, 1)), "full.raw"]
    names = {path.name for path in folder.iterdir()}
    backups = {"full.raw", *(f"{n}.qcow2" for n in range(1, 6))}
    assert names == backups | {f"{name}.backup.json" for name in backups}


def test_in_place_and_a_chain_of_its_own_go_on_beside_each_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    with _served(tmp_path, capfd, monkeypatch, "vm") as backing:
        mirror = ("vm", folder / "vm.raw", "--incremental", "mirror", "--in-place", "--or-full")
        for count in range(3):
            backing.good(*mirror, "--verify")
            backing.good("--all", folder, "--incremental", "chain", "--or-full")
            if count == 1:
                backing.killed(*mirror)
        assert (folder / "vm.raw").stat().st_size == SIZE


def test_all_disks_are_of_one_moment_and_nights_go_on_with_those_of_the_script(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    line = ("--all", folder, "--incremental", "chain", "--or-full")
    with _served(tmp_path, capfd, monkeypatch, "vda", "vdb") as backing:
        script = [SCRIPT, backing.server.unix, folder]

        def by_script() -> list[Path]:
            moments = backing.moments()
            files = [Path(name) for name in run(*script).splitlines()]
            check(moments, files)
            return files

        nights = [by_script(), backing.good(*line), by_script(), backing.good(*line)]
        assert [path.name for path in nights[0]] == ["vda.raw", "vdb.raw"]
        for files, before in zip(nights[1:], nights, strict=False):
            assert [path.name for path in files] == ["vda.qcow2", "vdb.qcow2"]
            for path, below in zip(files, before, strict=True):
                info = json.loads(run("qemu-img", "info", "--output=json", path))
                assert (path.parent / info["backing-filename"]).resolve() == below.resolve()
