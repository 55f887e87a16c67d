"""A server's state directory: whose it is, where it is, and --begin over what is left in it."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import nbd
import pytest

from fleecenbd.cli.endpoints import Addresses
from fleecenbd.cli.handed import NOTHING_HANDED
from fleecenbd.cli.lasting import state_of
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.values import DiskSpec
from tests.cli.conftest import SERVE, Fails, started
from tests.controlling import Control
from tests.serving import connected, serving

MIB = 1 << 20
OLD = b"old!" * (MIB // 4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    path.write_bytes(OLD)
    return path


def _options(base: Path, unix: str = "/run/vm.sock", **changes: object) -> ServeOptions:
    given = {"state_directory": base, "lasts": True, "addresses": Addresses(unix), **changes}
    return ServeOptions(disks=(DiskSpec("vm", "vm.raw"),), **given)  # type: ignore[arg-type]


def test_each_address_has_a_folder_of_its_own_by_default_and_keeps_it(tmp_path: Path) -> None:
    web = state_of(_options(tmp_path, "/run/web.sock"), NOTHING_HANDED)
    assert web == state_of(_options(tmp_path, "/run/../run/web.sock"), NOTHING_HANDED)
    assert web != state_of(_options(tmp_path, "/run/db.sock"), NOTHING_HANDED)
    assert web is not None
    assert web.parent == tmp_path / "servers"
    assert re.fullmatch(r"run-web\.sock-[0-9a-f]{12}", web.name)


def test_a_folder_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    assert state_of(_options(tmp_path, state_given=True), NOTHING_HANDED) == tmp_path


def test_a_port_is_an_address_where_the_unix_socket_is_private(tmp_path: Path) -> None:
    with_port = _options(tmp_path, addresses=Addresses("-", port=10809))
    found = state_of(with_port, NOTHING_HANDED)
    assert found is not None
    assert found.name.startswith("localhost-10809-")


@pytest.mark.parametrize(
    "changes",
    [{"lasts": False}, {"state_directory": None}, {"addresses": Addresses("-")}],
)
def test_where_nobody_comes_back_nothing_lasts(tmp_path: Path, changes: dict[str, object]) -> None:
    assert state_of(_options(tmp_path, **changes), NOTHING_HANDED) is None


def test_two_servers_without_options_are_in_nobody_s_way(tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "STATE_DIRECTORY": ""}
    with ExitStack() as stack:
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "vm.raw").write_bytes(OLD)
            command = (*SERVE, folder / "vm.raw", "-U", folder / "f.sock", "--begin", "n")
            stack.enter_context(started(folder, *command, environment=environment))
        assert len(list((tmp_path / "state" / "fleecenbd" / "servers").iterdir())) == 2


def test_a_state_directory_of_a_live_server_is_an_error_that_names_it(
    tmp_path: Path, image: Path, fails: Fails
) -> None:
    (tmp_path / "other.raw").write_bytes(OLD)
    with serving(tmp_path, image) as server:
        line = fails(
            *("serve", tmp_path / "other.raw", "-U", tmp_path / "g.sock"),
            *("--state-dir", tmp_path / "state"),
        )
        assert f"another live server (pid {server.pid}) uses this state directory" in line


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_begin_goes_on_with_the_session_that_is_there(
    tmp_path: Path, image: Path, end: signal.Signals
) -> None:
    command = (*SERVE, image, "-U", tmp_path / "f.sock", "--state-dir", tmp_path / "state")
    uri = f"nbd+unix:///{{}}?socket={tmp_path / 'f.sock'}"
    for number in range(3):
        with started(tmp_path, *command, "--begin", "n") as server:
            with connected(uri.format("vm@n")) as backup, connected(uri.format("vm")) as guest:
                guest.pwrite(b"new!" * 1024, number * 4096)
                assert backup.pread(MIB, 0) == OLD
            server.send_signal(end)
            _, told = server.communicate(timeout=30)
            assert server.returncode == (-9 if end == signal.SIGKILL else 0)
            assert ("goes on (--begin)" in told) == (number > 0)
        (tmp_path / "f.sock").unlink(missing_ok=True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_that_is_read_once_is_so_after_a_restart(
    tmp_path: Path, image: Path, end: signal.Signals
) -> None:
    command = (*SERVE, image, "-U", tmp_path / "f.sock", "--state-dir", tmp_path / "state")
    control = Control(tmp_path / "f.sock.control")
    uri = f"nbd+unix:///vm@n?socket={tmp_path / 'f.sock'}"
    with started(tmp_path, *command) as server:
        control.call("PUT", "sessions/n", read_once=True)
        with connected(uri) as backup:
            assert backup.pread(MIB // 2, 0) == OLD[: MIB // 2]
            with pytest.raises(nbd.Error, match="Invalid argument"):
                backup.pread(4096, 0)
        server.send_signal(end)
        server.communicate(timeout=30)
    control.close()
    (tmp_path / "f.sock").unlink(missing_ok=True)
    with started(tmp_path, *command):
        assert control.call("GET", "sessions/n")["read_once"] is True
        with connected(uri) as backup:
            for place in (0, MIB // 2 - 4096):
                with pytest.raises(nbd.Error, match="Invalid argument"):
                    backup.pread(4096, place)
            assert backup.pread(MIB // 2, MIB // 2) == OLD[MIB // 2 :]
            with pytest.raises(nbd.Error, match="Invalid argument"):
                backup.pread(4096, MIB // 2)


def test_with_end_sessions_each_start_is_a_new_moment(tmp_path: Path, image: Path) -> None:
    for _ in range(2):
        with (
            serving(tmp_path, image, "--begin", "n", "--end-sessions") as server,
            connected(server.uri("vm@n")) as backup,
            connected(server.uri("vm")) as guest,
        ):
            before = image.read_bytes()
            guest.pwrite(os.urandom(4096), 0)
            assert backup.pread(MIB, 0) == before
    assert not list((tmp_path / "state" / "files").glob("temp-*"))


def test_begin_over_other_disks_than_the_session_s_says_what_to_do(
    tmp_path: Path, image: Path, fails: Fails
) -> None:
    with serving(tmp_path, image, "--begin", "n"):
        pass
    (tmp_path / "b.raw").write_bytes(OLD)
    line = fails(
        *("serve", image, tmp_path / "b.raw", "-U", tmp_path / "f.sock", "--begin", "n"),
        *("--state-dir", tmp_path / "state", "--log-level", "error"),
    )
    assert "left one of this name over vm, and now there are vm, b" in line
    assert "fleecenbd session finish n" in line


def test_a_disk_that_is_named_otherwise_in_one_start_costs_no_session(
    tmp_path: Path, image: Path, fails: Fails
) -> None:
    with (
        serving(tmp_path, f"vda={image}", "--begin", "r") as server,
        connected(server.uri("vda")) as guest,
    ):
        guest.pwrite(b"new!" * 1024, 0)
    mistyped = ("serve", f"vdx={image}", "-U", tmp_path / "f.sock")
    line = fails(*mistyped, "--state-dir", tmp_path / "state", "--log-level", "error")
    assert "session r is over vda, not served now" in line
    assert f"serve vda={image} again, or give up such sessions with --forget-missing" in line
    with (
        serving(tmp_path, f"vda={image}") as server,
        connected(server.uri("vda@r")) as backup,
    ):
        assert backup.pread(MIB, 0) == OLD


def test_a_session_over_a_missing_disk_is_lost_where_that_is_asked_for(
    tmp_path: Path, image: Path
) -> None:
    with serving(tmp_path, f"vda={image}", "--begin", "r"):
        pass
    with serving(tmp_path, f"vdx={image}", "--forget-missing") as server:
        assert "session r is lost (--forget-missing): vda is not served now" in server.messages()
    assert not list((tmp_path / "state" / "files").glob("temp-*"))
    with serving(tmp_path, f"vdx={image}"):
        pass


def test_a_broken_session_is_begun_anew(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, image, "--begin", "n"):
        pass
    image.write_bytes(b"else" * (MIB // 4))
    with (
        serving(tmp_path, image, "--begin", "n") as server,
        connected(server.uri("vm@n")) as backup,
    ):
        assert backup.pread(MIB, 0) == b"else" * (MIB // 4)
        assert "somebody else changed" in server.messages()
        assert "session n is begun anew" in server.messages()


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_a_folder_of_temp_images_that_is_not_there_yet_costs_no_session(
    tmp_path: Path, image: Path, way: str, fails: Fails
) -> None:
    """With --begin the server waits for it, in the way that a supervisor starts it again."""
    temps, away = tmp_path / "temps", tmp_path / "away"
    temps.mkdir()
    words = (image, "--begin", "n", "--temp-dir", temps)
    with serving(tmp_path, *words) as server:
        with connected(server.uri("vm")) as guest:
            guest.pwrite(b"new!" * 1024, 0)
            guest.flush()
        if way == "kill":
            server.kill()
    temps.rename(away)
    command = (*words, "-U", tmp_path / "f.sock", "--state-dir", tmp_path / "state")
    told = fails("serve", *command)
    assert f"--temp-dir {temps}: there is no such folder; nothing was changed" in told
    away.rename(temps)
    with (
        serving(tmp_path, *words) as server,
        connected(server.uri("vm@n")) as backup,
    ):
        assert "session n is not begun anew: it goes on" in server.messages()
        assert backup.pread(MIB, 0) == OLD


def test_a_state_directory_of_a_newer_version_is_refused_and_left_alone(
    tmp_path: Path, image: Path, fails: Fails
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    document = json.dumps({"format": "fleecenbd state", "version": 9})
    (state / "state.json").write_text(document)
    line = fails("serve", image, "-U", tmp_path / "f.sock", "--state-dir", state)
    assert "this state is of version 9" in line
    assert (state / "state.json").read_text() == document


def test_a_guest_is_served_where_no_state_can_be_kept_by_default(
    tmp_path: Path, image: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    environment = {"XDG_STATE_HOME": str(tmp_path / "home"), "STATE_DIRECTORY": ""}
    command = (*SERVE, image, "-U", tmp_path / "f.sock")
    with started(tmp_path, *command, environment=environment) as server:
        with connected(f"nbd+unix:///vm?socket={tmp_path / 'f.sock'}") as guest:
            guest.pwrite(b"new", 0)
        server.terminate()
        _, told = server.communicate(timeout=30)
    assert "no bitmap and no session can last" in told


def test_one_shot_servers_leave_nothing(tmp_path: Path, image: Path) -> None:
    command = [str(word) for word in (*SERVE, image, "--single", "--begin", "n")]
    client = nbd.NBD()
    client.connect_command([*command, "--state-dir", str(tmp_path / "state")])
    assert client.pread(4096, 0) == OLD[:4096]
    client.shutdown()
    assert os.listdir(tmp_path / "state") == []


def test_trust_offline_names_disks(image: Path, fails: Fails) -> None:
    line = fails("serve", image, "-U", "f.sock", "--trust-offline", "vm,vdb", status=2)
    assert "--trust-offline: there will be no disk called 'vdb'; there will be vm" in line
