"""The commands of the control socket, against a server: what they print, and how they fail."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
import pytest

from fleecenbd.cli import control_client, control_commands
from fleecenbd.cli.backup_owner import Owner
from fleecenbd.cli.main import run
from tests.cli.conftest import Fails, started
from tests.controlling import Control
from tests.serving import FLEECENBD, Serving, connected, serving

TIMEOUT_S = 60

Out = Callable[..., str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of two disks."""
    directory = tmp_path_factory.mktemp("server")
    for name in ("vda", "vdb"):
        (directory / f"{name}.raw").write_bytes(bytes(1 << 20))
    with serving(directory, directory / "vda.raw", directory / "vdb.raw") as server:
        yield server


@pytest.fixture(autouse=True)
def _controlled(server: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEECENBD_CONTROL", f"{server.unix}.control")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(own_logs: None, capfd: pytest.CaptureFixture[str]) -> Out:
    """Call the command, which succeeds: what it prints on standard output."""

    def call(*arguments: str | Path, warns: bool = False) -> str:
        status = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert status == 0, err
        assert warns or err == ""
        return str(out)

    return call


def test_begin_prints_one_uri_a_line_and_nothing_else(server: Serving, out: Out) -> None:
    with connected(server.uri("vda")), connected(server.uri("vdb")):
        printed = out("session", "begin", "n", "--temp-limit", "64k", "--ttl", "1000", warns=True)
    assert printed.splitlines() == [server.uri("vda@n"), server.uri("vdb@n")]
    for uri in printed.splitlines():
        with connected(uri) as backup:
            assert backup.get_size() == 1 << 20
    shown = out("session", "show", "n")
    assert re.search(r"^state +active", shown, re.MULTILINE)
    assert "limit 64.0 KiB" in shown
    assert re.search(
        r"^ttl +1000 s, \d+\.\d s left|^ttl +1000 s, 0:16:\d\d left", shown, re.MULTILINE
    )
    assert out("session", "finish", "n") == ""
    assert "finished (success)" in out("session", "list")


def test_a_session_is_no_success_while_it_is_read(server: Serving, out: Out, fails: Fails) -> None:
    for words in (("--failed",), ("--force",)):
        out("session", "begin", "r", warns=True)
        with connected(server.uri("vda@r")):
            told = fails("session", "finish", "r")
            assert f"session r is not finished: vda@r is being read by pid {os.getpid()}" in told
            assert "with --failed, and no change is forgotten" in told
            assert json.loads(out("session", "show", "r", "--json"))["state"] == "active"
            out("session", "finish", "r", *words)
    out("session", "begin", "r", warns=True)
    out("session", "finish", "r")
    owner = Owner()
    Control(f"{server.unix}.control").call("PUT", "sessions/r", owner=owner.name)
    assert "a fleecenbd backup is at work in it" in fails("session", "finish", "r")
    owner.close()
    out("session", "finish", "r")
    told = fails("session", "finish", "r", "--failed", "--force", status=2)
    assert "--force is for a success" in told


def test_the_limit_of_a_live_session_is_changed(server: Serving, out: Out, fails: Fails) -> None:
    begin = ("session", "begin", "s", "--disk", "vda", "--temp-limit", "8k")
    with connected(server.uri("vda")) as guest:
        for offset in (0, 65536):
            guest.pwrite(b"1" * 8192, offset)
        out(*begin, "--on-cbw-error", "break-guest-write", warns=True)
        guest.pwrite(b"2" * 8192, 0)
        with pytest.raises(nbd.Error, match="Input/output error"):
            guest.pwrite(b"2" * 8192, 65536)
        assert out("session", "set", "s", "--temp-limit", "1M") == ""
        guest.pwrite(b"2" * 8192, 65536)
        shown = json.loads(out("session", "set", "s", "--temp-limit", "none", "--json"))
        assert shown["temp_limit"] is None
        temp = shown["disks"][0]["temp"]
        assert (temp["now"], temp["peak"], temp["limit"]) == (16384, 16384, None)
        assert Path(temp["image"]).is_file()
        shown = json.loads(out("session", "set", "s", "--temp-limit", "4k", "--json"))
        assert shown["disks"][0]["temp"]["limit"] == 4096
        assert "less than one cluster of 4096" in fails("session", "set", "s", "--temp-limit", "1k")
        told = fails("session", "set", "s", "--temp-limit", "much", status=2)
        assert "is no size" in told
        assert told.endswith("; or none")
        with connected(server.uri("vda@s")) as backup:
            for offset in (0, 65536):
                assert bytes(backup.pread(8192, offset)) == b"1" * 8192, "nothing is lost"
    out("session", "finish", "s")
    assert "there is no session" in fails("session", "set", "nosuch", "--temp-limit", "1M")


def test_a_limit_that_was_changed_lasts(tmp_path: Path, out: Out) -> None:
    image = tmp_path / "l.raw"
    image.write_bytes(bytes(1 << 20))
    for change in (True, False):
        with serving(tmp_path, image) as server:
            control = ("--control", f"{server.unix}.control")
            if change:
                out("session", "begin", "l", "--temp-limit", "8k", *control, warns=True)
                out("session", "set", "l", "--temp-limit", "64k", *control)
            shown = json.loads(out("session", "show", "l", "--json", *control))
            assert (shown["temp_limit"], shown["disks"][0]["temp"]["limit"]) == (65536, 65536)


def test_begin_takes_each_disk_that_is_named(server: Serving, out: Out) -> None:
    printed = out("session", "begin", "two", "--disk", "vda", "--disk", "vdb", warns=True)
    assert printed.splitlines() == [server.uri("vda@two"), server.uri("vdb@two")]
    out("session", "finish", "two")
    assert (
        out("session", "begin", "one", "--disk", "vdb", warns=True) == f"{server.uri('vdb@one')}\n"
    )
    out("session", "finish", "one")


def test_begin_warns_on_standard_error(server: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["session", "begin", "w", "--disk", "vda"]) == 0
    printed = capfd.readouterr()
    assert printed.out == f"{server.uri('vda@w')}\n"
    assert printed.err == (
        "fleecenbd: warning: no guest is connected to vda: does it write past this server?\n"
    )
    assert run(["session", "finish", "w", "--failed"]) == 0


def test_json_is_the_server_s_answer(out: Out) -> None:
    begun = json.loads(out("session", "begin", "j", "--owner", "me", "--json", warns=True))
    again = json.loads(out("session", "begin", "j", "--owner", "me", "--json", warns=True))
    assert begun == again
    listed = json.loads(out("session", "list", "--json"))["sessions"]
    assert [session["id"] for session in listed if session["state"] == "active"] == [begun["id"]]
    shown = json.loads(out("session", "show", "j", "--json"))
    assert (shown["id"], shown["owner"]) == (begun["id"], "me")
    status = json.loads(out("status", "--json"))
    assert [disk["name"] for disk in status["disks"]] == ["vda", "vdb"]
    finished = json.loads(out("session", "finish", "j", "--failed", "--json"))
    assert finished["result"] == "failed"


def test_status_shows_disks_sessions_and_where_they_are(server: Serving, out: Out) -> None:
    out("session", "begin", "s", warns=True)
    shown = out("status")
    assert f"pid {server.pid}" in shown
    assert re.search(r"^vda +1\.0 MiB", shown, re.MULTILINE)
    assert re.search(r"^s +active", shown, re.MULTILINE)
    assert re.search(r"^vdb@s .* 0 %", shown, re.MULTILINE)
    assert server.uri("vda@s") in shown
    out("session", "finish", "s")


def test_status_watch_shows_it_again_and_again_until_the_server_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.setattr(control_commands, "WATCH_INTERVAL_S", 0.0)
    looks: list[float] = []
    sleep = control_commands.asyncio.sleep

    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    command = (FLEECENBD, "serve", image, "-U", "f.sock", "--log-level", "error")
    with started(tmp_path, *command) as process:

        async def end_the_third_time(delay: float) -> None:
            looks.append(delay)
            if len(looks) == 3:
                process.terminate()
                process.wait(TIMEOUT_S)
            await sleep(delay)

        monkeypatch.setattr(control_commands.asyncio, "sleep", end_the_third_time)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert run(["status", "--watch", "--control", "f.sock.control"]) == 1
    assert len(looks) == 3


def test_a_session_that_is_read_once_says_so(server: Serving, out: Out) -> None:
    out("session", "begin", "o", "--read-once", "--disk", "vda", warns=True)
    assert re.search(r"^read once +what was read is released", out("session", "show", "o"), re.M)
    with connected(server.uri("vda@o")) as backup:
        backup.pread(1 << 16, 0)
        with pytest.raises(nbd.Error, match="Invalid argument"):
            backup.pread(4096, 0)
    out("session", "begin", "p", "--disk", "vda", warns=True)
    assert "read once" not in out("session", "show", "p")


def test_status_watch_is_not_cut_at_80_columns(server: Serving, out: Out) -> None:
    out("session", "begin", "before", warns=True)
    out("session", "finish", "before")
    begun = json.loads(out("session", "begin", "nightly", "--json", warns=True))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [str(FLEECENBD), "status", "--watch"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = ""
        while shown.count("vdb@nightly") < 2:
            shown += os.read(ours, 65536).decode()
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: nobody has the other end any more
            while os.read(ours, 65536):
                pass
    os.close(ours)
    assert "GUEST WRITES" in shown
    assert "GUEST P99" in shown
    assert "1.0 MiB" in shown
    for left_out in ("\N{HORIZONTAL ELLIPSIS}", begun["id"][:8], "before", "IMAGE"):
        assert left_out not in shown
    out("session", "finish", "nightly")


def test_a_server_that_does_not_answer_is_waited_for_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails, out: Out
) -> None:
    monkeypatch.setattr(control_client, "LOOK_TIMEOUT_S", 0.3)
    (tmp_path / "vm.raw").write_bytes(bytes(1 << 20))
    control = ("--control", "f.sock.control")
    command = (FLEECENBD, "serve", "vm.raw", "-U", "f.sock", "--state-dir", "state")
    with started(tmp_path, *command) as process:
        # What does something is waited for longer.
        out("session", "begin", "n", "--freeze-cmd", "sleep 0.6", *control, warns=True)
        process.send_signal(signal.SIGSTOP)
        assert fails("status", *control) == (
            "fleecenbd: no answer from the server at f.sock.control in time: it is stopped "
            "(SIGSTOP, a debugger), or hangs; look at its process and its log, and ask again"
        )


def test_without_a_runtime_directory_the_control_socket_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    for name in ("FLEECENBD_CONTROL", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert fails("status", status=2) == (
        "fleecenbd: there is no default control socket: XDG_RUNTIME_DIR is not set; "
        "say where the server's is with --control or FLEECENBD_CONTROL"
    )


def test_disks_come_and_go(server: Serving, fails: Fails, out: Out) -> None:
    Path("new.raw").write_bytes(bytes(1 << 20))
    assert out("disk", "add", "vdc=new.raw") == f"{server.uri('vdc')}\n"
    assert re.search(r"^vdc .*/new\.raw", out("disk", "list"), re.MULTILINE)
    with connected(server.uri("vdc")):
        assert "fleecenbd: disk vdc is in use by pid" in fails("disk", "remove", "vdc")
    out("session", "begin", "d", "--disk", "vdc", warns=True)
    assert "disk vdc is in session d; finish that first" in fails("disk", "remove", "vdc")
    out("session", "finish", "d")
    out("disk", "remove", "vdc")
    assert "vdc" not in out("disk", "list")
    out("disk", "add", "vdc=new.raw")
    out("disk", "remove", "vdc")


def test_a_disk_that_cannot_be_added_says_why(server: Serving, fails: Fails) -> None:
    Path("c.raw").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(4096))
    here = os.getcwd()
    assert fails("disk", "add", "vdc=missing.raw") == (
        f"fleecenbd: cannot open disk vdc: {here}/missing.raw: No such file or directory "
        "(check the path)"
    )
    assert "the content is a qcow2 container" in fails("disk", "add", "vdc=c.raw")
    image = server.unix.parent / "vda.raw"
    assert "vda and vdc are the same image" in fails("disk", "add", f"vdc={image}")
    assert "there is a disk called vda already" in fails("disk", "add", "vda=c.raw")


@pytest.mark.parametrize("name", ["a/b", "a@b", "n" * 300, "", "ü", ".."])
@pytest.mark.parametrize(
    "command", [("session", "begin"), ("session", "finish"), ("disk", "remove")]
)
def test_a_name_that_is_none_is_wrong_usage(
    fails: Fails, command: tuple[str, ...], name: str
) -> None:
    line = fails(*command, name, status=2)
    assert "1 to 100 letters, digits, '.', '_' and '-'" in line


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("session", "show", "nosuch"), 1, "there is no session called 'nosuch'"),
        (("session", "finish", "nosuch"), 1, "there is no session called 'nosuch'"),
        (("session", "begin", "n", "--disk", "vdz"), 1, "there is no disk called 'vdz'"),
        (("disk", "remove", "vdz"), 1, "there is no disk called 'vdz'"),
        (("session", "begin", "n", "--temp-limit", "lots"), 2, "--temp-limit: 'lots' is no size"),
        (("session", "begin", "n", "--ttl", "0"), 2, "--ttl: '0' is no time"),
        (
            ("session", "begin", "n", "--on-cbw-error", "x"),
            2,
            "--on-cbw-error is one of break-snapshot",
        ),
        (("session", "begin", "n", "--owner", "a", "--owner", "b"), 2, "it is given twice"),
        (("session", "begin"), 2, "see fleecenbd --help, fleecenbd session begin --help"),
        (("session",), 2, "Missing command"),
        (("session", "nosuch"), 2, "No such command 'nosuch'"),
        (("status", "--watch", "--json"), 2, "--watch cannot be given with --json"),
        (("status", "--watch"), 2, "--watch needs a terminal; leave it out, or use --json"),
        (("session", "begin", "n", "--freeze-cmd", "exit 3"), 1, "the freeze command failed with"),
    ],
)
def test_what_cannot_be_is_one_line(
    fails: Fails, arguments: tuple[str, ...], status: int, words: str
) -> None:
    assert words in fails(*arguments, status=status)


def test_where_there_is_no_server_it_is_said(server: Serving, fails: Fails) -> None:
    assert fails("status", "--control", "nosuch") == (
        "fleecenbd: no server is there: nosuch does not exist; start one (fleecenbd serve), or "
        "say where it is with --control or FLEECENBD_CONTROL"
    )
    with socket.socket(socket.AF_UNIX) as left:
        left.bind("left.sock")
    assert "nobody listens on left.sock any more" in fails("status", "--control", "left.sock")
    Path("file").touch()
    assert "file is no socket" in fails("status", "--control", "file")
    assert fails("status", "--control", server.unix) == (
        f"fleecenbd: {server.unix} is an NBD socket, not a control socket; "
        f"that is {server.unix}.control by default"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("datagram.sock")
        assert "it is no stream socket" in fails("status", "--control", "datagram.sock")


def test_what_answers_in_another_language_is_no_server_of_ours(fails: Fails) -> None:
    with started_echo("echo.sock"):
        assert fails("status", "--control", "echo.sock") == (
            "fleecenbd: echo.sock: no control socket of fleecenbd answers there"
        )


@contextmanager
def started_echo(path: str) -> Iterator[None]:
    """A stream server that says "hello", in no protocol at all."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(8)

        def answer() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client:
                        client.sendall(b"hello\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_the_control_socket_is_its_owner_s_alone_and_goes_with_the_server(
    tmp_path: Path, own_logs: None
) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    command = (FLEECENBD, "serve", image, "-U", "f.sock", "--socket-mode", "666")
    with started(tmp_path, *command) as process:
        assert Path("f.sock.control").stat().st_mode & 0o7777 == 0o600
        assert run(["status", "--control", "f.sock.control"]) == 0
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    assert not Path("f.sock.control").exists()


def test_control_can_be_elsewhere_and_a_command_of_run_is_told_where(tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    for options in ((), ("--control", "here.sock")):
        result = subprocess.run(
            [
                *(str(FLEECENBD), "serve", str(image), "--state-dir", "state", *options),
                *("--run", f"{FLEECENBD} session begin n && {FLEECENBD} session finish n"),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("nbd+unix:///vm@n?socket=")


def test_a_unix_path_too_long_for_a_control_socket_beside_it_is_served_without(
    tmp_path: Path,
) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    path = "f" * 103
    with started(tmp_path, FLEECENBD, "serve", image, "-U", path) as process:
        assert Path(path).is_socket()
        process.terminate()
        assert "there is no control socket" in process.communicate(timeout=TIMEOUT_S)[1]


def test_metrics_are_served_over_tcp_and_nothing_else(tmp_path: Path) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    command = (FLEECENBD, "serve", image, "-U", "f.sock", "--metrics", "127.0.0.1:0")
    with started(tmp_path, *command) as process:
        assert process.stderr is not None
        while not (told := re.search(r"metrics: (http://\S+)", process.stderr.readline())):
            pass
        with urllib.request.urlopen(told[1], timeout=TIMEOUT_S) as answer:
            assert b'fleecenbd_disk_size_bytes{disk="vm"} 1.048576e+06' in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(told[1].replace("/metrics", "/v1/status"), timeout=TIMEOUT_S)


def test_a_disk_does_not_come_back_different_under_its_guest(
    tmp_path: Path, fails: Fails, out: Out
) -> None:
    for name in ("vm.raw", "other.raw"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    control = ("--control", "f.sock.control")
    command = (FLEECENBD, "serve", "vm.raw", "-U", "f.sock", "--state-dir", "state")
    with started(tmp_path, *command) as process:
        out("disk", "add", "raw:other.raw", *control)
        with connected(f"nbd+unix:///other?socket={tmp_path}/f.sock"):
            while not list(Path("state").glob("guests/*.json")):
                out("status", *control)
            process.kill()
            process.wait(TIMEOUT_S)
    os.truncate("other.raw", 2 << 20)
    with started(tmp_path, *command):
        line = fails("disk", "add", "raw:other.raw", *control)
        assert "disk other had 1048576 bytes, and has 2097152 now" in line
        os.truncate("other.raw", 1 << 20)
        out("disk", "add", "raw:other.raw", *control)


def test_the_server_s_hooks_are_not_for_the_session_of_the_start(tmp_path: Path, out: Out) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    command = (FLEECENBD, "serve", image, "-U", "f.sock", "--state-dir", "state", "--begin", "n")
    with started(tmp_path, *command, "--freeze-cmd", "exit 1"):
        assert "active" in out("session", "show", "n", "--control", "f.sock.control")


def test_a_session_of_the_start_can_be_finished_and_has_its_ttl(tmp_path: Path, out: Out) -> None:
    image = tmp_path / "vm.raw"
    image.write_bytes(bytes(1 << 20))
    command = (FLEECENBD, "serve", image, "-U", "f.sock", "--state-dir", "state", "--begin", "n")
    with started(tmp_path, *command, "--ttl", "1000"):
        control = ("--control", "f.sock.control")
        with connected(f"nbd+unix:///vm?socket={tmp_path}/f.sock") as guest:
            guest.pwrite(b"x", 0)
            out("session", "begin", "m", *control)  # and warns of nothing
        out("session", "finish", "m", *control)
        seen = json.loads(out("session", "show", "n", "--json", *control))
        assert (seen["state"], seen["ttl"]) == ("active", 1000)
        out("session", "finish", "n", *control)
        assert [
            session["result"]
            for session in json.loads(out("session", "list", "--json", *control))["sessions"]
        ] == ["success", "success"]


def test_bitmaps_from_the_first_full_backup_to_the_next_increment(
    server: Serving, fails: Fails, out: Out, capfd: pytest.CaptureFixture[str]
) -> None:
    out("bitmap", "add", "vda", "extra", "--granularity", "4k")
    assert "bitmap extra of" not in out("bitmap", "list")
    assert run(["session", "begin", "b", "--disk", "vda", "--bitmap", "chain"]) == 0
    printed = capfd.readouterr()
    assert printed.out == f"{server.uri('vda@b')}\n"
    assert "fleecenbd: warning: vda@b is a full backup: there was no such bitmap\n" in printed.err
    assert "bitmap chain is used by session b" in fails("bitmap", "remove", "vda", "chain")
    with connected(server.uri("vda")) as guest:
        guest.pwrite(b"x" * 100, 0)
        out("session", "finish", "b")
        begin = ("session", "begin", "b", "--disk", "vda", "--bitmap", "chain", "--json")
        begun = json.loads(out(*begin))
    own = begun["disks"][0]["bitmap"]
    assert (own["mode"], own["dirty"]) == ("use", 64 << 10)
    assert re.search(
        r"^bitmap +chain, use, 64\.0 KiB dirty since b ", out("session", "show", "b"), re.M
    )
    out("session", "finish", "b")
    assert re.search(r"^vda +extra +good +4\.0 KiB +4\.0 KiB +-", out("bitmap", "list"), re.M)
    out("bitmap", "merge", "vda", "extra", "chain")
    assert json.loads(out("bitmap", "clear", "vda", "extra", "--json"))["dirty"] == 0
    assert [bitmap["dirty"] for bitmap in json.loads(out("bitmap", "list", "--json"))["vda"]] == [
        0,
        64 << 10,
    ]
    out("bitmap", "remove", "vda", "extra")
    out("bitmap", "remove", "vda", "chain")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("bitmap", "add", "vda", "a/b"), 2, "cannot be a bitmap's name"),
        (("bitmap", "add", "vdz", "b"), 1, "there is no disk called 'vdz'"),
        (("bitmap", "add", "vda", "b", "--granularity", "5k"), 2, "--granularity is a power"),
        (("bitmap", "add", "vda", "b", "--granularity", "1000"), 2, "--granularity is a power"),
        (("bitmap", "clear", "vda", "nosuch"), 1, "vda has no bitmap called nosuch"),
        (("bitmap", "merge", "vda", "nosuch", "other"), 1, "vda has no bitmap called"),
        (("bitmap", "remove", "vda", "nosuch"), 1, "vda has no bitmap called nosuch"),
        (("session", "begin", "n", "--bitmap-mode", "use"), 2, "cannot be given without --bitmap"),
        (
            ("session", "begin", "n", "--bitmap", "b", "--bitmap-mode", "x"),
            2,
            "--bitmap-mode is one of use, new, use-or-new, keep",
        ),
        (
            ("session", "begin", "n", "--bitmap", "b", "--bitmap-mode", "use"),
            1,
            "vda has no bitmap called b",
        ),
    ],
)
def test_what_cannot_be_done_with_bitmaps_is_one_line(
    fails: Fails, arguments: tuple[str, ...], status: int, words: str
) -> None:
    assert words in fails(*arguments, status=status)
