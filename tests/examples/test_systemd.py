"""The units of examples/systemd: sound by systemd's own checks, and their command run on sockets.

systemd itself does not run here: systemd-socket-activate makes the sockets that the socket units
ask for, and then the unit's own ExecStart= runs, with the words that systemd would give it.
"""

import re
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from fleecenbd.server.ending import CLOSE_DEADLINE_S, STOP_DEADLINE_S
from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.examples.conftest import EXAMPLES
from tests.examples.units import (
    CONF,
    DROP_IN,
    FOLDER,
    INSTANCE,
    PROGRAM,
    SERVICE,
    UNITS,
    USERS,
    first_steps,
    moved,
    setting,
    settings,
    start_words,
    unit_server,
)
from tests.serving import COMMAND_TIMEOUT_S, FLEECENBD, connected, run, try_run

EXPOSURE_MAX = 1.5
"""Of 10, by systemd-analyze security: what is left is what the server needs (see the unit)."""

LUKS_MAGIC = b"LUKS\xba\xbe\0\2"

TOOLS = ("systemd-analyze", "systemd-socket-activate", "systemd-sysusers", "qemu-io", "nbdcopy")


@pytest.fixture(scope="module", autouse=True)
def _every_tool_is_there() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


def _installed(folder: Path) -> list[Path]:
    """The units for the instance `web`, with a program that is there."""
    for unit in UNITS:
        text = unit.read_text()
        assert text.count(PROGRAM) == (unit == SERVICE)
        (folder / unit.name).write_text(text.replace(PROGRAM, str(FLEECENBD)))
    drop_ins = folder / f"fleecenbd@{INSTANCE}.service.d"
    drop_ins.mkdir()
    shutil.copy(DROP_IN, drop_ins / "lvm.conf")
    return [folder / unit.name.replace("@", f"@{INSTANCE}") for unit in UNITS]


def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    result = try_run("systemd-analyze", "verify", "--man=no", *_installed(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("unit", [*UNITS, DROP_IN])
def test_a_fault_would_be_found(unit: Path, tmp_path: Path) -> None:
    installed = _installed(tmp_path)
    path = next(tmp_path.rglob("lvm.conf")) if unit == DROP_IN else tmp_path / unit.name
    path.write_text(
        re.sub(r"(?m)^\[(Service|Socket)\]$", r"[\1]\nNoSuchThing=yes", path.read_text())
    )
    assert "NoSuchThing" in try_run("systemd-analyze", "verify", "--man=no", *installed).stderr


def test_the_service_is_locked_up() -> None:
    result = try_run(
        *("systemd-analyze", "security", "--no-pager", "--offline=true"),
        *(f"--threshold={round(EXPOSURE_MAX * 10)}", SERVICE),
    )
    score = re.search(r"Overall exposure level.*: ([0-9.]+) ", result.stdout)
    assert score, result.stdout + result.stderr
    print(f"\nexposure: {score[1]}")
    assert result.returncode == 0, result.stdout


def test_stopping_is_given_the_time_that_the_server_takes() -> None:
    longest_s = 3 * STOP_DEADLINE_S + 2 * CLOSE_DEADLINE_S
    assert float(setting(SERVICE, INSTANCE, "TimeoutStopSec")) >= longest_s + 10


def test_no_reload_is_pretended() -> None:
    assert not [key for key in settings(SERVICE, INSTANCE) if "Reload" in key]


def test_the_user_is_made(tmp_path: Path) -> None:
    user = setting(SERVICE, INSTANCE, "User")
    (tmp_path / "etc").mkdir()
    run("systemd-sysusers", f"--root={tmp_path}", USERS)
    assert f"\n{user}:" in "\n" + (tmp_path / "etc" / "passwd").read_text()
    assert f"\n{user}:" in "\n" + (tmp_path / "etc" / "group").read_text()


def test_a_guest_sees_all_and_a_backup_fleecing_exports_only(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "web.raw", 4 * MIB)
    with unit_server(tmp_path) as server:
        server.start_with(start_words(tmp_path, disk, SESSION="--begin nightly"))
        for name, exports in {"guest": {"vda", "vda@nightly"}, "backup": {"vda@nightly"}}.items():
            path = moved(f"/run/fleecenbd/{INSTANCE}/{name}.sock", tmp_path)
            listed = run("nbdinfo", "--list", f"nbd+unix://?socket={path}")
            assert set(re.findall('export="(.*)"', listed)) == exports
        assert (tmp_path / "state").is_dir(), "the temp image is somewhere else"


class QemuIo:
    """qemu-io, told what to do line by line: a guest as far as reconnecting goes."""

    def __init__(self, image: str) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", "--image-opts", image],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def ask(self, line: str) -> None:
        """Have it do something, and go on at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def wait_for(self, words: str) -> None:
        """Wait until it has said this."""
        assert self.process.stdout is not None
        said = b""
        while words.encode() not in said:
            readable, _, _ = select.select([self.process.stdout], [], [], COMMAND_TIMEOUT_S)
            data = self.process.stdout.read(4096) if readable else b""
            assert data, f"{words} was waited for in vain: {said.decode()}"
            said += data

    def close(self) -> None:
        """Let it go by itself."""
        self.process.communicate(b"quit\n", timeout=COMMAND_TIMEOUT_S)
        assert self.process.returncode == 0


def test_a_restart_begins_a_session_and_the_guest_only_waits(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "web.raw", 4 * MIB)
    folder = tmp_path / "fleecenbd" / INSTANCE
    with unit_server(tmp_path) as server:
        server.start_with(start_words(tmp_path, disk))
        guest = QemuIo(
            "driver=nbd,server.type=unix,export=vda,reconnect-delay=60,"
            f"server.path={folder / 'guest.sock'}"
        )
        guest.ask("write -P 7 0 1M")
        guest.wait_for("wrote 1048576/1048576")
        assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
        before = copy_disk(disk, tmp_path / "before.raw")
        guest.ask("write -P 9 512k 1M")
        (folder / "session.conf").write_text('SESSION="--begin nightly"\n')
        server.start_with(start_words(tmp_path, disk))
        guest.wait_for("wrote 1048576/1048576")
        backup = tmp_path / "backup.raw"
        run("nbdcopy", f"nbd+unix:///vda@nightly?socket={folder / 'backup.sock'}", backup)
        guest.close()
    assert first_difference(before, backup) is None
    assert first_difference(disk, backup) is not None


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_disk_is_called_raw(path: Path) -> None:
    disks = re.findall(r"\bvd[a-z]=(\S+)", path.read_text())
    assert disks or path != CONF
    for disk in disks:
        assert disk.startswith("raw:"), f"{path.name}: {disk}: a guest could keep it from starting"


def test_what_a_guest_writes_to_its_disk_does_not_keep_the_server_from_starting(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "web.raw", 4 * MIB)
    socket = tmp_path / "fleecenbd" / INSTANCE / "guest.sock"
    with unit_server(tmp_path) as server:
        server.start_with(start_words(tmp_path, disk))
        with connected(f"nbd+unix:///vda?socket={socket}") as guest:
            guest.pwrite(LUKS_MAGIC.ljust(512, b"\0"), 0)
        assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
        words = start_words(tmp_path, disk)
        server.start_with(words)
        assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
        with pytest.raises(AssertionError, match="ended before it was ready"):
            server.start_with([word.replace("raw:", "") for word in words])
        assert "the content is a LUKS container" in server.log.read_text()


PLACES = {
    "fleecenbd@.service": "etc/systemd/system/fleecenbd@.service",
    "fleecenbd@.socket": "etc/systemd/system/fleecenbd@.socket",
    "fleecenbd-backup@.socket": "etc/systemd/system/fleecenbd-backup@.socket",
    "web-lvm.conf": "etc/systemd/system/fleecenbd@web.service.d/lvm.conf",
    "sysusers.conf": "etc/sysusers.d/fleecenbd.conf",
    "web.conf": "etc/fleecenbd/web.conf",
    "backup.sh": "opt/fleecenbd/examples/systemd/backup.sh",
    "../backup-nbdcopy.sh": "opt/fleecenbd/examples/backup-nbdcopy.sh",
}


def test_the_first_steps_put_each_file_where_it_is_looked_for(tmp_path: Path) -> None:
    lines = first_steps(tmp_path)
    installed = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert installed == {
        tmp_path / place: (FOLDER / name).read_bytes() for name, place in PLACES.items()
    }
    for path in installed:
        assert path.stat().st_mode & 0o777 == (0o755 if path.suffix == ".sh" else 0o644)
    (conf, _) = settings(SERVICE, INSTANCE)["EnvironmentFile"]
    assert conf == f"/{PLACES['web.conf']}"
    run("systemd-sysusers", f"--root={tmp_path}")
    assert "\nfleecenbd:" in "\n" + (tmp_path / "etc" / "passwd").read_text()
    (link,) = [line.split() for line in lines if line.startswith("ln ")]
    assert link[3] + Path(link[2]).name == PROGRAM
    assert link[2] in (EXAMPLES.parent / "docs" / "quickstart.md").read_text()


def test_sockets_in_the_options_are_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "web.raw", 4 * MIB)
    with unit_server(tmp_path) as server:
        words = start_words(tmp_path, disk, OPTIONS=f"-U {tmp_path}/own.sock")
        with pytest.raises(AssertionError, match="ended before it was ready"):
            server.start_with(words)
        assert "--unix cannot be given under socket activation" in server.log.read_text()
