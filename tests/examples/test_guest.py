"""A Linux guest, started as examples/guest says, on a server that comes late and is restarted."""

import json
import select
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disks import MIB
from tests.examples.conftest import EXAMPLES
from tests.guest.filesystem import faults, make_filesystem
from tests.guest.initramfs import Kernel, build_initramfs, fetched_kernel
from tests.guest.machine import BOOT_TIMEOUT_S, COMMAND_TIMEOUT_S, Machine, booted
from tests.guest.restarting import OwnSocket, restarting

GUEST = EXAMPLES / "guest" / "guest.sh"
SIZE = 64 * MIB


@dataclass(frozen=True)
class ScriptedMachine(Machine):
    """A machine whose command line is a script's; only what a test needs is added."""

    script: Path = GUEST

    @property
    def qmp(self) -> Path:
        """QEMU's control socket."""
        return self.folder / "qmp.sock"

    def command(self, kernel_log: Path) -> list[str]:
        """The script's command line; always emulated, so that it is the same everywhere."""
        return [
            *("env", "MACHINE=q35,accel=tcg", "MEMORY=256M"),
            *(str(self.script), str(self.socket), self.export, "-no-reboot"),
            *("-kernel", str(self.kernel.image), "-initrd", str(self.initramfs)),
            *("-append", "console=ttyS0 quiet mitigations=off panic=-1"),
            *("-chardev", f"file,id=kernel,path={kernel_log}", "-serial", "chardev:kernel"),
            *("-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands"),
            *("-qmp", f"unix:{self.qmp},server=on,wait=off"),
        ]


@pytest.fixture(scope="module", autouse=True)
def _every_tool_is_there() -> None:
    missing = [tool for tool in ("qemu-system-x86_64", "debugfs") if shutil.which(tool) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """A kernel for the guest."""
    return fetched_kernel()


@pytest.fixture(scope="module")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's first root file system."""
    return build_initramfs(kernel, tmp_path_factory.mktemp("guest") / "initramfs")


@contextmanager
def starting_late(server: OwnSocket) -> Iterator[None]:
    """Start a server, in the background, when a client has come in vain; wait for that in the end.

    The socket is there, but whoever connects is turned away; then it is not there for a moment.
    """
    with ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX) as refusing:
        refusing.bind(str(server.unix))
        refusing.listen()
        refusing.settimeout(BOOT_TIMEOUT_S)

        def start() -> None:
            refusing.accept()[0].close()
            server.unix.unlink()
            server.start()

        started = pool.submit(start)
        yield
        started.result()


class Qmp:
    """QEMU's control socket, as far as it is needed here: docs/interop/qmp-spec of QEMU."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._received = b""
        self._events: list[str] = []
        self.run("qmp_capabilities")

    def run(self, command: str) -> None:
        """Run a command, which must succeed."""
        self._socket.sendall(json.dumps({"execute": command}).encode())
        while "return" not in (message := self._next(COMMAND_TIMEOUT_S)):
            assert "error" not in message, message

    def wait_for(self, event: str) -> None:
        """Wait until an event has come since the last such wait."""
        while event not in self._events:
            self._next(COMMAND_TIMEOUT_S)
        self._events.clear()

    def comes(self, event: str, within_s: float) -> bool:
        """Whether an event comes in that time, or has come since the last wait."""
        deadline = time.monotonic() + within_s
        while event not in self._events:
            left_s = deadline - time.monotonic()
            is_here = b"\n" in self._received
            if not is_here and not select.select([self._socket], [], [], max(0.0, left_s))[0]:
                return False
            self._next(COMMAND_TIMEOUT_S)
        self._events.clear()
        return True

    def _next(self, timeout_s: float) -> dict[str, str]:
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._received:
            data = self._socket.recv(65536)
            assert data, "QEMU has gone"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, str] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message


def test_a_guest_waits_for_its_server_and_sits_out_a_restart(
    tmp_path: Path, kernel: Kernel, initramfs: Path
) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    disk = make_filesystem(folder / "vm.raw", SIZE)
    server = OwnSocket(folder, disk)
    machine = ScriptedMachine(kernel, initramfs, tmp_path, server.unix)
    try:
        with starting_late(server), booted(machine) as guest:
            guest.mount()
            guest.start_writer("/files", 20)
            assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
            guest.wait_writing()
            server.start()
            guest.wait_fsynced(5)
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
            assert guest.kernel_faults() == []
        assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
    finally:
        server.close()
    assert len(told) > 5
    assert faults(disk, told) == []


def test_a_guest_whose_server_stays_away_is_stopped_and_loses_nothing(
    tmp_path: Path, kernel: Kernel, initramfs: Path
) -> None:
    impatient = tmp_path / "guest.sh"
    script = GUEST.read_text()
    assert script.count("reconnect-delay=60") == 1
    impatient.write_text(script.replace("reconnect-delay=60", "reconnect-delay=1"))
    impatient.chmod(0o755)
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    with restarting(OwnSocket, tmp_path, disk) as server:
        machine = ScriptedMachine(kernel, initramfs, tmp_path, server.unix, script=impatient)
        with booted(machine) as guest:
            qmp = Qmp(machine.qmp)
            guest.mount()
            guest.start_writer("/files", 20)
            assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
            qmp.wait_for("BLOCK_IO_ERROR")
            qmp.wait_for("STOP")
            server.start()
            # Until QEMU has found the server, the same requests fail again at once.
            told_before = guest.ledger.counts()
            deadline = time.monotonic() + COMMAND_TIMEOUT_S
            while guest.ledger.counts() == told_before:
                assert time.monotonic() < deadline, guest.told()
                qmp.run("cont")
                qmp.comes("STOP", 0.5)
            guest.wait_fsynced(5)
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
            assert guest.kernel_faults() == []
    assert len(told) > 5
    assert faults(disk, told) == []
