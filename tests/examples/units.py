"""systemd units, read as far as tests need it, and their command run on sockets as they ask for."""

import os
import re
import select
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.examples.conftest import EXAMPLES
from tests.guest.restarting import SUPERVISOR, HeldSocket, _Notices
from tests.serving import CLIENTS_PATH, COMMAND_TIMEOUT_S, FLEECENBD, run

FOLDER = EXAMPLES / "systemd"
SERVICE = FOLDER / "fleecenbd@.service"
GUEST = FOLDER / "fleecenbd@.socket"
BACKUP = FOLDER / "fleecenbd-backup@.socket"
UNITS = [SERVICE, GUEST, BACKUP]
CONF = FOLDER / "web.conf"
DROP_IN = FOLDER / "web-lvm.conf"
USERS = FOLDER / "sysusers.conf"

INSTANCE = "web"

PROGRAM = "/usr/local/bin/fleecenbd"


def settings(unit: Path, instance: str) -> dict[str, list[str]]:
    """All that a unit sets, sections put together; %i replaced."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value.replace("%i", instance))
    return found


def setting(unit: Path, instance: str, key: str) -> str:
    """The value of what a unit sets once."""
    (value,) = settings(unit, instance)[key]
    return value


def variables(text: str) -> dict[str, str]:
    """What a file for EnvironmentFile= sets, as systemd.exec(5) has it."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.count("=") for line in lines), text
    pairs = (line.partition("=") for line in lines)
    return {key: "".join(shlex.split(value)) for key, _, value in pairs}


def command(words: str, environment: Mapping[str, str]) -> list[str]:
    """The words of ExecStart=; a variable is as many as it holds (systemd.service(5))."""
    found: list[str] = []
    for word in shlex.split(words):
        found += shlex.split(environment[word[1:]]) if word.startswith("$") else [word]
    assert found[0] == PROGRAM
    return [str(FLEECENBD), *found[1:]]


class UnitServer(HeldSocket):
    """A server on sockets of these names, which outlive it; the command may change between."""

    def __init__(self, folder: Path, sockets: Mapping[str, Path], state: Path) -> None:
        self.unix = next(iter(sockets.values()))
        self.log = folder / "server.log"
        self._script = folder / "start.sh"
        self._notices = _Notices(folder / "notify")
        self.pid = 0
        for path in sockets.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self._supervisor = subprocess.Popen(
            [
                "systemd-socket-activate",
                *(word for path in sockets.values() for word in ("-l", str(path))),
                f"--fdname={':'.join(sockets)}",
                *("-E", f"NOTIFY_SOCKET={self._notices.path}", "-E", f"STATE_DIRECTORY={state}"),
                *("sh", str(SUPERVISOR), str(self.log), "sh", str(self._script)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._supervisor.stderr is not None
        for _ in sockets:
            line = self._supervisor.stderr.readline()
            assert line.startswith(b"Listening on"), line.decode()
        # Nothing is run before a first client comes: let it be one that goes at once.
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.connect(str(self.unix))

    def start_with(self, words: list[str]) -> None:
        """Start this command, and wait until it is ready."""
        self._script.write_text(f"exec {shlex.join(words)}\n")
        self.start()


def moved(path: str, folder: Path) -> Path:
    """Where a test has what is in /run."""
    assert path.startswith("/run/")
    return folder / path.removeprefix("/run/")


@contextmanager
def unit_server(folder: Path) -> Iterator[UnitServer]:
    """The sockets that the units ask for, and nobody on them yet."""
    sockets = {
        setting(unit, INSTANCE, "FileDescriptorName"): moved(
            setting(unit, INSTANCE, "ListenStream"), folder
        )
        for unit in (GUEST, BACKUP)
    }
    server = UnitServer(folder, sockets, folder / "state")
    try:
        yield server
        if server.pid:
            assert server.end_by(signal.SIGTERM) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.close()


def start_words(folder: Path, disk: Path, **more: str) -> list[str]:
    """ExecStart= with the variables of the unit, of web.conf (with another image), and more."""
    (plain,) = settings(SERVICE, INSTANCE)["Environment"]
    environment = dict(pair.split("=", 1) for pair in plain.split())
    conf, session = settings(SERVICE, INSTANCE)["EnvironmentFile"]
    assert conf == f"/etc/fleecenbd/{INSTANCE}.conf"
    environment |= variables(CONF.read_text())
    environment["DISKS"] = re.sub("=raw:.*", f"=raw:{disk}", environment["DISKS"])
    written = moved(session.removeprefix("-"), folder)
    if written.exists():
        environment |= variables(written.read_text())
    return command(setting(SERVICE, INSTANCE, "ExecStart"), {**environment, **more})


def first_steps(root: Path) -> list[str]:
    """What the README says to type, with `root` before each place, line by line."""
    lines = re.findall("(?m)^    (.*)$", (FOLDER / "README.md").read_text())
    typed = [re.sub(r" (?=/(?:etc|opt|usr)/)", f" {root}", line) for line in lines]
    ours = [line for line in typed if line.startswith(("cd ", "install "))]
    run("sh", "-ec", "\n".join([f"cd {EXAMPLES.parent}", *ours]))
    return lines


class Systemctl:
    """A systemctl that asks the test, over one pipe, and ends when it answers, over another."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._asked, self._answered = folder / "asked", folder / "answered"
        self._ended = folder / "ended"
        os.mkfifo(self._asked)
        os.mkfifo(self._answered)
        self._bin = folder / "bin"
        self._bin.mkdir()
        command = self._bin / "systemctl"
        command.write_text(
            f'#!/bin/sh\necho "$@" >{self._asked}\n'
            f'read -r status <{self._answered}\necho "$@" >>{self._ended}\nexit "$status"\n'
        )
        command.chmod(0o755)

    def calls(self) -> list[str]:
        """The arguments of each call that got to its end: nobody killed systemctl before."""
        return self._ended.read_text().splitlines()

    def run(self, command: list[str | Path], answer: Callable[[int, int], int]) -> tuple[int, str]:
        """Run a command that calls systemctl: its exit status, and its standard error.

        `answer` is given the number of the call (from 1) and the command's process id; it returns
        the status that systemctl ends with.
        """
        process = subprocess.Popen(
            command,
            env={**os.environ, "PATH": f"{self._bin}:{CLIENTS_PATH}"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to its group is for the command and systemctl
        )
        ended = os.pidfd_open(process.pid)
        # Open both ways: no end of file while nobody asks, no wait for a reader that was killed.
        asked = os.open(self._asked, os.O_RDWR)
        answered = os.open(self._answered, os.O_RDWR)
        try:
            for number in range(1, 10):
                ready, _, _ = select.select([asked, ended], [], [], COMMAND_TIMEOUT_S)
                assert ready, "neither a call of systemctl nor an end"
                if asked not in ready:
                    break
                assert os.read(asked, 1000)
                status = answer(number, process.pid)
                os.write(answered, f"{status}\n".encode())
            _, said = process.communicate(timeout=COMMAND_TIMEOUT_S)
            return process.returncode, said
        finally:
            for descriptor in (asked, answered, ended):
                os.close(descriptor)
            process.kill()
            process.wait()
