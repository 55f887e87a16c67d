"""libvirt without a daemon: its QEMU driver within virsh, or within virt-qemu-run.

libvirt calls these connections "embedded": https://libvirt.org/drvqemu.html. As root it would look
for the user libvirt-qemu, who is made by packages that start a daemon; so it runs as nobody.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.serving import COMMAND_TIMEOUT_S, STOP_TIMEOUT_S

LIBVIRT_FILES = Path(__file__).parents[2] / "scripts" / "libvirt-files.sh"
DOWNLOAD_TIMEOUT_S = 600.0
NOBODY = 65534

RUNNING = "guest running"
"""What virt-qemu-run says when QEMU has started and its processors run."""


def libvirt_files() -> Path:
    """The folder with what Debian's packages of libvirt ship, unpacked."""
    result = subprocess.run(
        ["sh", LIBVIRT_FILES],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, f"no files of libvirt's:\n{result.stderr}"
    return Path(result.stdout.splitlines()[-1])


class Embedded:
    """libvirt's QEMU driver with a folder of its own, where everybody may go."""

    def __init__(self, folder: Path, files: Path) -> None:
        self.folder = folder
        # The files may lie where only root may go.
        self._drivers = folder / "drivers"
        (found,) = files.glob("usr/lib/*/libvirt/connection-driver")
        shutil.copytree(found, self._drivers)
        self._run = folder / "virt-qemu-run"
        shutil.copy(files / "usr" / "bin" / "virt-qemu-run", self._run)
        self._root = folder / "root"
        (self._root / "etc").mkdir(parents=True)
        # By default a daemon, virtlogd, writes what QEMU says.
        (self._root / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')
        for path in (folder, *folder.rglob("*")):
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)

    def qemu_arguments(self, domain: Path) -> list[str]:
        """QEMU's command line for a domain's XML, its words as libvirt quotes them."""
        uri = f"qemu:///embed?root={self._root}"
        result = subprocess.run(
            [
                *(*self._as_nobody(), "virsh", "--quiet", "--connect", uri),
                *("domxml-to-native", "qemu-argv", str(domain)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    @contextmanager
    def running(self, domain: Path) -> Iterator[None]:
        """A guest that libvirt has started; ended at the end."""
        process = subprocess.Popen(
            [*self._as_nobody(), str(self._run), "-v", f"--root={self._root}", str(domain)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(),
        )
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if RUNNING in line:
                    break
            assert RUNNING in "".join(said), self._told("".join(said))
            yield
        finally:
            _end(process)

    def _told(self, said: str) -> str:
        logs = [path.read_text() for path in self._root.rglob("*.log")]
        return "\n".join([said, *logs])

    def _as_nobody(self) -> list[str]:
        if os.geteuid() != 0:
            return []
        return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]

    def _environment(self) -> dict[str, str]:
        home = str(self.folder)
        return {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "XDG_RUNTIME_DIR": home,
            "LIBVIRT_DRIVER_DIR": str(self._drivers),
        }


def _end(process: subprocess.Popen[str]) -> None:
    """Ask virt-qemu-run to end, with its guest, until it does: it may miss an early signal."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "virt-qemu-run does not end"
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2.0)


@contextmanager
def embedded(files: Path) -> Iterator[Embedded]:
    """The driver, in a folder that goes again."""
    # Not pytest's: those are closed to all but their owner. Short, for the sockets in it.
    with tempfile.TemporaryDirectory(prefix="fleecenbd-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield Embedded(folder, files)
