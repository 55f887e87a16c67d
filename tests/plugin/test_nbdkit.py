"""The plugin's life inside nbdkit: the ways to start it, what it refuses, and its end."""

import ast
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbd
import pytest

from fleecenbd import __version__
from fleecenbd.plugin.parameters import PARAMETERS
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.temp_watch import INTERVAL_S
from tests.behind_nbdkit import ENVIRONMENT, PLUGIN, behind_nbdkit
from tests.disks import first_difference, make_disk
from tests.plugin.conftest import SIZE
from tests.serving import START_TIMEOUT_S, Serving, connected, run, try_run


def _nbdkit(*words: str | Path) -> tuple[str | Path, ...]:
    settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    return ("env", *settings, "nbdkit", *words)


def _fails(disk: Path, *parameters: str, run_it: bool = True) -> str:
    """The one line on standard error of an nbdkit that cannot begin."""
    command = ("--run", "true") if run_it else ()
    result = try_run(
        *_nbdkit("-f", "-U", disk.parent / "other.sock", "python", PLUGIN, *parameters),
        *(f"state-dir={disk.parent / 'state'}", *command),
    )
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    return line


# -- the ways to start it ------------------------------------------------------------------


def test_run_hands_the_client_the_backup(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    run(
        *_nbdkit("-U", "-", "python", PLUGIN, f"disk={disk}", "session=n"),
        *(f"state-dir={tmp_path / 'state'}", "--run", f'nbdcopy "$uri" {target}'),
    )
    assert first_difference(disk, target) is None


def test_run_hands_on_the_status_of_its_command(disk: Path) -> None:
    command = _nbdkit("-U", "-", "python", PLUGIN, f"disk={disk}", "--run", "exit 7")
    assert try_run(*command).returncode == 7


def test_a_single_client_on_standard_input_is_served(disk: Path, tmp_path: Path) -> None:
    client = nbd.NBD()
    command = _nbdkit("-s", "python", PLUGIN, f"disk={disk}", "session=n")
    client.connect_command([*map(str, command), f"state-dir={tmp_path / 'state'}"])
    assert bytes(client.pread(SIZE, 0)) == disk.read_bytes()
    client.trim(SIZE, 0)
    with pytest.raises(nbd.Error) as caught:
        client.pread(1, 0)
    assert caught.value.errnum == errno.EINVAL
    client.shutdown()


def test_socket_activation_hands_the_client_the_backup(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    command = _nbdkit("python", PLUGIN, f"disk={disk}", "session=n", f"state-dir={tmp_path / 's'}")
    run("nbdcopy", "--", "[", *command, "]", target)
    assert first_difference(disk, target) is None


def test_it_serves_from_the_background_and_lets_go_of_the_image_at_the_end(
    disk: Path, tmp_path: Path
) -> None:
    before, socket, pidfile = disk.read_bytes(), tmp_path / "f.sock", tmp_path / "pid"
    os.mkfifo(pidfile)
    reader = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    # Relative paths, which mean nothing any more once nbdkit has gone to the background.
    command = ("-U", socket, "-P", pidfile, "python", PLUGIN, "disk=vm.raw", "session=n")
    result = try_run("env", "-C", tmp_path, *_nbdkit(*command, "state-dir=state")[1:])
    assert result.returncode == 0, result.stderr
    assert select.select([reader], [], [], START_TIMEOUT_S)[0], "nbdkit wrote no pidfile"
    pid = int(os.read(reader, 100))
    os.close(reader)
    process = os.pidfd_open(pid)
    try:
        with (
            connected(f"nbd+unix:///vm?socket={socket}") as guest,
            connected(f"nbd+unix:///vm@n?socket={socket}") as backup,
        ):
            guest.pwrite(b"new" * 1000, 100)
            assert bytes(backup.pread(SIZE, 0)) == before
            path = GuestRecords(tmp_path / "state")._path(str(disk))
            end = time.monotonic() + START_TIMEOUT_S
            while not path.exists():
                assert time.monotonic() < end, "the guest is not noted where the next server looks"
                guest.pread(1, 0)
            # What looks once a second asks in threads, of which none may be from before the fork.
            time.sleep(2.5 * INTERVAL_S)
            guest.pwrite(b"new" * 1000, 100)
        refused = try_run("qemu-io", "-f", "raw", "-c", "write 0 512", disk)
        assert "lock" in refused.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
        ended = select.select([process], [], [], START_TIMEOUT_S)[0]
        os.close(process)
    assert ended, "nbdkit did not end"
    run("qemu-io", "-f", "raw", "-c", "write 0 512", disk)


def test_it_can_be_loaded_by_its_magic_key_too(disk: Path) -> None:
    command = _nbdkit("-U", "-", "python", f"script={PLUGIN}", f"disk={disk}")
    size = run(*command, "-e", "vm", "--run", 'nbdinfo --size "$uri"')
    assert int(size) == SIZE


def test_several_disks_are_served_under_one_session(disk: Path, tmp_path: Path) -> None:
    other = make_disk(tmp_path / "data.raw", SIZE, seed=7)
    with behind_nbdkit(tmp_path, f"vda={disk}", f"vdb={other}", "--begin", "n") as server:
        for name, image in (("vda", disk), ("vdb", other)):
            with connected(server.uri(name)) as guest, connected(server.uri(f"{name}@n")) as backup:
                before = image.read_bytes()
                guest.pwrite(b"x" * 5000, 3000)
                assert bytes(backup.pread(SIZE, 0)) == before


# -- what it tells -------------------------------------------------------------------------


def test_dump_plugin_tells_our_version_and_every_parameter() -> None:
    told = run(*_nbdkit("python", PLUGIN, "--dump-plugin")).splitlines()
    assert f"fleecenbd_version={__version__}" in told
    for name, meaning in PARAMETERS.items():
        assert f"fleecenbd_parameter_{name}={meaning}" in told


def test_dump_plugin_does_not_crash_where_nothing_can_be_written() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            list(map(str, _nbdkit("python", PLUGIN, "--dump-plugin"))), stdout=full, check=False
        )
    assert ended.returncode >= 0


def test_where_fleecenbd_is_not_installed_it_is_told_for_which_python(tmp_path: Path) -> None:
    alone = tmp_path / "share" / "fleecenbd" / "fleece.py"
    alone.parent.mkdir(parents=True)
    shutil.copy(PLUGIN, alone)
    # Python itself looks for an environment by the first python3 on its path.
    elsewhere = ("env", "-u", "VIRTUAL_ENV", "PATH=/usr/sbin:/usr/bin:/bin")
    result = try_run(*elsewhere, "nbdkit", "python", alone, "--dump-plugin")
    assert result.returncode != 0
    assert "not installed for the Python that nbdkit embeds" in result.stderr
    assert str(tmp_path / "lib") in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_image_is_named(disk: Path) -> None:
    message = _fails(disk, "disk=missing.raw")
    assert "missing.raw: No such file or directory" in message


def test_a_container_is_refused(disk: Path) -> None:
    disk.write_bytes(b"QFI\xfb" + bytes(4096))
    assert "qcow2" in _fails(disk, f"disk={disk}")


def test_an_image_that_is_served_already_is_refused_with_what_to_do(
    server: Serving, disk: Path
) -> None:
    message = _fails(disk, f"disk={disk}")
    assert f"nbdkit (pid {server.pid})" in message
    assert "force-share=true" in message


def test_no_disk_and_unknown_parameters_are_told_in_one_line(disk: Path) -> None:
    assert "disk=[NAME=]IMAGE" in _fails(disk)
    assert "colour=" in _fails(disk, f"disk={disk}", "colour=red")


def test_a_session_that_cannot_be_armed_is_told_before_anything_is_served(
    disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("no folder")
    message = _fails(disk, f"disk={disk}", "session=n")
    assert "cannot begin session n" in message
    assert "state-dir=" in message


def test_the_empty_name_is_refused_and_the_log_lists_the_names(server: Serving) -> None:
    result = try_run("nbdinfo", server.uri(""))
    assert result.returncode != 0
    assert "name an export: vm, vm@n" in server.messages()


def test_a_second_guest_is_refused_and_the_log_names_the_first(server: Serving) -> None:
    with connected(server.uri("vm")):
        result = try_run("nbdinfo", server.uri("vm"))
        assert result.returncode != 0
    assert f"vm is in use by pid {os.getpid()}" in server.messages()
    assert "shared" not in server.messages()


def test_a_guest_that_comes_back_at_once_finds_its_place(server: Serving) -> None:
    for _ in range(20):
        with connected(server.uri("vm")) as guest:
            guest.aio_pread(nbd.Buffer(4096), 0)


def test_descriptions_reach_the_client(server: Serving) -> None:
    told = run("nbdinfo", "--list", "--json", f"nbd+unix://?socket={server.unix}")
    found = {each["export-name"]: each["description"] for each in json.loads(told)["exports"]}
    assert found["vm"] == "guest disk vm"
    assert "session n " in found["vm@n"]


# -- requests ------------------------------------------------------------------------------


def test_writes_zeroes_and_discards_reach_the_disk_with_their_flags(
    server: Serving, disk: Path
) -> None:
    with connected(server.uri("vm")) as guest:
        assert guest.can_fua()
        assert guest.can_cache()
        guest.pwrite(b"w" * 70_000, 5, nbd.CMD_FLAG_FUA)
        guest.cache(4096, 0)
        guest.zero(4096, 8192)
        guest.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        guest.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
        guest.flush()
    content = disk.read_bytes()
    assert content[5:8192] == b"w" * 8187
    assert content[8192:12288] == content[16384:20480] == bytes(4096)


def test_a_fast_zero_that_would_have_to_copy_is_not_supported(server: Serving) -> None:
    with connected(server.uri("vm")) as guest:
        assert guest.can_fast_zero()
        with pytest.raises(nbd.Error) as caught:
            guest.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert caught.value.errnum == errno.ENOTSUP


def test_a_backup_is_neither_written_nor_zeroed(server: Serving, tmp_path: Path) -> None:
    with connected(server.uri("vm@n")) as backup:
        for call, number in (
            (lambda: backup.pwrite(b"x", 0), errno.EPERM),
            (lambda: backup.zero(512, 0), errno.EINVAL),
        ):
            with pytest.raises(nbd.Error) as caught:
                call()
            assert caught.value.errnum == number
        assert bytes(backup.pread(SIZE, 0)) == (tmp_path / "before.raw").read_bytes()


def test_a_fast_zero_at_a_backup_fails_alone(server: Serving) -> None:
    with connected(server.uri("vm")) as guest, connected(server.uri("vm@n")) as backup:
        backup.set_strict_mode(0)
        with pytest.raises(nbd.Error) as caught:
            backup.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert caught.value.errnum == errno.EINVAL
        assert len(guest.pread(512, 0)) == 512


def test_read_only_disks_can_be_read_and_their_backups_trimmed(disk: Path, tmp_path: Path) -> None:
    with (
        behind_nbdkit(tmp_path, disk, "--begin", "n", "--read-only", "true") as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@n")) as backup,
    ):
        assert guest.is_read_only()
        assert len(guest.pread(SIZE, 0)) == SIZE
        backup.trim(4096, 0)


def test_nbdkits_own_read_only_opens_images_read_only(disk: Path, tmp_path: Path) -> None:
    with behind_nbdkit(tmp_path, disk, options=["-r"]) as server:
        # Readers of what nobody writes are in nobody's way: QEMU's among them.
        run("qemu-img", "info", disk)
        with connected(server.uri("vm")) as one, connected(server.uri("vm")) as other:
            assert one.is_read_only()
            assert len(other.pread(SIZE, 0)) == SIZE


def _read_on(client: nbd.NBD) -> None:
    while True:
        client.pread(1, 0)


# -- the end -------------------------------------------------------------------------------


def test_a_disk_does_not_come_back_different_under_its_guest(disk: Path, tmp_path: Path) -> None:
    with behind_nbdkit(tmp_path, disk) as server, connected(server.uri("vm")) as guest:
        guest.pwrite(b"x", 0)
        server.process.send_signal(signal.SIGTERM)
        # nbdkit waits for its clients. This one goes because it is told to.
        with pytest.raises(nbd.Error):
            _read_on(guest)
    with disk.open("ab") as image:
        image.truncate(2 * SIZE)
    message = _fails(disk, f"disk={disk}", run_it=False)
    assert f"had {SIZE} bytes, and has {2 * SIZE} now" in message
    assert f"pid {os.getpid()}" in message


def test_a_guest_that_has_left_by_itself_is_forgotten(disk: Path, tmp_path: Path) -> None:
    guests = tmp_path / "state" / "guests"

    def wait_for(count: int, why: str) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while len([*guests.glob("*.json")]) != count:
            assert time.monotonic() < end, why
            time.sleep(0.2)  # a file's beginning and end are no events that nbdkit tells

    with behind_nbdkit(tmp_path, disk) as server:
        with connected(server.uri("vm")) as guest:
            guest.pwrite(b"x", 0)
            wait_for(1, "there is no record of a guest that is connected")
        wait_for(0, "the record of a guest that left is still there")


def test_neither_uvloop_nor_typer_is_needed() -> None:
    script = (
        "import sys\n"
        "for name in ('uvloop', 'typer', 'rich', 'nbd'): sys.modules[name] = None\n"
        "import fleecenbd.plugin.service, fleecenbd.plugin.words\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_plugins_file_holds_callbacks_and_nothing_else() -> None:
    functions = [
        node.name
        for node in ast.walk(ast.parse(PLUGIN.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.body) > 12
    ]
    assert functions == []
