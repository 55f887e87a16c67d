"""A disk that is being backed up and overwritten at the same time: what examples are tried on."""

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disks import KIB, MIB, copy_disk, first_difference, make_disk
from tests.serving import START_TIMEOUT_S, Serving, connected, serving, try_run

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = 40 * MIB + 512  # odd, and more than two steps of the pulls with TRIM
WRITES_FIRST = 40


@dataclass(frozen=True)
class Done:
    """How an example ended."""

    status: int
    stdout: str
    stderr: str


def example(name: str, *arguments: str | Path) -> Done:
    """Run an example to its end as a user does: a Python one by the checkout's interpreter."""
    return _ended(*command_of(name), *arguments)


def command_of(name: str) -> list[str | Path]:
    """What runs an example, without its arguments."""
    path = EXAMPLES / name
    return [sys.executable, path] if path.suffix == ".py" else [path]


def _ended(*command: str | Path) -> Done:
    result = try_run(*command)
    assert "Traceback" not in result.stderr, result.stderr
    return Done(result.returncode, result.stdout, result.stderr)


def example_without_space(tmp_path: Path, name: str, uri: str, size: str) -> tuple[Done, Path]:
    """Run an example whose target is on a file system of `size` (as mount has it, "1m").

    Returns with how it ended a folder with what it left there. The target is called `backup`.
    """
    small, left = tmp_path / "small", tmp_path / "left"
    small.mkdir()
    left.mkdir()
    script = (
        f'mount -t tmpfs -o size={size} tmpfs "{small}"; "$@"; status=$?; '
        f'cp --sparse=always "{small}/"* "{left}" 2>/dev/null; exit $status'
    )
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    prefix = ("unshare", "--mount", *user, "sh", "-c", script, "sh")
    return _ended(*prefix, *command_of(name), uri, small / "backup"), left


class Guest:
    """A thread that overwrites disks at random, all of them in turn, until told to stop."""

    def __init__(self, uris: list[str], size: int) -> None:
        self.uris = uris
        self.size = size
        self.writes = 0
        self.stop = threading.Event()
        self.has_begun = threading.Event()
        self.failures: list[BaseException] = []

    def run(self) -> None:
        """Write, with a pause after each write that leaves the backup its share of the machine."""
        try:
            dice = random.Random("guest")
            with ExitStack() as stack:
                clients = [stack.enter_context(connected(uri)) for uri in self.uris]
                while not self.stop.wait(0.001):
                    length = dice.choice([512, 4 * KIB, 64 * KIB])
                    offset = dice.randrange(0, self.size - length + 1, 512)
                    for client in clients:
                        client.pwrite(dice.randbytes(length), offset)
                    self.writes += 1
                    if self.writes == WRITES_FIRST:
                        self.has_begun.set()
        except BaseException as error:
            self.failures.append(error)
            self.has_begun.set()


@contextmanager
def writing(server: Serving, disks: list[str], size: int) -> Iterator[Guest]:
    """A guest that has begun to write, and writes on to the end of the block; none may fail."""
    guest = Guest([server.uri(disk) for disk in disks], size)
    thread = threading.Thread(target=guest.run)
    thread.start()
    try:
        assert guest.has_begun.wait(START_TIMEOUT_S), "the guest did not get to write"
        assert not guest.failures, guest.failures
        yield guest
    finally:
        guest.stop.set()
        thread.join()
    assert not guest.failures, guest.failures


@dataclass(frozen=True)
class Busy:
    """A server with disks that a guest overwrites all the time, and copies made before that."""

    server: Serving
    guest: Guest
    before: dict[str, Path]

    @property
    def backup(self) -> str:
        """URI of the fleecing export of `vm`."""
        return self.server.uri("vm@nightly")

    def has_written_since(self, writes: int) -> bool:
        """Did the guest write after it had made so many writes?"""
        return self.guest.writes > writes


@contextmanager
def busy_server(folder: Path, *names: str, options: tuple[str, ...] = ()) -> Iterator[Busy]:
    """Disks under the session `nightly`, and a guest that writes to all of them."""
    disks, before = [], {}
    for index, name in enumerate(names):
        disk = make_disk(folder / f"{name}.img", SIZE, seed=index, islands=120)
        before[name] = copy_disk(disk, folder / f"{name}.before")
        disks.append(f"{name}={disk}")
    with (
        serving(folder, *disks, "--begin", "nightly", *options) as server,
        writing(server, list(names), SIZE) as guest,
    ):
        yield Busy(server, guest, before)
    for name in names:
        assert first_difference(before[name], folder / f"{name}.img"), "nothing was overwritten"


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    """The disk `vm`, overwritten all the time."""
    with busy_server(tmp_path, "vm") as busy:
        yield busy
