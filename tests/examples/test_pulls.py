"""The pulls that TRIM, run as a user runs them while a guest writes."""

import os
import re
import select
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.disks import KIB, MIB, first_difference
from tests.examples.conftest import SIZE, Busy, command_of, example, example_without_space
from tests.serving import (
    CLIENTS_PATH,
    COMMAND_TIMEOUT_S,
    START_TIMEOUT_S,
    connected,
    serving,
    try_run,
)

ACCESS = "x-fleecenbd:access"
READABLE = 1

each_pull = pytest.mark.parametrize("name", ["pull-with-trim.py", "pull-with-trim.sh"])


def _access(uri: str) -> list[tuple[int, int, int]]:
    """(offset, length, bits) of what the server says may still be read, and what it holds."""
    found: list[tuple[int, int, int]] = []
    end = 0

    def collect(context: str, offset: int, entries: list[int], _error: object) -> int:
        nonlocal end
        for length, bits in zip(entries[::2], entries[1::2], strict=True):
            found.append((offset, length, bits))
            offset += length
        end = offset
        return 0

    with connected(uri, lambda client: client.add_meta_context(ACCESS)) as client:
        while end < client.get_size():
            client.block_status(client.get_size() - end, end, collect)
    return found


@each_pull
def test_a_pull_equals_the_disk_at_arming_and_frees_all_temp_space(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    assert busy.server.temp_bytes() > 0, "the guest has made the server keep nothing"
    writes = busy.guest.writes
    target = tmp_path / "a b.raw"
    done = example(name, busy.backup, target)
    assert done.status == 0, done.stderr
    assert busy.has_written_since(writes)
    assert first_difference(busy.before["vm"], target) is None
    # The guest goes on, and nothing is kept any more.
    assert {bits for _, _, bits in _access(busy.backup)} == {0}
    assert busy.server.temp_bytes() == 0
    assert target.stat().st_blocks * 512 < 20 * MIB, "zeroes take space"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "a guest's disk is not for everybody"
    assert not (tmp_path / "a b.raw.part").exists()


@each_pull
def test_a_pull_tells_how_far_it_is_on_standard_error(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    done = example(name, busy.backup, tmp_path / "backup")
    assert done.status == 0
    assert done.stdout == ""
    # In text mode a carriage return reads as the end of a line.
    told = re.findall(r"^ *(\d+) % .*MiB of data stored", done.stderr, re.MULTILINE)
    percents = [int(percent) for percent in told]
    assert len(percents) >= 3
    assert percents == sorted(percents)
    assert percents[-1] == 100


@each_pull
def test_a_pull_without_space_for_its_target_has_released_only_what_is_stored(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    done, left = example_without_space(tmp_path, name, busy.backup, "3m")
    assert done.status == 1, done.stderr
    assert "No space left" in done.stderr
    assert [path.name for path in left.iterdir()] == ["backup.part"]
    access = _access(busy.backup)
    released = [(offset, length) for offset, length, bits in access if not bits & READABLE]
    assert released, "the target was full before anything was released"
    assert sum(length for _, length in released) < SIZE
    with busy.before["vm"].open("rb") as before, (left / "backup.part").open("rb") as part:
        for offset, length in released:
            before.seek(offset)
            part.seek(offset)
            assert part.read(length) == before.read(length), f"[{offset}, {offset + length})"


RECORDER = """
import os, nbd

def recorded(name, call):
    def wrapped(*arguments):
        with open(os.environ["EVENTS"], "a") as events:
            print(name, *arguments[1:], file=events)
        if name == "trim":
            length, offset = arguments[1:]
            with open(os.environ["PART"], "rb") as part, open(os.environ["STORED"], "ab") as stored:
                part.seek(offset)
                stored.write(part.read(length))
        return call(*arguments)
    return wrapped

os.fdatasync = recorded("sync", os.fdatasync)
nbd.NBD.pread = recorded("read", nbd.NBD.pread)
nbd.NBD.trim = recorded("trim", nbd.NBD.trim)
"""


@each_pull
def test_a_pull_makes_durable_what_it_has_read_before_it_releases_it(
    tmp_path: Path, name: str
) -> None:
    # Pieces of one block, which could wait in a buffer of the client's.
    disk = tmp_path / "vm.raw"
    with disk.open("wb") as image:
        image.truncate(SIZE)
        for offset in (5 * MIB, 21 * MIB, SIZE - 512):
            image.seek(offset)
            image.write(b"\x0f" * 512)
    # Python runs this module before anything else, in the script and in nbdsh.
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    target, events, stored = (tmp_path / name for name in ("backup", "events", "stored"))
    environment = [f"EVENTS={events}", f"STORED={stored}", f"PART={target}.part"]
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        recording = ["env", f"PYTHONPATH={tmp_path}", *environment]
        result = try_run(*recording, *command_of(name), server.uri("vm@nightly"), target)
    assert result.returncode == 0, result.stderr
    is_durable, released = True, 0
    for line in events.read_text().splitlines():
        event, *numbers = line.split()
        if event == "trim":
            assert is_durable, "released before what was read is durable"
            assert int(numbers[1]) == released, "a TRIM out of order"
            released += int(numbers[0])
        else:
            is_durable = event == "sync"
    assert released == SIZE
    assert first_difference(disk, stored) is None, "released before it was in the target"


@each_pull
def test_a_pull_keeps_its_hands_off_what_another_left(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    (tmp_path / "backup.part").write_text("the only copy")
    done = example(name, busy.backup, tmp_path / "backup")
    assert done.status == 1
    assert "backup.part" in done.stderr
    assert (tmp_path / "backup.part").read_text() == "the only copy"
    assert not (tmp_path / "backup").exists()
    assert all(bits & READABLE for _, _, bits in _access(busy.backup))


@each_pull
def test_a_pull_of_what_somebody_else_has_released_fails(
    busy: Busy, tmp_path: Path, name: str
) -> None:
    # Where the disk has data: its very last bytes.
    with connected(busy.backup) as other:
        other.trim(512 + 4 * KIB, SIZE - 512 - 4 * KIB)
    done = example(name, busy.backup, tmp_path / "backup")
    assert done.status == 1
    assert "Invalid argument" in done.stderr
    assert not (tmp_path / "backup").exists()
    # What it had stored by then is kept, since it may be released already.
    assert (tmp_path / "backup.part").exists()


HOLD = """
import os, nbd

def held(call):
    def wrapped(*arguments):
        setattr(nbd.NBD, os.environ["HELD"], call)
        with open(os.environ["BEGUN"], "w") as begun:
            print(file=begun)
        with open(os.environ["GO"]) as go:
            go.readline()
        return call(*arguments)
    return wrapped

setattr(nbd.NBD, os.environ["HELD"], held(getattr(nbd.NBD, os.environ["HELD"])))
"""
"""Before its first call of the method HELD, the client tells the test, and waits for its word."""


@pytest.mark.parametrize("held", ["connect_uri", "pread"])
@each_pull
def test_a_pull_never_mixes_two_sessions_of_one_name(tmp_path: Path, name: str, held: str) -> None:
    disk, target = tmp_path / "vm.raw", tmp_path / "backup"
    with disk.open("wb") as image:
        image.truncate(SIZE)
        image.write(b"first" * 1000)
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    begun, go = tmp_path / "begun", tmp_path / "go"
    with ExitStack() as stack:
        signals = []
        for path in (begun, go):
            os.mkfifo(path)
            signals.append(os.open(path, os.O_RDWR))
            stack.callback(os.close, signals[-1])
        with serving(tmp_path, disk, "--begin", "nightly", "--end-sessions") as server:
            pull = subprocess.Popen(
                [*command_of(name), server.uri("vm@nightly"), target],
                env={
                    **os.environ,
                    "PATH": CLIENTS_PATH,
                    "PYTHONPATH": str(tmp_path),
                    "HELD": held,
                    "BEGUN": str(begun),
                    "GO": str(go),
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(pull)
            stack.callback(pull.kill)
            readable, _, _ = select.select(signals[:1], [], [], START_TIMEOUT_S)
            assert readable, "the pull did not begin"
            # Data where there was a hole: a map of the first session would leave it out.
            with connected(server.uri("vm")) as guest:
                guest.pwrite(b"second" * 1000, 8 * MIB)
                guest.flush()
        with serving(tmp_path, disk, "--begin", "nightly"):
            os.write(signals[1], b"\n")
            _, told = pull.communicate(timeout=COMMAND_TIMEOUT_S)
    if held == "connect_uri":
        assert pull.returncode == 0, told
        assert first_difference(disk, target) is None
    else:
        assert pull.returncode == 1
        assert "nbd_pread" in told
        assert "Traceback" not in told
        assert not target.exists()
