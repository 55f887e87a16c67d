"""libvirt without a daemon: its QEMU driver within virsh, or within virt-qemu-run.

libvirt calls these connections "embedded": https://libvirt.org/drvqemu.html. As root it would look
for the user libvirt-qemu, who is made by packages that start a daemon; so it runs as nobody.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIBVIRT_FILES = Path(__file__).parents[2] / "scripts" / "libvirt-files.sh"
DOWNLOAD_TIMEOUT_S = 600.0
END_TIMEOUT_S = 15.0
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
        self._roots = 0
        for path in (folder, *folder.rglob("*")):
            _give_away(path)

    def _new_root(self) -> Path:
        """A folder for libvirt's files; its own each time, as one that was killed leaves some."""
        self._roots += 1
        root = self.folder / f"root{self._roots}"
        (root / "etc").mkdir(parents=True)
        # By default a daemon, virtlogd, writes what QEMU says.
        (root / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')
        for path in (root, *root.rglob("*")):
            _give_away(path)
        return root

    def qemu_arguments(self, domain: Path) -> list[str]:
        """QEMU's command line for a domain's XML, its words as libvirt quotes them."""
        uri = f"qemu:///embed?root={self._new_root()}"
        # A line is out when it is printed, whatever becomes of the end: see _end().
        process = self._start(
            *("stdbuf", "-oL", "virsh", "--quiet", "--connect", uri),
            *("domxml-to-native", "qemu-argv", str(domain)),
        )
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "qemu-system" in line:
                    return line.split()
            raise AssertionError("".join(said))
        finally:
            _end(process)

    @contextmanager
    def running(self, domain: Path) -> Iterator[None]:
        """A guest that libvirt has started; ended at the end."""
        root = self._new_root()
        process = self._start(str(self._run), "-v", f"--root={root}", str(domain))
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if RUNNING in line:
                    break
            assert RUNNING in "".join(said), _told(root, "".join(said))
            yield
        finally:
            _end(process)
            _kill_qemu(root, domain)

    def _start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._as_nobody(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(),
        )

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


def _give_away(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)


def _told(root: Path, said: str) -> str:
    return "\n".join([said, *(path.read_text() for path in root.rglob("*.log"))])


def _kill_qemu(root: Path, domain: Path) -> None:
    """End what was left running: its file goes with it otherwise."""
    name = re.search("<name>(.*)</name>", domain.read_text())
    assert name, domain
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = int((root / "run" / "qemu" / f"{name[1]}.pid").read_text())
        os.kill(pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    """End virsh or virt-qemu-run, their work being done; by force, if need be.

    Where the first process reaps no orphans, as a test runner in a container, libvirt waits for a
    QEMU that it has killed.
    """
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextmanager
def embedded(files: Path) -> Iterator[Embedded]:
    """The driver, in a folder that goes again."""
    # Not pytest's: those are closed to all but their owner. Short, for the sockets in it.
    with tempfile.TemporaryDirectory(prefix="fleecenbd-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield Embedded(folder, files)
