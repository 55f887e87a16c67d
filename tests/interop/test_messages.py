"""Where things go wrong, the user is told: the object, the cause, the way out, in one line."""

import os
import re
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
import pytest

from tests.disks import KIB, MIB, make_disk
from tests.interop.conftest import ERROR_TEXT, Fleeced, Serve, not_behind_nbdkit, overwrite
from tests.serving import FLEECENBD, Serving, connected, run, serving, try_run


def _serve_fails(tmp_path: Path, *arguments: str | Path, status: int = 1) -> str:
    """The one line on standard error of a `serve` that cannot begin."""
    result = try_run(
        *(FLEECENBD, "serve", *arguments, "-U", tmp_path / "x.sock"),
        *("--state-dir", tmp_path / "state"),
        timeout_s=30,
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    message = _serve_fails(tmp_path, tmp_path / "missing.raw")
    assert "missing.raw" in message
    assert re.search(r"no such file|does not exist", message, re.IGNORECASE)


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder" in _serve_fails(tmp_path, tmp_path / "folder")


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "luks"])
def test_a_container_is_refused_unless_it_is_called_raw(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "vm.img"
    if kind == "luks":
        # By its header: qemu-img measures the CPU's speed for a real one, and fails under load.
        image.write_bytes(b"LUKS\xba\xbe\x00\x02" + bytes(MIB - 8))
    else:
        run("qemu-img", "create", "-q", "-f", kind, image, "1M")
    message = _serve_fails(tmp_path, image)
    assert kind in message.lower()
    assert "raw:" in message
    with serving(tmp_path, f"vm=raw:{image}") as server:
        assert int(run("nbdinfo", "--size", server.uri("vm"))) == image.stat().st_size


def test_an_image_that_qemu_has_open_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with _opened_by_qemu(disk):
        message = _serve_fails(tmp_path, disk)
        assert "vm.raw" in message
        assert "in use" in message or "lock" in message
        assert "--force-share" in message


def test_qemu_is_refused_an_image_that_is_served(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk):
        result = try_run("qemu-io", "-f", "raw", "-c", "write 0 4k", disk)
        assert result.returncode != 0
        assert "lock" in result.stderr
    run("qemu-io", "-f", "raw", "-c", "write 0 4k", disk)


def test_two_servers_refuse_each_other_one_image(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    with serving(tmp_path, disk):
        (tmp_path / "other").mkdir()
        message = _serve_fails(tmp_path / "other", disk)
        assert "vm.raw" in message


def test_two_disks_of_one_name_are_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one = make_disk(tmp_path / "vm.raw", MIB)
    other = make_disk(tmp_path / "a" / "vm.raw", MIB)
    message = _serve_fails(tmp_path, one, other, status=2)
    assert "vm" in message


def test_a_socket_in_use_is_refused_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        message = _serve_fails(tmp_path, disk)
        assert "x.sock" in message
        assert "in use" in message or "already" in message
    # Closed, but its file is still there: nobody listens on it.
    path.rename(tmp_path / "f.sock")
    with serving(tmp_path, disk) as server:
        assert int(run("nbdinfo", "--size", server.uri("vm"))) == MIB


def test_an_image_without_the_right_to_read_is_named(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    disk.chmod(0)
    # Root may read everything, unless it gives that capability away.
    give_up = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={give_up}"] if os.geteuid() == 0 else []
    result = try_run(*prefix, FLEECENBD, "serve", disk, "-U", tmp_path / "x.sock", timeout_s=30)
    assert result.returncode == 1, result.stderr
    assert "vm.raw" in result.stderr
    assert "ermission denied" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_usage_exits_with_status_two(tmp_path: Path) -> None:
    assert try_run(FLEECENBD, "serve").returncode == 2
    assert try_run(FLEECENBD, "serve", "--no-such-option").returncode == 2
    assert try_run(FLEECENBD, "no-such-command").returncode == 2


def _refusal(uri: str) -> str:
    """What the server says to a client that may not open an export, as QEMU hands it on."""
    result = try_run("qemu-img", "info", "-f", "raw", uri)
    assert result.returncode != 0
    return result.stderr.partition("server reported: ")[2]


def _told(uri: str, length: int, offset: int) -> str:
    """The server's text for a read that fails; libnbd shows it to those who debug only."""
    read = f"h.pread({length}, {offset})"
    result = try_run("nbdsh", "-c", "h.set_debug(True)", "-u", uri, "-c", read)
    assert result.returncode != 0
    return result.stderr


@not_behind_nbdkit(ERROR_TEXT)
def test_an_unknown_export_is_named_in_the_refusal(fleeced: Fleeced) -> None:
    assert "vm@weekly" in _refusal(fleeced.server.uri("vm@weekly"))


@not_behind_nbdkit(ERROR_TEXT)
def test_the_empty_name_is_refused_with_the_names_that_there_are(fleeced: Fleeced) -> None:
    assert "vm, vm@nightly" in _refusal(fleeced.server.uri(""))


@not_behind_nbdkit(ERROR_TEXT)
def test_a_second_guest_is_refused_with_the_process_of_the_first(fleeced: Fleeced) -> None:
    with connected(fleeced.guest):
        refusal = _refusal(fleeced.guest)
        second = nbd.NBD()
        with pytest.raises(nbd.Error, match="policy"):
            second.connect_uri(fleeced.guest)
    assert "vm" in refusal
    assert f"pid {os.getpid()}" in refusal


@not_behind_nbdkit(ERROR_TEXT)
def test_a_read_of_what_was_released_is_told_the_offset_and_the_reason(fleeced: Fleeced) -> None:
    with connected(fleeced.backup) as backup:
        backup.trim(MIB, MIB)
    told = _told(fleeced.backup, 2, MIB - 1)
    assert str(MIB) in told
    assert "released" in told


def test_a_default_export_answers_to_the_empty_name(tmp_path: Path, serving: Serve) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB)
    options = ("--begin", "n", "--default-export", "vm@n")
    with (
        serving(tmp_path, disk, *options) as server,
        connected(f"nbd+unix:///?socket={server.unix}") as client,
    ):
        assert client.get_size() == MIB
        assert client.can_multi_conn(), "that was the guest export"


def test_a_client_that_speaks_another_protocol_is_dropped_and_logged(fleeced: Fleeced) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(fleeced.server.unix))
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with suppress(ConnectionResetError):
            while client.recv(4096):  # the greeting, then the end
                pass
    assert re.search("no NBD handshake|unexpected flags", fleeced.server.messages())
    with connected(fleeced.guest) as guest:
        assert guest.get_size() == fleeced.size


def test_a_full_temp_image_breaks_the_session_with_its_cause_and_not_the_guest(
    tmp_path: Path, serving: Serve
) -> None:
    with _with_full_temp_image(tmp_path, serving) as server:
        assert "vm@nightly broke" in server.messages()
        assert "No space left" in server.messages()
    assert (tmp_path / "vm.raw").read_bytes() == b"\xc3" * 8 * MIB


@not_behind_nbdkit(ERROR_TEXT)
def test_a_read_of_a_session_that_broke_is_told_the_cause(tmp_path: Path, serving: Serve) -> None:
    with _with_full_temp_image(tmp_path, serving) as server:
        assert "No space left" in _told(server.uri("vm@nightly"), 4096, 0)


@contextmanager
def _with_full_temp_image(tmp_path: Path, serving: Serve) -> Iterator[Serving]:
    """A guest has overwritten all of its disk, and there was no room for what was there before."""
    disk = make_disk(tmp_path / "vm.raw", 8 * MIB, islands=400)
    (tmp_path / "state").mkdir()
    # A file system of its own for the server's state: one with next to no space.
    mount = f'mount -t tmpfs -o size=512k tmpfs {tmp_path / "state"} && exec "$@"'
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    prefix = ("unshare", "--mount", *user, "sh", "-c", mount, "sh")
    words = ("--begin", "nightly", "--temp-reserve", "none")
    with serving(tmp_path, disk, *words, prefix=prefix) as server:
        with connected(server.uri("vm")) as guest, connected(server.uri("vm@nightly")) as backup:
            overwrite(guest, [(offset, 64 * KIB) for offset in range(0, 8 * MIB, 64 * KIB)])
            guest.flush()
            with pytest.raises(nbd.Error) as caught:
                backup.pread(4096, 0)
            assert caught.value.errno == "EIO"
        yield server


@contextmanager
def _opened_by_qemu(image: Path) -> Iterator[None]:
    """qemu-io holding an image open for writing, with its locks; its prompt tells when it does."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], 30)
        assert readable, "qemu-io did not start"
        assert b"qemu-io>" in os.read(process.stdout.fileno(), 4096)
        yield
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()
