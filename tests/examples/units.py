"""systemd units, read as far as tests need it, and their command run on sockets as they ask for."""

import shlex
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.guest.restarting import SUPERVISOR, HeldSocket, _Notices
from tests.serving import FLEECENBD

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
