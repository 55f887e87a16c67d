"""The command as a process: readiness, signals, --run, --single, socket activation, its end."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

import fleecenbd
from fleecenbd.cli import main
from fleecenbd.cli.runner import COMMAND_TIMEOUT_S
from tests.cli.conftest import SERVE, started
from tests.serving import FLEECENBD, serving

TIMEOUT_S = 30.0
SIZE = 1 << 20

# Runs a command with the sockets on the descriptors given first handed over as systemd does it:
# from descriptor 3 on, and with its own pid, which exec keeps, in LISTEN_PID.
ACTIVATE = """
import os, sys
count = int(sys.argv[1])
given = [int(number) for number in sys.argv[2 : 2 + count]]
safe = [os.dup2(number, 500 + index) for index, number in enumerate(given)]
for index, number in enumerate(safe):
    os.dup2(number, 3 + index)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(count)
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""

# The command, on a disk that never answers a sync.
HUNG_DISK = """
import sys, threading
from fleecenbd.cli.main import main
from fleecenbd.storage.file import FileDevice
FileDevice._flush = lambda *_: threading.Event().wait()
sys.argv[0] = "fleecenbd"
main()
"""


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image full of its own offsets, in the current directory, whose name is short."""
    monkeypatch.chdir(tmp_path)
    image = Path("vm.raw")
    image.write_bytes(b"".join(offset.to_bytes(8, "big") for offset in range(0, SIZE, 8)))
    return image


def _run(*arguments: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """`fleecenbd serve ARGUMENTS` to its end."""
    return subprocess.run(
        [*SERVE, *arguments],
        **{"stdin": subprocess.DEVNULL, "capture_output": True, **options},
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _end(process: "subprocess.Popen[str]", number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Send the signal and wait: (exit status, standard output, standard error)."""
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def _names(connect: object, *arguments: object) -> list[str]:
    """The exports that a listener shows."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    getattr(handle, str(connect))(*arguments)
    names: list[str] = []
    handle.opt_list(lambda name, _description: names.append(name))
    handle.opt_abort()
    return names


def _size(uri: str) -> int:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    size: int = handle.get_size()
    handle.shutdown()
    return size


def _wait_until_gone(pid: int) -> bool:
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([end], [], [], TIMEOUT_S)[0])
    finally:
        os.close(end)


@contextmanager
def _listening(*paths: str) -> Iterator[list[int]]:
    """Descriptors of Unix sockets that listen, as a service manager would have made them."""
    listeners = [socket.socket(socket.AF_UNIX) for _ in paths]
    for listener, path in zip(listeners, paths, strict=True):
        listener.bind(path)
        listener.listen()
    yield [listener.fileno() for listener in listeners]
    for listener in listeners:
        listener.close()


def _activated(descriptors: list[int], *arguments: str | Path) -> list[str]:
    """The command that serves on these descriptors by socket activation."""
    numbers = [str(len(descriptors)), *map(str, descriptors)]
    return [sys.executable, "-c", ACTIVATE, *numbers, *map(str, (*SERVE, *arguments))]


# -- start and stop ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_is_ready_with_pidfile_and_socket_and_leaves_nothing_behind(
    image: Path, tmp_path: Path, number: int
) -> None:
    with started(tmp_path, *SERVE, image, "-U", "f.sock", "-P", "pid") as process:
        assert Path("pid").read_text() == f"{process.pid}\n"
        assert _size("nbd+unix:///vm?socket=f.sock") == SIZE
        status, out, err = _end(process, number)
    assert status == 0
    assert out == ""
    assert f"serving vm at nbd+unix:///vm?socket={tmp_path.resolve()}/f.sock" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm.raw"]


def test_a_guest_that_is_connected_does_not_hold_up_the_end(image: Path, tmp_path: Path) -> None:
    with started(tmp_path, *SERVE, image, "-U", "f.sock") as process:
        handle = nbd.NBD()
        handle.connect_uri("nbd+unix:///vm?socket=f.sock")
        handle.pwrite(b"x" * 512, 0)
        status, _, _ = _end(process)
    assert status == 0
    assert image.read_bytes()[:512] == b"x" * 512


def test_a_second_signal_ends_at_once_a_server_whose_disk_hangs(
    image: Path, tmp_path: Path
) -> None:
    command = (sys.executable, "-c", HUNG_DISK, "serve", image, "-U", "f.sock", "-P", "pid")
    with started(tmp_path, *command) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        while "stopping: SIGTERM" not in process.stderr.readline():
            assert process.poll() is None
        status, _, err = _end(process)
    assert status == 1
    (line,) = err.splitlines()
    assert "stopping at once" in line
    assert not Path("f.sock").exists()
    assert not Path("pid").exists()


def test_a_server_that_was_killed_is_replaced(image: Path, tmp_path: Path) -> None:
    with started(tmp_path, *SERVE, image, "-U", "f.sock") as process:
        assert _end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert Path("f.sock").is_socket()
    with started(tmp_path, *SERVE, image, "-U", "f.sock") as process:
        assert _size("nbd+unix:///vm?socket=f.sock") == SIZE
        assert _end(process)[0] == 0
    assert not Path("f.sock").exists()


def test_a_socket_has_the_mode_and_group_that_were_asked_for(image: Path, tmp_path: Path) -> None:
    group = 12345 if os.geteuid() == 0 else os.getgroups()[-1]
    for options, mode in (
        ((), 0o600),
        (("--socket-group", str(group)), 0o660),
        (("--socket-mode", "666"), 0o666),
        (("--socket-mode", "620", "--socket-group", str(group)), 0o620),
    ):
        with started(tmp_path, *SERVE, image, "-U", "f.sock", *options) as process:
            found = Path("f.sock").stat()
            assert found.st_mode & 0o777 == mode
            if "--socket-group" in options:
                assert found.st_gid == group
            assert _end(process)[0] == 0


def test_a_backup_socket_shows_fleecing_exports_only(image: Path, tmp_path: Path) -> None:
    options = ("--begin", "n", "--backup-unix", "b.sock")
    with serving(tmp_path, image, *options) as server:
        assert _names("connect_unix", str(server.unix)) == ["vm", "vm@n"]
        assert _names("connect_unix", "b.sock") == ["vm@n"]
        with pytest.raises(nbd.Error, match="policy"):
            _size("nbd+unix:///vm?socket=b.sock")
    assert Path("state").stat().st_mode & 0o777 == 0o700


def test_json_log_is_json_from_the_first_line_to_the_last(image: Path, tmp_path: Path) -> None:
    arguments = (image, "-U", "f.sock", "--json-log", "--log-level", "debug")
    with started(tmp_path, *SERVE, *arguments) as process:
        assert _size("nbd+unix:///vm?socket=f.sock") == SIZE
        status, _, err = _end(process)
    assert status == 0
    entries = [json.loads(line) for line in err.splitlines()]
    assert any("serving vm at" in entry["message"] for entry in entries)
    assert any("stopping: SIGTERM" in entry["message"] for entry in entries)


def test_it_serves_on_when_nobody_reads_its_log_any_more(image: Path, tmp_path: Path) -> None:
    end, log = os.pipe()
    with started(tmp_path, *SERVE, image, "-U", "f.sock", stderr=log) as process:
        os.close(log)
        os.close(end)
        for _ in range(3):
            assert _size("nbd+unix:///vm?socket=f.sock") == SIZE
        assert _end(process)[0] == 0


def test_an_image_never_becomes_standard_error(image: Path) -> None:
    before = image.read_bytes()
    command = '"$@" <&- >&- 2>&-'
    run = ("-U", "-", "--log-level", "debug", "--run", "exit 3")
    result = subprocess.run(
        ["sh", "-c", command, "sh", *SERVE, image, *run], timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 3
    assert image.read_bytes() == before


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "fleecenbd", "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == f"fleecenbd {fleecenbd.__version__}\n"


def test_a_reader_of_the_help_may_leave_early() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [FLEECENBD, "serve", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert result.stderr == b""


# -- --run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [("true", 0), ("exit 7", 7), ("kill -9 $$", 137), ("no-such-command", 127)],
)
def test_it_ends_with_its_command_and_hands_on_the_status(
    image: Path, command: str, status: int
) -> None:
    assert _run(image, "--run", command).returncode == status


def test_a_command_gets_the_addresses_and_nobody_else_writes_to_its_output(image: Path) -> None:
    command = 'printf "%s\\n" "$uri" "$unixsocket" "$port" "${NOTIFY_SOCKET-unset}"; pwd'
    options = ("--begin", "n", "--state-dir", "state", "-p", "0")
    result = _run(image, *options, "--run", command)
    assert result.returncode == 0
    assert result.stderr == ""
    uri, unixsocket, port, notify, folder = result.stdout.splitlines()
    assert uri == f"nbd+unix:///vm@n?socket={unixsocket}"
    assert int(port) > 0
    assert notify == "unset"
    assert folder == os.getcwd()
    assert not Path(unixsocket).parent.exists(), "the private socket's directory is left over"


def test_a_command_can_use_every_address(image: Path) -> None:
    command = (
        'nbdinfo --size "$uri" && nbdinfo --size "nbd://127.0.0.1:$port/vm" && '
        'nbdinfo --size "nbd+unix:///vm?socket=$unixsocket"'
    )
    result = _run(image, "-i", "127.0.0.1", "-p", "0", "-U", "f.sock", "--run", command)
    assert result.stdout.split() == [str(SIZE)] * 3
    assert not Path("f.sock").exists()


def test_a_command_s_pipes_break_quietly(image: Path) -> None:
    result = _run(image, "--run", "yes | head -n 1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "y\n", "")


def test_a_signal_ends_the_command_and_its_status_is_handed_on(image: Path, tmp_path: Path) -> None:
    Path("trap.sh").write_text("trap 'exit 5' TERM\nmkfifo f\necho ready\nread line < f\n")
    for command, expected in (("exec tail -f /dev/null", 143), ("exec sh trap.sh", 5)):
        with started(tmp_path, *SERVE, image, "--run", command) as process:
            if expected == 5:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            assert _end(process)[0] == expected


def test_a_second_signal_ends_at_once_a_server_whose_command_goes_on(
    image: Path, tmp_path: Path
) -> None:
    os.mkfifo("f")
    command = ("--log-level", "info", "--run", "trap '' TERM; echo ready; read line < f")
    with started(tmp_path, *SERVE, image, "-U", "f.sock", *command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        while "stopping: SIGTERM" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        status = process.wait(COMMAND_TIMEOUT_S / 2)
        os.close(os.open("f", os.O_WRONLY))  # now the command ends, and with it the log
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert status == 1
    told = [line.partition(" ")[2] for line in err.splitlines()]
    assert told[0] == "warning: stopping at once: SIGTERM again"
    assert "goes on" in told[1]
    assert told[2:] == []
    assert not Path("f.sock").exists()


# -- --single and socket activation --------------------------------------------------------------


def _single(*options: str) -> list[str]:
    return [str(word) for word in (*SERVE, "vm.raw", "--single", "--state-dir", "state", *options)]


def test_single_serves_the_client_on_standard_input(image: Path) -> None:
    handle = nbd.NBD()
    handle.set_export_name("vm")
    handle.connect_command(_single("-P", "pid"))
    pid = int(Path("pid").read_text())
    handle.pwrite(b"y" * 512, 512)
    assert handle.get_size() == SIZE
    handle.shutdown()
    del handle  # waits for the server
    assert _wait_until_gone(pid)
    assert image.read_bytes()[512:1024] == b"y" * 512
    assert not Path("pid").exists()


def test_single_with_a_session_over_one_disk_means_the_fleecing_export(image: Path) -> None:
    handle = nbd.NBD()
    handle.connect_command(_single("--begin", "n"))
    assert bytes(handle.pread(SIZE, 0)) == image.read_bytes()
    with pytest.raises(nbd.Error):
        handle.pwrite(b"y", 0)
    handle.shutdown()


def test_single_keeps_the_log_away_from_the_client(image: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:  # on standard error too, as inetd does it
            process = subprocess.Popen(
                _single("--log-level", "debug"), stdin=theirs, stdout=theirs, stderr=theirs
            )
        ours.settimeout(TIMEOUT_S)
        greeting = ours.makefile("rb").read(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT"
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(4096) == b"", "something followed the greeting"
        assert process.wait(TIMEOUT_S) == 0


def test_sockets_handed_over_by_systemd_are_served_by_their_names(
    image: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--begin", "n", "--state-dir", "state", "--log-level", "info")
    paths = [str(tmp_path / name) for name in ("g.sock", "b.sock")]
    with _listening(*paths, "c.sock") as descriptors:
        with started(
            tmp_path,
            *_activated(descriptors, image, *options),
            pass_fds=descriptors,
            environment={"LISTEN_FDNAMES": "guest:backup:control"},
        ) as process:
            assert _names("connect_unix", "g.sock") == ["vm", "vm@n"]
            assert _names("connect_unix", "b.sock") == ["vm@n"]
            assert main.run(["status", "--control", "c.sock"]) == 0
            assert f"nbd+unix:///vm@n?socket={tmp_path}/g.sock" in capfd.readouterr().out
            status, _, err = _end(process)
        assert status == 0
        assert f"serving vm@n at nbd+unix:///vm@n?socket={tmp_path}/g.sock" in err
        assert f"serving fleecing exports only at nbd+unix:///?socket={tmp_path}/b.sock" in err
        assert Path("g.sock").is_socket(), "the file is systemd's to remove"


@pytest.mark.parametrize(
    ("path", "told"), [("g.sock", "g.sock"), ("\0fleecenbd {}", "@fleecenbd {}")]
)
def test_a_handed_socket_that_no_uri_leads_to_is_told_all_the_same(
    image: Path, tmp_path: Path, path: str, told: str
) -> None:
    path, told = path.format(tmp_path), told.format(tmp_path)
    with _listening(path) as descriptors:
        command = _activated(
            descriptors, image, "--begin", "n", "--state-dir", "state", "--log-level", "info"
        )
        with started(tmp_path, *command, pass_fds=descriptors) as process:
            _, _, err = _end(process)
    assert f"serving vm, vm@n at the Unix socket {told}, as it was handed over\n" in err


def test_a_client_that_waited_while_the_server_was_down_is_served(
    image: Path, tmp_path: Path
) -> None:
    with _listening("g.sock") as descriptors:
        for _ in range(2):  # the second time, after a restart
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("g.sock")
                command = _activated(descriptors, image)
                with started(tmp_path, *command, pass_fds=descriptors) as process:
                    client.settimeout(TIMEOUT_S)
                    assert client.recv(8) == b"NBDMAGIC"
                    assert _end(process)[0] == 0


def test_tcp_sockets_are_handed_over_too(image: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = _activated([listener.fileno()], image)
        with started(tmp_path, *command, pass_fds=[listener.fileno()]) as process:
            assert _size(f"nbd://127.0.0.1:{listener.getsockname()[1]}/vm") == SIZE
            assert _end(process)[0] == 0


@pytest.mark.parametrize(
    "option",
    [("-U", "f.sock"), ("-i", "::1"), ("-p", "1"), ("--single",), ("--run", "true")],
    ids=" ".join,
)
def test_sockets_of_one_s_own_are_wrong_under_activation(
    image: Path, option: tuple[str, ...]
) -> None:
    with _listening("g.sock") as descriptors:
        result = subprocess.run(
            _activated(descriptors, image, *option),
            pass_fds=descriptors,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "socket activation" in result.stderr


def test_a_control_socket_alone_is_refused(image: Path) -> None:
    with _listening("c.sock") as descriptors:
        result = subprocess.run(
            _activated(descriptors, image),
            pass_fds=descriptors,
            env={**os.environ, "LISTEN_FDNAMES": "control"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert result.returncode == 1
    assert "guest or backup" in result.stderr


def test_a_client_that_starts_the_server_ends_it_by_closing(image: Path) -> None:
    handle = nbd.NBD()
    command = (*SERVE, image, "--begin", "n", "--state-dir", "state", "-P", "pid")
    handle.connect_systemd_socket_activation([str(word) for word in command])
    pid = int(Path("pid").read_text())
    assert bytes(handle.pread(4096, 4096)) == image.read_bytes()[4096:8192]
    handle.shutdown()
    del handle
    assert _wait_until_gone(pid)
    assert not Path("pid").exists()


@pytest.mark.parametrize("option", [(), ("-e", "vm@n")])
def test_a_client_that_started_the_server_learns_why_the_empty_name_is_refused(
    image: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    Path("b.raw").write_bytes(bytes(SIZE))
    script = (
        "import nbd, sys\n"
        "handle = nbd.NBD()\n"
        "handle.connect_systemd_socket_activation(sys.argv[1:])\n"
    )
    server = (*SERVE, image, "b.raw", "--begin", "n", "--state-dir", "state", *option)
    client = subprocess.run(
        [sys.executable, "-c", script, *server], capture_output=True, text=True, check=False
    )
    told = "warning: the empty export name means none of vm, b, vm@n, b@n; where the client asks"
    assert (client.returncode == 0) == bool(option)
    assert (told in client.stderr) != bool(option)


def test_a_client_of_single_learns_why_the_empty_name_is_refused(
    image: Path, tmp_path: Path
) -> None:
    Path("b.raw").write_bytes(bytes(SIZE))
    command = [*_single("--begin", "n"), "b.raw"]
    script = "import nbd, sys\nnbd.NBD().connect_command(sys.argv[1:])\n"
    client = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    assert client.returncode == 1
    assert "warning: the empty export name means none of vm, b, vm@n, b@n;" in client.stderr


def test_under_activation_the_refusal_of_the_empty_name_is_logged(
    image: Path, tmp_path: Path
) -> None:
    Path("b.raw").write_bytes(bytes(SIZE))
    with _listening("g.sock") as descriptors:
        command = _activated(descriptors, image, "b.raw", "--begin", "n", "--state-dir", "state")
        # With a manager's word for the log: it is no client that started the server for itself.
        with started(tmp_path, *command, "--log-level", "info", pass_fds=descriptors) as process:
            with pytest.raises(nbd.Error):
                _size("nbd+unix:///?socket=g.sock")
            _, _, err = _end(process)
    assert "refused: " in err
    assert "vm, b, vm@n, b@n" in err.partition("refused: ")[2]


def test_a_server_ends_with_the_client_that_started_it_for_itself(image: Path) -> None:
    script = (
        "import nbd, os, signal, sys\n"
        "handle = nbd.NBD()\n"
        "handle.connect_systemd_socket_activation(sys.argv[1:])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    server = (*SERVE, image, "--begin", "n", "--state-dir", "state", "-P", "pid")
    client = subprocess.run([sys.executable, "-c", script, *server], check=False)
    assert client.returncode == -signal.SIGKILL
    try:
        pid = int(Path("pid").read_text())
    except FileNotFoundError:
        return  # it has noticed, and cleaned up, already
    assert _wait_until_gone(pid)
