"""What goes wrong before a server is there: one line, the object, the cause, the way out."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

import fleecenbd
from fleecenbd.cli import command_line, main
from fleecenbd.cli.errors import HINTS, reason
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.locks import LockMode, lock_image
from fleecenbd.storage.temp import TempImage
from tests.cli.conftest import Fails
from tests.serving import FLEECENBD


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 1 MiB in the current directory, whose name is short."""
    monkeypatch.chdir(tmp_path)
    image = Path("vm.raw")
    image.write_bytes(bytes(1 << 20))
    return image


# -- images --------------------------------------------------------------------------------------


def test_a_missing_image_is_named(fails: Fails) -> None:
    line = fails("serve", "vda=missing.raw", "-U", "-")
    assert line == (
        "fleecenbd: cannot open disk vda: missing.raw: No such file or directory (check the path)"
    )


def test_a_file_with_an_equals_sign_in_its_name_is_not_just_missing(fails: Fails) -> None:
    whole = Path("vda=missing.raw")
    whole.write_bytes(bytes(4096))
    line = fails("serve", str(whole), "-U", "-")
    assert line.endswith("where the file vda=missing.raw is meant, write NAME=vda=missing.raw")
    assert "missing/f.sock" in fails("serve", f"vdb={whole}", "-U", "missing/f.sock")


def test_a_directory_is_no_image(fails: Fails, tmp_path: Path) -> None:
    assert f"{tmp_path}: neither a regular file nor a block device" in fails("serve", tmp_path)


def test_an_empty_image_is_refused(fails: Fails, image: Path) -> None:
    image.write_bytes(b"")
    assert "vm.raw: the image is empty" in fails("serve", image)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
        (b"KDMV", "VMDK"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "VDI"),
        (b"LUKS\xba\xbe", "LUKS"),
    ],
)
def test_a_container_is_refused_with_its_kind_and_the_way_to_mean_it(
    fails: Fails, image: Path, content: bytes, kind: str
) -> None:
    image.write_bytes(content + bytes(4096))
    line = fails("serve", image)
    assert f"vm.raw: the content is a {kind} container" in line
    assert "raw:vm.raw" in line


def test_a_container_that_is_meant_is_served(fails: Fails, image: Path) -> None:
    image.write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(4096))
    # It gets past the image, to the socket.
    assert "missing/f.sock" in fails("serve", "raw:vm.raw", "-U", "missing/f.sock")


LOCKS = """
import sys
from fleecenbd.storage.locks import LockMode, lock_image
with open(sys.argv[1], "r+b") as image:
    lock_image(image.fileno(), "vm.raw", LockMode.EXCLUSIVE)
    print(flush=True)
    sys.stdin.read()
"""


def test_an_image_that_another_program_has_locked_is_refused(fails: Fails, image: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOCKS, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        line = fails("serve", image)
        assert re.search(rf"vm.raw: the image is in use by \S+ \(pid {other.pid}\)", line)
        assert "--force-share" in line
        assert "missing/f.sock" in fails("serve", image, "--force-share", "-U", "missing/f.sock")
        other.communicate()
    assert "missing/f.sock" in fails("serve", image, "-U", "missing/f.sock")


def test_readers_may_share_an_image(fails: Fails, image: Path) -> None:
    with image.open("rb") as other:
        lock_image(other.fileno(), "vm.raw", LockMode.SHARED)
        assert "in use" in fails("serve", image)
        assert "missing/f.sock" in fails("serve", image, "--read-only", "-U", "missing/f.sock")


@pytest.mark.parametrize(
    ("options", "way_out"), [((), "--read-only"), (("--read-only",), "may read it")]
)
def test_an_image_without_the_right_to_it_says_who_has_it(
    fails: Fails,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    way_out: str,
) -> None:
    def refuse(path: str, **_: object) -> FileDevice:  # root may do everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(FileDevice, "open", refuse)
    line = fails("serve", image, *options)
    assert "vm.raw: Permission denied" in line
    assert way_out in line


def test_one_image_under_two_names_is_wrong_usage(fails: Fails, image: Path) -> None:
    os.link(image, "link.raw")
    line = fails("serve", "vda=vm.raw", "vdb=link.raw", "--force-share", status=2)
    assert "vda and vdb are the same image" in line


@pytest.mark.parametrize(
    ("disks", "words"),
    [
        (("x/vm.raw", "y/vm.raw"), ("two disks are called vm", "x/vm.raw", "y/vm.raw")),
        (("nbd://host",), ("nbd://host", "write NAME=nbd://host")),
        (
            ("a=nbd://127.0.0.1/vm", "b=nbd://127.0.0.1:10809/vm"),
            ("a and b are the same image, nbd://127.0.0.1:10809/vm",),
        ),
        (("my disk.raw",), ("my disk", "write NAME=my disk.raw")),
    ],
)
def test_disks_that_cannot_be_meant_are_wrong_usage(
    fails: Fails, disks: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = fails("serve", *disks, status=2)
    for word in words:
        assert word in line


# -- sockets -------------------------------------------------------------------------------------


def test_a_socket_in_use_is_refused(fails: Fails, image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("f.sock")
        other.listen()
        line = fails("serve", image, "-U", "f.sock")
        assert "cannot listen on f.sock: the socket is in use" in line
        line = fails("serve", image, "-U", "-", "--begin", "n", "--backup-unix", "f.sock")
        assert "cannot listen on f.sock: the socket is in use" in line


def test_a_port_in_use_is_refused_and_leaves_no_socket_file(fails: Fails, image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fails("serve", image, "-U", "f.sock", "-i", "127.0.0.1", "-p", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: the port is in use" in line
    assert not Path("f.sock").exists()


def test_the_default_socket_s_directory_is_made(
    fails: Fails, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    # The address fails, after the socket: no server stays behind.
    fails("serve", image, "-i", "192.0.2.1")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "options",
    [
        ("--single", "-U", "f.sock"),
        ("--single", "-p", "10809"),
        ("--single", "-i", "127.0.0.1"),
        ("--single", "--backup-unix", "f.sock"),
        ("--single", "--backup-port", "1"),
        ("--single", "--run", "true"),
        ("--single", "--socket-mode", "660"),
    ],
)
def test_single_and_sockets_exclude_each_other(
    fails: Fails, image: Path, options: tuple[str, ...]
) -> None:
    line = fails("serve", image, *options, status=2)
    assert "--single" in line
    assert line.count("--") >= 2


@pytest.mark.parametrize(
    "option",
    [
        ("--temp-limit", "1G"),
        ("--cluster-size", "64k"),
        ("--on-cbw-error", "break-snapshot"),
        ("--cbw-timeout", "1"),
        ("--ttl", "1"),
        ("--idle-ttl", "1"),
    ],
)
def test_a_session_s_options_need_a_session(
    fails: Fails, image: Path, option: tuple[str, str]
) -> None:
    assert f"{option[0]} cannot be given without --begin" in fails(
        "serve", image, *option, status=2
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--begin", "a@b"), "a session's name"),
        (("--begin", "n", "--cluster-size", "3k"), "--cluster-size is a power of two"),
        (("--begin", "n", "--cluster-size", "2k"), "--cluster-size is a power of two"),
        (("--begin", "n", "--temp-limit", "much"), "--temp-limit: 'much' is no size"),
        (
            ("--begin", "n", "--cbw-timeout", "-1"),
            "--cbw-timeout: '-1' is no time: 0 or more seconds",
        ),
        (("--begin", "n", "--cbw-timeout", "nan"), "'nan' is no time: 0 or more seconds"),
        (("--begin", "n", "--cbw-timeout", "inf"), "'inf' is no time: 0 or more seconds"),
        (("--begin", "n", "--cbw-timeout", "soon"), "'soon' is no time: 0 or more seconds"),
        (("--begin", "n", "--temp-limit", "0"), "less than one cluster of 4096 bytes"),
        (("--begin", "n", "--temp-limit", "4095"), "less than one cluster of 4096 bytes"),
        (
            ("--begin", "n", "--temp-limit", "4k", "--cluster-size", "8k"),
            "--temp-limit: 4k is less than one cluster of 8192 bytes",
        ),
        (("--ip", ""), "--ip: '' names nothing"),
        (("--state-dir", ""), "--state-dir: '' names nothing"),
        (("--begin", "n", "--backup-unix", ""), "--backup-unix: '' names nothing"),
        (("--begin", "n", "--backup-unix", "-"), "--backup-unix: '-' names no socket"),
        (("-U", "f", "--control", "./f"), "./f is given twice, by --unix and by --control"),
        (("--control", "f", "-P", "f"), "f is given twice, by --control and by --pidfile"),
        (("--control", ""), "--control: '' names nothing"),
        (("--metrics", "9100"), "'9100' is no ADDR:PORT, as in 127.0.0.1:9100 or [::1]:9100"),
        (("--metrics", "::1:9100"), "is no ADDR:PORT"),
        (("--metrics", "127.0.0.1:"), "--metrics: '' is no port"),
        (("--begin", "n", "--ttl", "0"), "--ttl: '0' is no time after which it could end"),
        (("--begin", "n", "--idle-ttl", "soon"), "--idle-ttl: 'soon' is no time"),
        (("--hook-timeout", "-1"), "--hook-timeout: '-1' is no time"),
        (("--single", "--freeze-cmd", "true"), "--freeze-cmd cannot be given without a control"),
        (("-p", "70000"), "--port: '70000' is no port: 0 to 65535"),
        (("-p", "-1"), "--port: '-1' is no port: 0 to 65535"),
        (("--begin", "n", "--backup-port", "x"), "--backup-port: 'x' is no port: 0 to 65535"),
        (("--begin", "n", "-p", "9", "--backup-port", "9"), "port 9 is given twice"),
        (("-U", "f", "--begin", "n", "--backup-unix", "./f"), "./f is given twice, by --unix and"),
        (("-U", "f", "-P", "./f"), "./f is given twice, by --unix and by --pidfile"),
        (
            ("-U", "-", "--begin", "n", "--backup-unix", "f", "-P", "f"),
            "f is given twice, by --backup-unix and by --pidfile",
        ),
        (("--begin", "n", "--on-cbw-error", "panic"), "break-guest-write"),
        (("--default-export", "vdz"), "there will be vm"),
        (("--begin", "n", "-e", "vm@m"), "there will be vm, vm@n"),
        (("--socket-mode", "rw"), "--socket-mode"),
        (("--socket-group", "no-such-group"), "--socket-group"),
        (("--unix", ""), "--unix"),
        (("--port", "65536"), "--port: '65536' is no port: 0 to 65535"),
        (("--port", "x"), "--port: 'x' is no port: 0 to 65535"),
        (("--shared", "-1"), "--shared: '-1' is no number of connections"),
        (("--shared", "x"), "--shared: 'x' is no number of connections"),
        (("--log-level", "loud"), "'--log-level': 'loud' is not one of 'debug'"),
        (("--begin", "n", "--begin", "m"), "Invalid value for --begin: it is given twice"),
        (("-U", "f", "--unix", "g"), "Invalid value for --unix: it is given twice"),
        (("-r", "-r"), "Invalid value for --read-only: it is given twice"),
        (("--no-such-option",), "--no-such-option"),
        (("--begin",), "--begin"),
    ],
)
def test_values_that_make_no_sense_are_wrong_usage(
    fails: Fails, image: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in fails("serve", image, *options, status=2)


def test_a_temp_limit_below_the_cluster_of_a_large_disk_fails_the_session(
    fails: Fails, image: Path
) -> None:
    os.truncate(image, (256 << 30) + 4096)  # past 256 GiB, clusters are 8 KiB
    options = ("-U", "-", "--state-dir", "state", "--begin", "n", "--temp-limit", "4k")
    line = fails("serve", image, *options)
    assert "cannot begin session n: vm@n: a temp limit of 4096 bytes" in line
    assert "one cluster of 8192 bytes" in line


def test_single_without_a_socket_on_standard_input_is_wrong_usage(
    fails: Fails, image: Path
) -> None:
    assert "standard input is no connected" in fails("serve", image, "--single", status=2)


def test_a_state_directory_that_cannot_be_made_fails_the_session(fails: Fails, image: Path) -> None:
    Path("file").touch()
    for directory in ("file", "file/state"):
        options = ("--begin", "nightly", "--state-dir", directory)
        line = fails("serve", image, "-U", "f.sock", *options)
        assert line == (
            "fleecenbd: cannot use the state directory: file: there is a file of this name, which "
            "is no folder; give another folder with --state-dir"
        )
        assert not Path("f.sock").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_a_temp_image_that_cannot_be_made_names_its_folder_and_the_option(
    fails: Fails, image: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> TempImage:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(TempImage, "create", refuse)
    monkeypatch.setattr(TempImage, "create_named", refuse)
    line = fails("serve", image, "-U", "f.sock", "--begin", "n", "--state-dir", "state")
    folder = Path("state/files").absolute()
    assert line == (
        f"fleecenbd: cannot begin session n: {folder}: {os.strerror(number)}; give another "
        "folder with --temp-dir, or --state-dir"
    )
    line = fails("serve", image, "--begin", "n", "--state-dir", "state", "--run", "true")
    assert line == (
        f"fleecenbd: cannot begin session n: state: {os.strerror(number)}; give another folder "
        "for temp images with --temp-dir, or --state-dir"
    )


def test_a_pidfile_that_cannot_be_written_fails_the_start(fails: Fails, image: Path) -> None:
    line = fails("serve", image, "-U", "f.sock", "-P", "missing/pid")
    assert "cannot write the pidfile missing/pid: No such file" in line
    assert not Path("f.sock").exists()


# -- the command itself --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("serve",), ("--nope",)])
def test_wrong_usage_is_one_line_that_names_the_help(
    fails: Fails, arguments: tuple[str, ...]
) -> None:
    assert "fleecenbd serve --help" in fails(*arguments, status=2)


def test_a_command_that_is_none_is_told_with_those_like_it(fails: Fails) -> None:
    for words, told in (
        (("no-such-command",), "No such command 'no-such-command'; see fleecenbd --help"),
        (("serv",), "No such command 'serv'. Did you mean 'serve'? see fleecenbd --help"),
        (("session", "finsh"), "'finish'? see fleecenbd --help, fleecenbd session --help"),
        (("session", "start"), "'begin'? see fleecenbd --help, fleecenbd session --help"),
    ):
        assert fails(*words, status=2).endswith(told)


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capfd.readouterr().out == f"fleecenbd {fleecenbd.__version__}\n"


@pytest.mark.usefixtures("own_logs")
def test_help_tells_every_option_with_its_default(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main.run(["serve", "--help"]) == 0
    text = capfd.readouterr().out
    command = typer.main.get_command(command_line.app).commands["serve"]
    options = [name for parameter in command.params for name in parameter.opts]
    assert len(options) > 25
    for name in options:
        if name.startswith("-"):
            assert name in text, name
    for default in ("fleecenbd.sock", "10809", "600", "break-snapshot", "20", "no limit", "info"):
        assert default in text, default
    assert "127.0.0.1, and ::1" in " ".join(text.split())
    assert "libnbd's [ ]" in text
    assert "Over several disks it is refused there, too" in " ".join(text.replace("│", "").split())
    assert "Examples" in text
    assert "nbdcopy -- [ fleecenbd serve vm.raw --begin nightly ] backup.raw" in text


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("serve", "--help")])
def test_output_that_cannot_be_written_is_one_line_and_no_fault_of_ours(
    arguments: tuple[str, ...],
) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [FLEECENBD, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr == (
        "fleecenbd: cannot write to standard output: No space left on device\n"
    )


def test_without_standard_output_help_goes_nowhere() -> None:
    result = subprocess.run(
        ["sh", "-c", '"$1" serve --help >&-', "sh", FLEECENBD], capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_with_json_log_a_failure_is_an_object_too(fails: Fails) -> None:
    entry = json.loads(fails("serve", "missing.raw", "--json-log"))
    assert entry["level"] == "error"
    assert "missing.raw" in entry["message"]


@pytest.mark.usefixtures("own_logs")
def test_level_debug_shows_where_a_failure_came_from(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "missing.raw", "--log-level", "debug"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fleecenbd: cannot open disk missing")


def test_a_fault_of_ours_is_one_line_too(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> FileDevice:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(FileDevice, "open", broken)
    assert "internal error: RuntimeError: two lines" in fails("serve", "vm.raw")


@pytest.mark.usefixtures("own_logs")
def test_ctrl_c_while_it_is_imported_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fleecenbd.cli.words", Slow("words"))
    assert main.run(["--version"]) == 130


def test_ctrl_c_before_the_server_is_there_is_status_130(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> FileDevice:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("SIGINT was ignored")

    monkeypatch.setattr(FileDevice, "open", slow)
    assert main.run(["serve", "vm.raw"]) == 130
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_s_reason_names_the_object_once() -> None:
    error = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a")
    assert reason(error, "b") == f"a: No such file or directory ({HINTS[errno.ENOENT]})"
    assert reason(OSError(errno.EIO, "lost"), "b") == "b: lost"
    assert reason(OSError(errno.EIO, "lost")) == "lost"
    assert reason(OSError("odd")) == "odd"
