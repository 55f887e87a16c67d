"""The XML of examples/libvirt: accepted by libvirt's schemas, turned into QEMUs, run by libvirt.

What Debian 12's libvirt cannot take is run where Debian 13's is: make interop PEERS=trixie.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import MIB, make_disk
from tests.examples.conftest import EXAMPLES
from tests.examples.libvirt import Embedded, embedded, libvirt_files
from tests.serving import COMMAND_TIMEOUT_S, run, serving, try_run

FOLDER = EXAMPLES / "libvirt"
COMMANDLINE = FOLDER / "web-commandline.xml"
RECONNECT = FOLDER / "web-reconnect.xml"
APPARMOR = FOLDER / "apparmor-libvirt-qemu"
SOCKET = "/run/fleecenbd/web/guest.sock"
UUID = "7d0e8bd1-2a43-4ba0-a46c-1d1e7a0d9b25"

TOOLS = ("virsh", "virt-xml-validate", "xmllint", "qemu-system-x86_64", "setpriv")


@pytest.fixture(scope="module", autouse=True)
def _every_tool_is_there() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


@pytest.fixture(scope="module")
def files() -> Path:
    """What Debian's packages of libvirt ship."""
    return libvirt_files()


@pytest.fixture(scope="module")
def libvirt(files: Path) -> Iterator[Embedded]:
    """libvirt's QEMU driver."""
    with embedded(files) as libvirt:
        yield libvirt


def _knows_reconnect() -> bool:
    """Whether this libvirt is later than Debian 12's."""
    major, minor, *_ = run("virsh", "--version").split(".")
    return (int(major), int(minor)) > (9, 0)


def _examples() -> list[Path]:
    """Those that are meant for the libvirt of this system."""
    return [COMMANDLINE, RECONNECT] if _knows_reconnect() else [COMMANDLINE]


def test_what_is_meant_for_this_libvirt_is_valid_by_its_schemas() -> None:
    for example in _examples():
        result = try_run("virt-xml-validate", example, "domain")
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_libvirt_refuses_what_is_meant_for_a_later_one(tmp_path: Path) -> None:
    """Else there would be no need for two."""
    refused = tmp_path / "refused.xml"
    text = RECONNECT.read_text()
    if _knows_reconnect():
        text = text.replace("<reconnect ", "<reconnect-as-planned ")
    refused.write_text(text)
    assert try_run("virt-xml-validate", refused, "domain").returncode != 0
    accepted = tmp_path / "accepted.xml"
    accepted.write_text("".join(line for line in text.splitlines(True) if "<reconnect" not in line))
    assert try_run("virt-xml-validate", accepted, "domain").returncode == 0


def _domain(example: Path, folder: Path, socket: Path) -> Path:
    """An example with another socket, emulated: a processor's help is not there everywhere."""
    text = example.read_text()
    for old, new in {"<domain type='kvm'": "<domain type='qemu'", SOCKET: str(socket)}.items():
        assert text.count(old) == 1, f"{example}: {old}"
        text = text.replace(old, new)
    path = folder / example.name
    path.write_text(text)
    path.chmod(0o644)
    return path


def test_libvirt_hands_socket_export_and_delay_to_qemu(libvirt: Embedded) -> None:
    for example in _examples():
        domain = _domain(example, libvirt.folder, Path(SOCKET))
        words = libvirt.qemu_arguments(domain)
        (disk,) = (word for word in words if SOCKET in word)
        plain = disk.replace('"', "").replace(":", "=")
        assert "export=vda," in plain
        assert "reconnect-delay=60" in plain
        assert "discard=unmap" in plain


def test_libvirt_starts_a_guest_on_a_server(libvirt: Embedded) -> None:
    for example in _examples():
        folder = libvirt.folder / example.stem  # where libvirt's QEMU may go, too
        folder.mkdir()
        disk = make_disk(folder / "vda.img", 8 * MIB)
        with serving(folder, f"vda={disk}", "--socket-mode", "666") as server:
            assert "connected to vda" not in server.messages()
            with libvirt.running(_domain(example, folder, server.unix)):
                pass
        assert "connected to vda" in server.messages()


def test_the_users_and_groups_are_those_that_libvirt_runs_qemu_as(files: Path) -> None:
    conf = (files / "etc" / "libvirt" / "qemu.conf").read_text()
    assert '#user = "libvirt-qemu"' in conf.splitlines()
    assert '#group = "libvirt-qemu"' in conf.splitlines()


def _profile(files: Path, folder: Path, local: str, line: Path) -> str:
    """A guest's AppArmor profile, as libvirt makes it, with all that it includes."""
    base = folder / "apparmor.d"
    shutil.copytree(files / "etc" / "apparmor.d", base, symlinks=True)
    for name in ("local/abstractions/libvirt-qemu", local):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (
            base / name
        ).touch()  # Debian 12's package makes the first one, empty, when it is installed
    shutil.copy(line, base / local)
    template = (base / "libvirt" / "TEMPLATE.qemu").read_text()
    profile = folder / "profile"
    profile.write_text(template.replace("LIBVIRT_TEMPLATE", f"libvirt-{UUID}"))
    (folder / "parser.conf").touch()
    candidates = [files / path for path in ("sbin/apparmor_parser", "usr/sbin/apparmor_parser")]
    parser = next(path for path in candidates if path.exists())
    command = (
        *(parser, "--config-file", folder / "parser.conf", "--base", base),
        *("--skip-kernel-load", "--skip-cache", "--quiet"),
    )
    compiled = subprocess.run(
        [*command, "--stdout", profile], capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert compiled.returncode == 0, compiled.stderr.decode()
    assert compiled.stdout, "nothing was compiled"
    return run(*command, "--preprocess", profile)


def test_apparmors_line_gets_into_the_profile_of_a_guest(files: Path, tmp_path: Path) -> None:
    places = ["local/abstractions/libvirt-qemu"]
    if "libvirt-qemu.d" in (files / "etc/apparmor.d/abstractions/libvirt-qemu").read_text():
        places.append("abstractions/libvirt-qemu.d/fleecenbd")
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        rules = _profile(files, folder, place, APPARMOR).splitlines()
        assert [rule.strip() for rule in rules].count("/run/fleecenbd/*/guest.sock rw,") == 1


def test_libvirt_writes_no_such_line_by_itself(files: Path) -> None:
    for example in _examples():
        text = example.read_text().replace("<name>", f"<uuid>{UUID}</uuid><name>")
        result = subprocess.run(
            [files / "usr/lib/libvirt/virt-aa-helper", "--dryrun", "-c", "-u", f"libvirt-{UUID}"],
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "monitor.sock" in result.stderr, "this is no profile"
        assert "guest.sock" not in result.stderr
