"""Temp images elsewhere: other folders, preallocated, qcow2 files, and exports of NBD servers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import nbd
import pytest

from tests.controlling import Control
from tests.disks import KIB, MIB, make_disk
from tests.e2e.places import (
    SIZE,
    TIMEOUT_S,
    Backend,
    backend_over,
    children_of,
    is_backed_up,
    read_all,
    wait_for_end,
)
from tests.mounts import CAN_MOUNT, fill, tmpfs
from tests.remembering import RememberingGuest, remembering
from tests.serving import FLEECENBD, Serving, connected, run, serving, try_run

EMPTY = 16 * MIB
"""Bytes of an export for a temp image."""


class EmptyBackend(Backend):
    """An nbdkit over a sparse file without data."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        super().__init__(folder, *words)
        os.truncate(self.image, 0)
        os.truncate(self.image, EMPTY)


@contextmanager
def _empty_backend(folder: Path, *words: str | Path) -> Iterator[EmptyBackend]:
    backend = EmptyBackend(folder, *words)
    backend.start()
    try:
        yield backend
    finally:
        backend.kill()


@contextmanager
def _qemu_nbd(folder: Path) -> Iterator[tuple[str, Path]]:
    """A qcow2 image of QEMU's, at a URI; what frees space there is QEMU's business."""
    path, sock = folder / "temp.qcow2", folder / "qemu.sock"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(EMPTY))
    command = ["qemu-nbd", "-t", "-e", "8", "--discard=unmap", "-f", "qcow2", "-k", sock, path]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + TIMEOUT_S
        while not sock.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={sock}", path
    finally:
        process.terminate()
        process.wait()


def _image_of(server: Serving, session: str) -> str:
    """Where the session's temp image is."""
    (disk,) = Control(f"{server.unix}.control").call("GET", f"sessions/{session}")["disks"]
    image: str = disk["temp"]["image"]
    return image


def _write_all(server: Serving, content: bytes) -> None:
    """A guest overwrites all of vda with data; FLUSH."""
    with connected(server.uri("vda")) as guest:
        for offset in range(0, len(content), MIB):
            piece = content[offset : offset + MIB]
            guest.pwrite(bytes(255 - byte for byte in piece), offset)
        guest.flush()


def _backed_up_twice(folder: Path, *words: str | Path) -> Serving:
    """Two sessions, one after the other, under a guest that writes."""
    disk = make_disk(folder / "vda.raw", SIZE, islands=60)
    content = disk.read_bytes()
    with serving(folder, disk, *words) as server:
        guest = RememberingGuest(server.uri("vda"), content)
        with remembering(guest):
            is_backed_up(server, guest, folder, "n")
            is_backed_up(server, guest, folder, "m")
        now = read_all(server.uri("vda"))
    assert disk.read_bytes() == now
    return server


@pytest.mark.parametrize(
    "words",
    [
        ("--temp-dir", "temps"),
        ("--temp-prealloc",),
        ("--temp-prealloc", "--temp-dir", "temps"),
        ("--temp", "qcow2"),
        ("--temp", "qcow2", "--temp-dir", "temps"),
    ],
    ids=" ".join,
)
def test_sessions_with_files_elsewhere_show_their_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    temps = tmp_path / "temps"
    temps.mkdir()
    _backed_up_twice(tmp_path, *words)
    assert list(temps.iterdir()) == []
    assert not list((tmp_path / "server0").rglob("temp-*"))


def test_sessions_with_a_temp_image_at_another_server_show_their_moment(tmp_path: Path) -> None:
    with _empty_backend(tmp_path, "--filter=delay", "wdelay=2ms") as backend:
        _backed_up_twice(tmp_path, "--temp", backend.uri)
        assert backend.image.stat().st_blocks * 512 < MIB, "what a session held is freed"
        assert not any(backend.image.read_bytes())


def test_sessions_with_a_temp_image_of_qemu_s_show_their_moment(tmp_path: Path) -> None:
    with _qemu_nbd(tmp_path) as (uri, path):
        _backed_up_twice(tmp_path, "--temp", uri)
        assert path.stat().st_blocks * 512 < MIB


def test_a_session_over_two_disks_needs_two_exports(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{name}.raw", SIZE) for name in ("vda", "vdb")]
    with serving(tmp_path, *disks) as server:
        control = ("--control", f"{server.unix}.control")
        folders = [tmp_path / "one@n", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        with _empty_backend(folders[0]) as one:
            refused = try_run(FLEECENBD, "session", "begin", "n", "--temp", one.uri, *control)
            assert refused.returncode == 1
            assert "it leads to the storage of another temp image" in refused.stderr
            assert "{disk} and {session} in the URI" in refused.stderr
        sockets = tmp_path / "sockets"
        sockets.mkdir()
        with _empty_backend(folders[0]) as one, _empty_backend(folders[1]) as two:
            (sockets / "vda-n.sock").symlink_to(one.socket)
            (sockets / "vdb-n.sock").symlink_to(two.socket)
            uri = f"nbd+unix:///?socket={sockets}/{{disk}}-{{session}}.sock"
            run(FLEECENBD, "session", "begin", "n", "--temp", uri, *control)
            for disk in disks:
                content = disk.read_bytes()
                with connected(server.uri(disk.stem)) as guest:
                    guest.pwrite(b"new" * 20000, 0)
                assert read_all(server.uri(f"{disk.stem}@n")) == content
            run(FLEECENBD, "session", "finish", "n", *control)


# -- what TRIM frees -------------------------------------------------------------------------------


def _settled(size: Callable[[], int]) -> int:
    """Bytes, once they have been the same for a while: QEMU writes its tables late."""
    last, since = size(), time.monotonic()
    while time.monotonic() < since + 2.5:
        time.sleep(0.05)
        now = size()
        if now != last:
            last, since = now, time.monotonic()
    return last


@contextmanager
def _space_of_qcow2(folder: Path) -> Iterator[tuple[list[str], None]]:
    yield ["--temp", "qcow2"], None


@contextmanager
def _space_of_prealloc(folder: Path) -> Iterator[tuple[list[str], None]]:
    yield ["--temp-prealloc"], None


@contextmanager
def _space_of_export(folder: Path) -> Iterator[tuple[list[str], Path]]:
    with _empty_backend(folder) as backend:
        yield ["--temp", backend.uri], backend.image


@contextmanager
def _space_of_qemu(folder: Path) -> Iterator[tuple[list[str], Path]]:
    with _qemu_nbd(folder) as (uri, path):
        yield ["--temp", uri], path


@pytest.mark.parametrize(
    "kind", [_space_of_qcow2, _space_of_prealloc, _space_of_export, _space_of_qemu]
)
def test_trim_on_a_fleecing_export_frees_space_where_the_temp_image_is(
    tmp_path: Path, kind: Callable[[Path], AbstractContextManager[tuple[list[str], Path | None]]]
) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE)
    content = os.urandom(SIZE)
    disk.write_bytes(content)
    with kind(tmp_path) as (words, known), serving(tmp_path, disk, *words) as server:
        Control(f"{server.unix}.control").call("PUT", "sessions/n")
        path = known or Path(_image_of(server, "n"))
        _write_all(server, content)

        def held() -> int:
            return path.stat().st_blocks * 512

        assert _settled(held) >= SIZE
        with connected(server.uri("vda@n")) as backup:
            assert bytes(backup.pread(MIB, 3 * MIB)) == content[3 * MIB : 4 * MIB]
            backup.trim(4 * MIB, 0)
            assert _settled(held) <= SIZE - 4 * MIB + 512 * KIB
            assert bytes(backup.pread(MIB, 4 * MIB)) == content[4 * MIB : 5 * MIB]
            backup.trim(SIZE - 4 * MIB, 4 * MIB)
            assert _settled(held) <= 512 * KIB


# -- qcow2 -----------------------------------------------------------------------------------------


def test_who_looks_at_a_qcow2_temp_image_sees_a_chain_over_the_disk(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "raw.raw", SIZE, islands=60)
    base = tmp_path / "base.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", raw, base)
    with backend_over(tmp_path) as remote:
        disks = [f"a={raw}", f"b=qcow2:{base}", f"c={remote.uri}"]
        with serving(tmp_path, *disks, "--temp", "qcow2") as server:
            control = Control(f"{server.unix}.control")
            session = control.call("PUT", "sessions/n") and control.call("GET", "sessions/n")
            for disk, (backing, form) in zip(
                session["disks"],
                [(raw, "raw"), (base, "qcow2"), (remote.uri, "raw")],
                strict=True,
            ):
                before = read_all(server.uri(disk["disk"]))
                at = next(at for at in range(0, SIZE, 4096) if any(before[at : at + 4096]))
                with connected(server.uri(disk["disk"])) as guest:
                    guest.pwrite(b"now!" * 1024, at)
                    guest.pwrite(b"new!" * 1024, SIZE - 4096)
                time.sleep(1.5)  # once a second the file is brought up to date
                image = disk["temp"]["image"]
                chain = run("qemu-img", "info", "-U", "--backing-chain", image)
                assert f"backing file: {backing}" in chain
                assert f"backing file format: {form}" in chain
                shown = run("qemu-img", "map", "-U", "--output=json", image)
                assert '"depth": 0' in shown
                # By itself: the old data where it was copied, and today's elsewhere.
                out = tmp_path / "out.raw"
                run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, out)
                seen = bytearray(read_all(server.uri(disk["disk"])))
                seen[at : at + 4096] = before[at : at + 4096]
                if any(before[SIZE - 4096 :]):
                    seen[SIZE - 4096 :] = before[SIZE - 4096 :]
                assert out.read_bytes() == seen


def test_a_qcow2_temp_image_whose_child_dies_breaks_its_session_whatever_its_policy(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE, islands=60)
    with serving(tmp_path, disk, "--temp", "qcow2") as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", on_cbw_error="break-guest-write")
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"x" * 4096, 0)
            (child,) = children_of(server)
            os.kill(child, signal.SIGKILL)
            end = time.monotonic() + TIMEOUT_S
            while control.call("GET", "sessions/n")["state"] != "broken":
                assert time.monotonic() < end
            guest.pwrite(b"y" * 4096, 4096)
        session = control.call("GET", "sessions/n")
        assert (
            "its temp image is lost: qemu-storage-daemon has ended: killed by signal 9"
            in (session["reason"])
        )
        with connected(server.uri("vda@n")) as backup, pytest.raises(nbd.Error, match="output"):
            backup.pread(4096, 0)
        control.call("DELETE", "sessions/n")
        assert not list((tmp_path / "server0").rglob("temp-*"))
        content = disk.read_bytes()
        guest_now = RememberingGuest(server.uri("vda"), content)
        with remembering(guest_now):
            is_backed_up(server, guest_now, tmp_path, "m")


def test_the_child_and_its_file_go_with_the_server_and_the_session_is_broken_by_name(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE, islands=60)
    temps = tmp_path / "temps"
    temps.mkdir()
    words = ("--temp", "qcow2", "--temp-dir", temps)
    with serving(tmp_path, disk, *words) as server:
        Control(f"{server.unix}.control").call("PUT", "sessions/n")
        (child,) = children_of(server)
        (file,) = temps.iterdir()
        server.kill()
        wait_for_end(child)
        assert file.exists()
    with serving(tmp_path, disk, *words) as server:
        session = Control(f"{server.unix}.control").call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert "its temp image (qcow2) went with its server" in session["reason"]
        assert list(temps.iterdir()) == []


def test_what_a_killed_server_without_state_left_is_removed_by_the_next(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", MIB)
    state = tmp_path / "state"
    command = [FLEECENBD, "serve", disk, "--begin", "n", "--temp", "qcow2", "--state-dir", state]
    ready = tmp_path / "ready"
    first = subprocess.Popen([*command, "--run", f"touch {ready}; sleep 60"])
    end = time.monotonic() + TIMEOUT_S
    while not ready.exists():
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    (left,) = state.glob("*.temp.qcow2")
    shown = run(*command, "--run", f"ls {state}")
    assert left.name not in shown
    assert shown.count(".temp.qcow2") == 1
    assert not list(state.glob("*.temp.qcow2"))


# -- folders, and space taken in advance -----------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--temp-prealloc",)], ids=str)
def test_a_session_with_a_raw_file_elsewhere_goes_on_after_a_kill(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE, islands=60)
    content = disk.read_bytes()
    temps = tmp_path / "temps"
    temps.mkdir()
    with serving(tmp_path, disk, "--temp-dir", temps, *words) as server:
        Control(f"{server.unix}.control").call("PUT", "sessions/n")
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"new" * 100000, MIB)
        with connected(server.uri("vda@n")) as backup:
            backup.trim(MIB, 0)
        (file,) = temps.iterdir()
        server.kill()
    with serving(tmp_path, disk) as server:
        control = Control(f"{server.unix}.control")
        assert list(temps.iterdir()) == [file]
        assert _image_of(server, "n") == str(file)
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"newer" * 100000, 3 * MIB)
        with connected(server.uri("vda@n")) as backup:
            for offset in range(MIB, SIZE - MIB, MIB):
                assert bytes(backup.pread(MIB, offset)) == content[offset : offset + MIB]
            backup.trim(SIZE, 0)
        assert file.stat().st_blocks * 512 <= 64 * KIB
        control.call("DELETE", "sessions/n")
    assert list(temps.iterdir()) == []


@pytest.mark.skipif(not CAN_MOUNT, reason="mounts are root's")
def test_a_preallocated_temp_image_never_runs_out_of_space(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    disk = tmp_path / "vda.raw"
    disk.write_bytes(content)
    with (
        tmpfs(tmp_path / "small", SIZE + 4 * MIB) as small,
        serving(tmp_path, disk, "--temp-dir", small, "--temp-prealloc") as server,
    ):
        control = Control(f"{server.unix}.control")
        begin = (FLEECENBD, "session", "begin", "--control", f"{server.unix}.control")
        kept = try_run(*begin, "n")
        assert kept.returncode == 1
        assert f"and {1 << 30} are its reserve" in kept.stderr
        assert list(small.iterdir()) == []
        run(*begin, "n", "--temp-reserve", "4M")
        again = try_run(*begin, "m", "--temp-reserve", "none")
        assert again.returncode == 1
        assert "there is no room to preallocate" in again.stderr
        assert "give another folder with --temp-dir" in again.stderr
        filler = fill(small)
        _write_all(server, content)
        assert read_all(server.uri("vda@n")) == content
        control.call("DELETE", "sessions/n")
        filler.unlink()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--temp", "vmdk"), "--temp is raw, qcow2 or an NBD URI, not 'vmdk'"),
        (("--temp", "qcow2", "--temp-prealloc"), "--temp-prealloc is for raw temp images only"),
        (
            ("--temp", "nbd://h", "--temp-dir", "/tmp"),
            "--temp-dir is for files, and --temp is an NBD URI",
        ),
        (("--temp-overwrite",), "--temp-overwrite is for temp images at an NBD URI only"),
        (("--temp-dir", ""), "--temp-dir: '' names nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, words: tuple[str, ...], text: str) -> None:
    disk = make_disk(tmp_path / "vda.raw", MIB)
    refused = try_run(FLEECENBD, "serve", disk, *words)
    assert (refused.returncode, refused.stderr) == (2, refused.stderr)
    assert text in refused.stderr
    begin = try_run(FLEECENBD, "session", "begin", "n", *words, "--control", tmp_path / "none")
    assert begin.returncode != 0
    if words[0] == "--temp" or not words[-1]:
        assert text in begin.stderr


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", MIB)
    missing = tmp_path / "missing"
    common = ("serve", disk, "--begin", "n", "--temp-dir", missing)
    for words in (("-U", tmp_path / "s"), ("--run", "true")):
        refused = try_run(FLEECENBD, *common, *words)
        assert refused.returncode == 1
        assert f"{missing}: " in refused.stderr
        assert "give another folder" in refused.stderr
    assert not missing.exists()


# -- exports ---------------------------------------------------------------------------------------


def test_an_export_that_is_lost_breaks_its_session_and_the_next_one_is_fine(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "vda.raw"
    disk.write_bytes(os.urandom(SIZE))
    with _empty_backend(tmp_path) as backend, serving(tmp_path, disk) as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", temp=backend.uri, on_cbw_error="break-guest-write")
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"x" * 4096, 0)
            backend.kill()
            guest.pwrite(b"y" * 4096, 2 * MIB)  # the session broke: nothing has to be copied
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert "its temp image is lost: the connection is lost" in session["reason"]
        control.call("DELETE", "sessions/n")
        guest_now = RememberingGuest(server.uri("vda"), disk.read_bytes())
        with remembering(guest_now):
            is_backed_up(server, guest_now, tmp_path, "m")


def test_an_export_that_holds_data_is_refused_unless_that_may_go(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE, islands=60)
    with _empty_backend(tmp_path) as backend:
        with backend.image.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"precious")
        with serving(tmp_path, disk) as server:
            control = ("--control", f"{server.unix}.control")
            begin = (FLEECENBD, "session", "begin", "n", "--temp", backend.uri, *control)
            refused = try_run(*begin)
            assert refused.returncode == 1
            assert "it holds data, which a temp image would write over" in refused.stderr
            assert "--temp-overwrite" in refused.stderr
            assert b"precious" in backend.image.read_bytes()
            run(*begin, "--temp-overwrite")
            assert read_all(server.uri("vda@n")) == disk.read_bytes()
            assert not any(backend.image.read_bytes())
            second = try_run(
                *(FLEECENBD, "session", "begin", "m", "--temp", backend.uri, "--temp-overwrite"),
                *control,
            )
            assert second.returncode == 1
            assert "it leads to the storage of another temp image" in second.stderr
            assert read_all(server.uri("vda@n")) == disk.read_bytes()
            run(FLEECENBD, "session", "finish", "n", *control)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-r",), "it can only be read"),
        (("--filter=truncate", "truncate=1M"), "and a temp image of this disk needs"),
        (("--filter=nozero", "zeromode=none"), "its server offers no WRITE_ZEROES"),
    ],
)
def test_an_export_that_can_hold_no_temp_image_is_told_why(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE)
    with _empty_backend(tmp_path, *words) as backend:
        refused = try_run(
            *(FLEECENBD, "serve", disk, "--begin", "n", "--temp", backend.uri),
            *("-U", tmp_path / "s", "--state-dir", tmp_path / "state"),
        )
        assert refused.returncode == 1
        assert text in refused.stderr


def test_an_error_of_the_export_breaks_the_session_and_no_guest_write(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", SIZE, islands=60)
    errors = tmp_path / "errors"
    words = ("--filter=error", "error=ENOSPC", "error-pwrite-rate=100%", f"error-file={errors}")
    with (
        _empty_backend(tmp_path, *words) as backend,
        serving(tmp_path, disk, "--temp", backend.uri) as server,
    ):
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n")
        errors.touch()
        with connected(server.uri("vda")) as guest:
            for offset in range(0, SIZE - MIB, MIB):
                guest.pwrite(b"new" * 1000, offset)
            assert bytes(guest.pread(3000, MIB)) == b"new" * 1000
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert "old data could not be copied" in session["reason"]
        assert "No space left on device" in session["reason"]
        errors.unlink()
        control.call("DELETE", "sessions/n")
        guest_now = RememberingGuest(server.uri("vda"), disk.read_bytes())
        with remembering(guest_now):
            is_backed_up(server, guest_now, tmp_path, "m")


def test_a_server_that_stops_gives_back_what_an_export_held(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    disk = tmp_path / "vda.raw"
    disk.write_bytes(content)
    with _empty_backend(tmp_path) as backend:
        for _ in range(2):
            words = ("--begin", "n", "--temp", backend.uri)
            with serving(tmp_path, disk, *words) as server:
                session = Control(f"{server.unix}.control").call("GET", "sessions/n")
                assert session["state"] == "active"
                _write_all(server, content)
                assert any(backend.image.read_bytes())
            assert not any(backend.image.read_bytes())
        # A server that is killed cannot; the next one is told that this can go.
        with serving(tmp_path, disk, *words) as server:
            _write_all(server, os.urandom(SIZE))
            server.kill()
        refused = try_run(
            *(FLEECENBD, "serve", disk, *words, "-U", tmp_path / "f.sock"),
            *("--state-dir", tmp_path / "state"),
        )
        assert refused.returncode == 1
        assert "--temp-overwrite" in refused.stderr
        with serving(tmp_path, disk, *words, "--temp-overwrite") as server:
            assert read_all(server.uri("vda@n")) == disk.read_bytes()


@pytest.mark.parametrize("words", [("--run", "true"), ("-U", "s.sock", "--run", "true")], ids=str)
def test_a_state_directory_may_be_given_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """The child is in another folder."""
    make_disk(tmp_path / "vda.raw", MIB)
    monkeypatch.chdir(tmp_path)
    common = ("serve", "vda.raw", "--begin", "n", "--temp", "qcow2", "--state-dir", "state")
    run(FLEECENBD, *common, *words)
    assert not list(tmp_path.rglob("*.qcow2"))
    with subprocess.Popen([FLEECENBD, *common, "-U", "l.sock"]) as server:
        end = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "l.sock").exists():
            assert time.monotonic() < end
            assert server.poll() is None
            time.sleep(0.01)
        server.terminate()
        assert server.wait(TIMEOUT_S) == 0


# -- the same storage by another name --------------------------------------------------------------


def _refused(server: Serving, name: str, uri: str, *words: str) -> str:
    result = try_run(
        *(FLEECENBD, "session", "begin", name, "--temp", uri, *words),
        *("--control", f"{server.unix}.control"),
    )
    assert result.returncode == 1, result.stdout
    return result.stderr


@pytest.mark.parametrize("words", [(), ("--temp-overwrite",)], ids=str)
def test_two_names_of_one_export_are_not_taken_for_two(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """nbdkit ignores the name. What one session holds would be the other's."""
    content = os.urandom(SIZE)
    disk, other = tmp_path / "vda.raw", tmp_path / "vdb.raw"
    disk.write_bytes(content)
    other.write_bytes(os.urandom(SIZE))
    with _empty_backend(tmp_path) as backend, serving(tmp_path, disk, other) as server:
        uri = backend.uri.replace("///?", "///{disk}-{session}?")
        assert "the storage of another temp image" in _refused(server, "both", uri, *words)
        assert not any(backend.image.read_bytes()), "no mark is left"
        control = ("--control", f"{server.unix}.control")
        begin = (FLEECENBD, "session", "begin", "--temp", uri, *words, *control)
        run(*begin, "n", "--disk", "vda")
        assert "the storage of another temp image" in _refused(server, "m", uri, *words)
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"new!" * 65536, MIB)
        refused = _refused(server, "m", uri, *words)
        assert "the storage of another temp image" in refused or "holds data" in refused
        assert read_all(server.uri("vda@n")) == content


def test_a_disk_is_never_taken_for_a_temp_image(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    own = tmp_path / "own.raw"
    own.write_bytes(content)
    with (
        backend_over(tmp_path) as remote,
        serving(tmp_path, own, f"far={remote.uri}", "--shared", "0") as server,
    ):
        far = remote.image.read_bytes()
        ways = {
            server.uri("own"): "disk own",
            server.uri("far"): "disk far",
            remote.uri: "disk far",
            remote.uri.replace("///?", "///x?"): "disk far",
        }
        for uri, what in ways.items():
            assert "holds data" in _refused(server, "n", uri, "--disk", "own")
            assert what in _refused(server, "n", uri, "--disk", "own", "--temp-overwrite")
        assert read_all(server.uri("own")) == content
        assert remote.image.read_bytes() == far


# -- what a newcomer met ---------------------------------------------------------------------------


def test_one_export_for_several_disks_is_told_when_the_server_starts(tmp_path: Path) -> None:
    disks = [make_disk(tmp_path / f"{name}.raw", MIB) for name in ("a", "b")]
    uri = f"nbd+unix:///x?socket={tmp_path}/none"
    for words, told in (((disks[0],), False), (disks, True), ((*disks, "{disk}"), False)):
        names = [word for word in words if isinstance(word, Path)]
        temp = uri.replace("/x?", "/{disk}?") if "{disk}" in words else uri
        with serving(tmp_path, *names, "--temp", temp) as server:
            assert ("cannot begin: each needs an export of its own" in server.messages()) is told


def test_a_preallocated_temp_image_s_limit_is_not_set_later_either(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", MIB)
    with serving(tmp_path, disk, "--begin", "n", "--temp-prealloc") as server:
        command = (FLEECENBD, "session", "set", "n", "--control", f"{server.unix}.control")
        refused = try_run(*command, "--temp-limit", "64k")
        assert refused.returncode == 1
        assert "there is no limit to set" in refused.stderr
        run(*command, "--temp-limit", "none")
        (shown,) = Control(f"{server.unix}.control").call("GET", "sessions/n")["disks"]
        assert (shown["temp"]["now"], shown["temp"]["peak"]) == (MIB, MIB)
    both = try_run(
        FLEECENBD, "serve", disk, "--begin", "n", "--temp-prealloc", "--temp-limit", "1M"
    )
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)
    assert "--temp-limit cannot be given with --temp-prealloc" in both.stderr


def test_a_server_s_reserve_is_that_of_its_sessions(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vda.raw", MIB)
    with serving(tmp_path, disk, "--temp-reserve", "4k", "--temp", "qcow2") as server:
        control = ("--control", f"{server.unix}.control")
        begin = (FLEECENBD, "session", "begin", *control)
        show = Control(f"{server.unix}.control")
        run(*begin, "n")
        assert show.call("GET", "sessions/n")["temp_reserve"] == 4096
        run(*begin, "m", "--temp-reserve", "none")
        assert show.call("GET", "sessions/m")["temp_reserve"] == 0
        refused = try_run(*begin, "o", "--temp-prealloc")
        assert refused.returncode == 1
        assert "the server's own temp is qcow2; say another one, too" in refused.stderr
        wrong = try_run(*begin, "o", "--temp-reserve", "5%")
        assert wrong.returncode == 2
        assert "or none" in wrong.stderr


def test_a_qcow2_file_that_is_given_as_a_raw_image_is_told_how_to_give_it(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    refused = try_run(FLEECENBD, "serve", path)
    assert refused.returncode == 1
    assert f"write qcow2:{path} to serve the disk in it" in refused.stderr
