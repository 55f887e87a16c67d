"""QEMU and fleecenbd refuse each other an image in use: tried with the real programs."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecenbd.storage.locks import LockMode, lock_image

WRITERS = [
    ["qemu-io", "-f", "raw", "-c", "write 0 512"],
    ["qemu-img", "resize", "-q", "-f", "raw"],
    ["qemu-img", "bench", "-q", "-w", "-c", "1", "-f", "raw"],
]
COPIER = ["qemu-img", "convert", "-f", "raw", "-O", "raw"]
READER = ["qemu-img", "bench", "-q", "-c", "1", "-f", "raw"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


@contextmanager
def locked(image: Path, mode: LockMode) -> Iterator[int]:
    """An image opened and locked as a FileDevice does it."""
    descriptor = os.open(image, os.O_RDWR if mode is LockMode.EXCLUSIVE else os.O_RDONLY)
    try:
        lock_image(descriptor, str(image), mode)
        yield descriptor
    finally:
        os.close(descriptor)


def refuses(image: Path, mode: LockMode, pattern: str) -> OSError:
    """The error of a lock that must not be had."""
    with pytest.raises(OSError, match=pattern) as caught, locked(image, mode):
        pass
    return caught.value


def qemu(command: list[str], image: Path) -> subprocess.CompletedProcess[str]:
    """Run a QEMU tool on the image."""
    arguments = [*command, str(image)]
    if command[0] == "qemu-io":  # the image comes before its commands
        arguments = [*command[:-2], str(image), *command[-2:]]
    if "resize" in command:
        arguments.append("1M")
    if "convert" in command:
        arguments.append(f"{image}.copy")
    return subprocess.run(arguments, capture_output=True, text=True, timeout=30)


# QEMU against fleecenbd's locks


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: " ".join(command[:2]))
@pytest.mark.parametrize("mode", [LockMode.EXCLUSIVE, LockMode.SHARED])
def test_qemu_does_not_write_an_image_that_we_have_open(
    image: Path, mode: LockMode, command: list[str]
) -> None:
    content = image.read_bytes()
    with locked(image, mode):
        refused = qemu(command, image)
        assert refused.returncode != 0
        assert 'Failed to get "write" lock' in refused.stderr
    assert image.read_bytes() == content
    assert qemu(command, image).returncode == 0


def test_qemu_does_not_copy_an_image_that_we_write(image: Path) -> None:
    with locked(image, LockMode.EXCLUSIVE):
        refused = qemu(COPIER, image)
        assert refused.returncode != 0
        assert 'Failed to get shared "write" lock' in refused.stderr
        assert qemu([*COPIER, "-U"], image).returncode == 0
    assert qemu(COPIER, image).returncode == 0


@pytest.mark.parametrize("command", [COPIER, READER], ids=lambda command: command[1])
def test_qemu_reads_an_image_that_we_read(image: Path, command: list[str]) -> None:
    with locked(image, LockMode.SHARED):
        assert qemu(command, image).returncode == 0


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        (LockMode.EXCLUSIVE, ""),
        (LockMode.EXCLUSIVE, ",readonly=on"),
        (LockMode.SHARED, ""),
    ],
)
def test_a_virtual_machine_does_not_start_on_an_image_that_we_have_open(
    image: Path, mode: LockMode, option: str
) -> None:
    with locked(image, mode):
        refused = subprocess.run(
            virtual_machine(image, option), capture_output=True, text=True, timeout=30
        )
    assert refused.returncode != 0
    assert '"write" lock' in refused.stderr


def test_without_locks_qemu_is_let_in(image: Path) -> None:
    with locked(image, LockMode.NONE):
        assert all(qemu(command, image).returncode == 0 for command in WRITERS)


# fleecenbd against QEMU's locks


@contextmanager
def process(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program that talks over its standard streams, and is gone in the end whatever happens."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def qemu_io(image: Path, *options: str) -> Iterator[None]:
    """qemu-io, which has the image open and waits for commands."""
    with process("qemu-io", "-f", "raw", *options, image) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write("length\n")
        assert "1 MiB" in running.stdout.readline(), "it has opened the image"
        yield


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[None]:
    """qemu-nbd, whose parent process has ended: it serves the image."""
    pid_file = image.parent / "pid"
    command = ["qemu-nbd", "-f", "raw", "-t", "--fork", "-k", image.parent / "sock"]
    command += ["--pid-file", pid_file, *options, image]
    subprocess.run(command, check=True, timeout=10)
    handle = os.pidfd_open(int(pid_file.read_text()))
    try:
        yield
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], 10)[0] == [handle], "it has ended"
        os.close(handle)


def virtual_machine(image: Path, *options: str) -> list[str]:
    """A command: a machine with the image as its disk, which does not begin to run."""
    drive = f"file={image},format=raw,if=virtio" + "".join(options)
    return ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-drive", drive]


@contextmanager
def qemu_system(image: Path, *options: str) -> Iterator[None]:
    """A virtual machine that has the image as its disk, and waits for QMP's commands."""
    with process(*virtual_machine(image, *options), "-qmp", "stdio") as running:
        assert running.stdout is not None
        assert running.stdin is not None
        assert "QMP" in running.stdout.readline()
        # It greets while it still starts; the disk is there once it answers.
        running.stdin.write('{"execute": "qmp_capabilities"}\n{"execute": "query-block"}\n')
        assert "return" in running.stdout.readline()
        assert image.name in running.stdout.readline()
        yield


@pytest.mark.parametrize("program", [qemu_io, qemu_nbd, qemu_system])
@pytest.mark.parametrize("mode", [LockMode.EXCLUSIVE, LockMode.SHARED])
def test_an_image_that_qemu_writes_is_refused(image: Path, program, mode: LockMode) -> None:
    with program(image):
        name = program.__name__.replace("_", "-")
        error = refuses(image, mode, f"the image is in use by {name}.*--force-share")
        assert (error.errno, error.filename) == (errno.EBUSY, str(image))
        with locked(image, LockMode.NONE):
            pass
    with locked(image, mode):
        pass


@pytest.mark.parametrize(
    ("program", "option"), [(qemu_io, "-r"), (qemu_nbd, "-r"), (qemu_system, ",readonly=on")]
)
def test_an_image_that_qemu_only_reads_is_read_together(image: Path, program, option: str) -> None:
    with program(image, option), locked(image, LockMode.SHARED):
        assert qemu(READER, image).returncode == 0


def test_an_image_whose_reader_relies_on_it_is_not_written(image: Path) -> None:
    with qemu_system(image, ",readonly=on"):
        refuses(image, LockMode.EXCLUSIVE, "does not let others write it")


# fleecenbd against fleecenbd

SERVER = """
import asyncio, sys
from fleecenbd.storage.file import FileDevice

device = FileDevice.open(sys.argv[1], read_only=sys.argv[2] == "read")
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(image: Path, use: str) -> Iterator[int]:
    with process(sys.executable, "-c", SERVER, image, use) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "open\n"
        yield running.pid


def test_two_writers_refuse_each_other(image: Path) -> None:
    with another_process(image, "write") as pid:
        for mode in (LockMode.EXCLUSIVE, LockMode.SHARED):
            refuses(image, mode, rf"\(pid {pid}\)")
        with locked(image, LockMode.NONE):
            pass
    with locked(image, LockMode.EXCLUSIVE):  # it was killed: its locks went with it
        refuses(image, LockMode.EXCLUSIVE, rf"\(pid {os.getpid()}\)")


def test_readers_share_an_image_and_keep_writers_out(image: Path) -> None:
    with another_process(image, "read"):
        with locked(image, LockMode.SHARED), locked(image, LockMode.SHARED):
            pass
        refuses(image, LockMode.EXCLUSIVE, "does not let others write it")


def test_a_lock_holds_until_its_last_descriptor_is_closed(image: Path) -> None:
    with locked(image, LockMode.EXCLUSIVE) as descriptor:
        copy = os.dup(descriptor)
    refuses(image, LockMode.SHARED, "in use")
    os.close(copy)
    with locked(image, LockMode.SHARED):
        pass


def test_a_refused_lock_leaves_nothing_locked(image: Path) -> None:
    with locked(image, LockMode.SHARED):
        refuses(image, LockMode.EXCLUSIVE, "in use")
        with locked(image, LockMode.SHARED):
            pass


def test_an_image_that_is_locked_whole_is_in_use(image: Path) -> None:
    with image.open("r+b") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        # A lock of this very process would not count: ask from another one.
        program = f"from tests.storage.test_locks import *; locked(Path({str(image)!r}), "
        program += "LockMode.SHARED).__enter__()"
        refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "another program has locked it whole" in refused.stderr


def test_a_file_system_that_cannot_lock_says_what_to_do(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*arguments: object) -> bytes:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", without_locks)
    refuses(image, LockMode.SHARED, "cannot be locked.*--force-share")
    with locked(image, LockMode.NONE):
        pass
