"""What docs/quickstart.md tells people to type, typed, in its order, in an empty home."""

import os
import re
import select
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.disks import MIB, copy_disk, first_difference, make_disk
from tests.serving import (
    CLIENTS_PATH,
    COMMAND_TIMEOUT_S,
    FLEECENBD,
    connected,
    run,
    serving,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()


def _blocks(section: str) -> list[str]:
    """The indented blocks of a section, without the indentation."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, section
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", found[1], re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in blocks]


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": CLIENTS_PATH,
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
    }


def _type(home: Path, cwd: Path, *lines: str) -> str:
    """Type lines at a shell, which gives up at the first that fails; its standard output."""
    result = subprocess.run(
        ["sh", "-ec", "\n".join(lines)],
        cwd=cwd,
        env=_environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_first_backup_and_the_pull_while_somebody_writes(tmp_path: Path) -> None:
    (set_up,) = _blocks("Set up")
    venv, *entering = set_up.splitlines()
    assert venv == "make venv"  # done, or this test would not run
    home = tmp_path / "home"
    home.mkdir()
    first = _type(home, ROOT, *entering, "pwd", *_blocks("A first backup"))
    fleecing = home / "fleecing"
    assert first.splitlines() == [str(fleecing), "equal"]

    serve, guest, pull, compare = _blocks("While somebody writes")
    words = shlex.split(serve)
    assert words[:2] == ["fleecenbd", "serve"]
    assert words[-2:] == ["-U", "vm.sock"]
    (fleecing / "vm.sock").symlink_to("f.sock")  # where tests.serving puts it
    image, *options = words[2:-2]
    with serving(fleecing, fleecing / image, *options) as server:
        said = _type(home, ROOT, entering[0], f"cd {fleecing}", guest, pull, compare)
        assert server.temp_bytes() == 0
        (qemu,) = _blocks("A guest")
        # What was typed starts a machine without an end; its monitor (Ctrl-a c) ends it.
        monitor = subprocess.run(
            ["sh", "-c", qemu],
            cwd=fleecing,
            env=_environment(home),
            input="\x01cinfo block\nquit\n",
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    assert "equal\n" in said
    assert "the guest has gone on" in said
    assert monitor.returncode == 0, monitor.stdout + monitor.stderr
    assert re.search(r"nbd\+unix:.*vm\.sock", monitor.stdout), monitor.stdout


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = _blocks("Every night")[1]
    path = tmp_path / "fleecenbd-vm.service"
    path.write_text(unit.replace("/opt/fleecenbd/bin/fleecenbd", str(FLEECENBD)) + "\n")
    run("systemd-analyze", "verify", path)


def test_the_night_script_backs_up_the_disk_as_it_was_at_the_restart(tmp_path: Path) -> None:
    _, unit, script = _blocks("Every night")
    (started,) = re.findall(r"^ExecStart=/opt/fleecenbd/bin/fleecenbd serve (.*)$", unit, re.M)
    image, *options = shlex.split(started)
    assert options[-2:] == ["-U", "/run/vm.sock"]
    disk = make_disk(tmp_path / Path(image).name, 2 * MIB)
    backups = tmp_path / "backup"
    backups.mkdir()
    typed = tmp_path / "nightly.sh"
    for there, here in {
        "/opt/fleecenbd/bin/": f"{ROOT}/examples/",
        "/run/vm.sock": str(tmp_path / "f.sock"),
        "/backup/": f"{backups}/",
    }.items():
        assert there in script
        script = script.replace(there, here)
    typed.write_text(script)
    # A systemctl that asks this test, over one pipe, and goes on when it answers, over another.
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    os.mkfifo(asked)
    os.mkfifo(answered)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "systemctl").write_text(f'#!/bin/sh\necho "$@" >{asked}\nread -r _ <{answered}\n')
    (commands / "systemctl").chmod(0o755)

    with ExitStack() as stack:
        with serving(tmp_path, disk, *options[:-2]) as server, connected(server.uri("vm")) as guest:
            guest.pwrite(b"yesterday" * 1000, 5000)
            listening = os.open(asked, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, listening)
            night = stack.enter_context(
                subprocess.Popen(
                    ["sh", typed],
                    env={**os.environ, "PATH": f"{commands}:{CLIENTS_PATH}"},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(night.kill)
            ended = os.pidfd_open(night.pid)
            stack.callback(os.close, ended)
            ready, _, _ = select.select([listening, ended], [], [], COMMAND_TIMEOUT_S)
            assert ready == [listening], "the script did not ask for a restart"
            assert os.read(listening, 100).decode() == "restart fleecenbd-vm\n"
        at_restart = copy_disk(disk, tmp_path / "at-restart.raw")
        with serving(tmp_path, disk, *options[:-2]) as server, connected(server.uri("vm")) as guest:
            guest.pwrite(b"today" * 1000, 5000)
            answered.write_text("restarted\n")
            _, said = night.communicate(timeout=COMMAND_TIMEOUT_S)
            assert night.returncode == 0, said
            assert server.temp_bytes() == 0
    (backup,) = backups.iterdir()
    assert first_difference(backup, at_restart) is None
    assert first_difference(backup, disk) is not None
