"""README's and docs/nightly.md's recipes for every night, typed while a guest writes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.disks import KIB, MIB, first_difference, make_disk
from tests.remembering import Moment, RememberingGuest, remembering
from tests.serving import CLIENTS_PATH, COMMAND_TIMEOUT_S, FLEECENBD, connected, run, serving

ROOT = Path(__file__).parents[2]
SOCKET = "/run/vm.sock"
FOLDER = "/backup/vm"
BY_HAND = r"^## By hand\n(.*?)(?=^## What the answer says)"
ONE_LINE = {
    "README.md": r"^## Back up a running VM every night\n(.*?)(?=^## )",
    "docs/nightly.md": r"^## One line a night\n(.*?)(?=^## With stock tools)",
}
SIZE = 5 * MIB + 4 * KIB + 512
PAUSE_S = 0.02  # of the guest between writes: a night does not change the whole disk


def _blocks(text: str) -> list[str]:
    """The indented blocks, without the indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in found]


def _part(page: str, pattern: str) -> str:
    found = re.search(pattern, (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, page
    return found[1]


def _type(folder: Path, socket: Path, text: str) -> str:
    """Type lines at a shell, which gives up at the first that fails; its standard output."""
    assert SOCKET in text or re.search("session finish|convert|backup", text)
    result = subprocess.run(
        ["sh", "-ec", text.replace(SOCKET, str(socket))],
        cwd=folder,
        env={**os.environ, "PATH": CLIENTS_PATH, "FLEECENBD_CONTROL": f"{socket}.control"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_what_is_typed_by_hand_makes_a_full_backup_and_an_increment(tmp_path: Path) -> None:
    page = "docs/nightly.md"
    set_up, first, *second = _blocks(_part(page, BY_HAND))
    serve, export = set_up.splitlines()
    assert serve == f"fleecenbd serve vm.raw -U {SOCKET} &"
    assert export == f"export FLEECENBD_CONTROL={SOCKET}.control"
    second = [block for block in second if "convert" not in block]
    (back,) = [
        line for line in _blocks((ROOT / page).read_text()) if line.startswith("qemu-img convert")
    ]
    backups = tmp_path / "backups"
    backups.mkdir()
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    content = disk.read_bytes()
    answers = []
    with serving(tmp_path, disk) as server:
        guest = RememberingGuest(server.uri("vm"), content, pause_s=PAUSE_S)
        with remembering(guest):
            moments = []
            for text, answer in ((first, "monday.json"), ("\n".join(second), "tuesday.json")):
                guest.wait(10)
                moments.append(Moment([guest]))
                _type(backups, server.unix, text)
                moments[-1].is_over()
                answers.append(json.loads((backups / answer).read_text()))
                if answer == "monday.json":
                    assert moments[0].is_shown_by((backups / "monday.raw").read_bytes())
            _type(backups, server.unix, back)
        control = ("--control", f"{server.unix}.control")
        listed = json.loads(run(FLEECENBD, "session", "list", "--json", *control))["sessions"]
    assert moments[1].is_shown_by((backups / "restored.raw").read_bytes())
    assert [session["result"] for session in listed] == ["success", "success"]
    full, increment = (answer["disks"][0]["bitmap"] for answer in answers)
    assert (full["mode"], increment["mode"]) == ("new", "use")
    assert increment["since"]["session_id"] == answers[0]["id"]
    assert 0 < increment["dirty"] < SIZE


def test_an_increment_on_the_wrong_predecessor_is_noticed_by_what_is_typed(tmp_path: Path) -> None:
    (line,) = [
        line
        for line in _part("docs/nightly.md", BY_HAND).splitlines()
        if line.startswith("    grep")
    ]
    night = {"name": "n", "id": "an id", "disks": [{"bitmap": {"id": "of a bitmap"}}]}
    (tmp_path / "monday.json").write_text(json.dumps(night, indent=2))
    for since, status in (("an id", 0), ("another id", 1), ("of a bitmap", 1)):
        night["disks"] = [{"bitmap": {"since": {"session": "n", "session_id": since}}}]
        (tmp_path / "tuesday.json").write_text(json.dumps(night, indent=2))
        done = subprocess.run(["sh", "-ec", line], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == status, since


@pytest.mark.parametrize("page", ONE_LINE)
def test_the_line_for_every_night_makes_a_chain(tmp_path: Path, page: str) -> None:
    lines = "\n".join(_blocks(_part(page, ONE_LINE[page]))).splitlines()
    (line,) = [line for line in lines if line.startswith("fleecenbd backup --all")]
    back = next(line for line in _readme() if line.startswith(f"qemu-img convert -O raw {FOLDER}"))
    folder = tmp_path / "backups of vm"
    folder.mkdir()
    line = line.replace(FOLDER, f"'{folder}'")
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    content = disk.read_bytes()
    with serving(tmp_path, disk) as server:
        guest = RememberingGuest(server.uri("vm"), content, pause_s=PAUSE_S)
        with remembering(guest):
            for night in range(3):
                guest.wait(10)
                moment = Moment([guest])
                (backup,) = _type(folder, server.unix, line).splitlines()
                moment.is_over()
                words = back.split()
                restore = [*words[:-2], f"'{backup}'", words[-1]]
                assert Path(backup).name == ("vm.qcow2" if night else "vm.raw")
                _type(tmp_path, server.unix, " ".join(restore))
                assert moment.is_shown_by((tmp_path / words[-1]).read_bytes())
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", backup))
    assert len(chain) == 3


def _readme() -> list[str]:
    return "\n".join(_blocks((ROOT / "README.md").read_text())).splitlines()


def test_the_readme_s_other_backups_can_be_typed(tmp_path: Path) -> None:
    lines = [line for line in _readme() if line.startswith("fleecenbd backup vm ")]
    assert [line.split()[3] for line in lines] == ["monday.raw", "vm-backup.raw", "checked.raw"]
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    backups = tmp_path / "backups"
    backups.mkdir()
    with serving(tmp_path, disk) as server:
        for line in (*lines, lines[1]):
            with connected(server.uri("vm")) as guest:
                guest.pwrite(line.encode(), 70_000)
            _type(backups, server.unix, line)
            assert first_difference(backups / line.split()[3], disk) is None
    assert (backups / "checked.raw.blake2b").exists()


def test_systemd_takes_the_page_s_units(tmp_path: Path) -> None:
    blocks = _blocks(_part("docs/nightly.md", ONE_LINE["docs/nightly.md"]))
    (service,) = [block for block in blocks if "[Service]" in block]
    (timer,) = [block for block in blocks if "[Timer]" in block]
    (line,) = [line for line in _readme() if line.startswith("fleecenbd backup --all")]
    assert f"ExecStart=/opt/fleecenbd/bin/{line}\n" in f"{service}\n"
    assert f"Environment=FLEECENBD_CONTROL={SOCKET}.control\n" in service
    service = service.replace("/opt/fleecenbd/bin/fleecenbd", str(FLEECENBD))
    (tmp_path / "backup-vm.service").write_text(f"{service}\n")
    (tmp_path / "backup-vm.timer").write_text(f"{timer}\n")
    run("systemd-analyze", "verify", tmp_path / "backup-vm.service", tmp_path / "backup-vm.timer")
