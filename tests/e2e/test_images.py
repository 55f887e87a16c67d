"""Disks that are no raw files: qcow2 images, and exports of other NBD servers."""

from __future__ import annotations

import os
import signal
import time
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
    listening,
    read_all,
    state_of,
    wait_for_end,
)
from tests.remembering import RememberingGuest, remembering
from tests.serving import FLEECENBD, connected, run, serving, try_run
from tests.storage.kinds import HAS_LOOP_DEVICES, loop_device


def _qcow2(folder: Path, *, name: str = "vda.qcow2") -> tuple[Path, bytes]:
    """An overlay over a compressed image with an internal snapshot in it, and what a guest sees."""
    raw = make_disk(folder / "base.raw", SIZE, islands=60)
    base, path = folder / "base.qcow2", folder / name
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, base)
    run("qemu-img", "snapshot", "-c", "before", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    return path, raw.read_bytes()


def _seen(path: Path, folder: Path) -> bytes:
    """What a guest sees in a qcow2 image that nobody has open."""
    raw = folder / "seen.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def test_a_qcow2_disk_is_served_fleeced_and_left_whole(tmp_path: Path) -> None:
    path, content = _qcow2(tmp_path)
    with serving(tmp_path, f"qcow2:{path}") as server:
        assert read_all(server.uri("vda")) == content
        guest = RememberingGuest(server.uri("vda"), content)
        with remembering(guest):
            is_backed_up(server, guest, tmp_path, "n")
            is_backed_up(server, guest, tmp_path, "m")
        now = read_all(server.uri("vda"))
        (child,) = children_of(server)
        info = run("qemu-img", "info", "-U", path)
        assert "base.qcow2" in info
    wait_for_end(child)
    run("qemu-img", "check", "-q", path)
    assert _seen(path, tmp_path) == now
    assert not list(Path("/tmp").glob(f"fleecenbd-*/qmp{child}"))


def test_a_guest_s_discards_free_space_in_a_qcow2_disk(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    with serving(tmp_path, f"qcow2:{path}") as server, connected(server.uri("vda")) as guest:
        guest.pwrite(os.urandom(4 * MIB), 0)
        guest.flush()
        before = path.stat().st_blocks
        guest.trim(2 * MIB, 0)
        guest.zero(MIB, 2 * MIB)
        guest.flush()
        assert bytes(guest.pread(3 * MIB, 0)) == bytes(3 * MIB)
        assert path.stat().st_blocks * 512 <= before * 512 - 3 * MIB + 128 * KIB


def test_a_server_that_is_killed_loses_nothing_that_a_guest_was_told_is_written(
    tmp_path: Path,
) -> None:
    """As with a raw file, whose pages the kernel keeps: the child writes out what it holds."""
    path, content = _qcow2(tmp_path)
    with serving(tmp_path, f"qcow2:{path}") as server, connected(server.uri("vda")) as guest:
        guest.pwrite(b"written" * 1000, 5 * MIB + 77)  # and not flushed
        (child,) = children_of(server)
        server.kill()
    expected = bytearray(content)
    expected[5 * MIB + 77 : 5 * MIB + 77 + 7000] = b"written" * 1000
    with serving(tmp_path, f"qcow2:{path}") as server:  # it waits for the child
        assert state_of(child) in (None, "Z"), "it has ended"
        assert read_all(server.uri("vda")) == expected


def test_what_belongs_to_a_qcow2_disk_is_lost_with_its_server_by_name(tmp_path: Path) -> None:
    path, _ = _qcow2(tmp_path)
    with serving(tmp_path, f"qcow2:{path}") as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", bitmap="b", bitmap_mode="new")
    with serving(tmp_path, f"qcow2:{path}") as server:
        control = Control(f"{server.unix}.control")
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert (
            "is no raw file or block device: nobody can tell who wrote to it" in session["reason"]
        )
        (disk,) = control.call("GET", "disks")["disks"]
        assert [bitmap["state"] for bitmap in disk["bitmaps"]] == ["lost"]


def test_a_child_that_dies_fails_its_disk_and_no_other(tmp_path: Path) -> None:
    path, _ = _qcow2(tmp_path)
    other = make_disk(tmp_path / "vdb.raw", MIB)
    with serving(tmp_path, f"qcow2:{path}", other) as server, listening(server) as told:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", bitmap="b", bitmap_mode="new")
        (child,) = children_of(server)
        with connected(server.uri("vda")) as guest, connected(server.uri("vdb")) as sound:
            os.kill(child, signal.SIGKILL)
            end = time.monotonic() + TIMEOUT_S
            while control.call("GET", "sessions/n")["state"] != "broken":
                assert time.monotonic() < end, "nobody has to write for that"
            with pytest.raises(nbd.Error, match="Input/output error"):
                guest.pwrite(bytes(4096), 0)
            sound.pwrite(b"sound" * 100, 0)
            with pytest.raises(nbd.Error, match="Input/output error"):
                guest.flush()
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert (
            "disk vda is lost: qemu-storage-daemon has ended: killed by signal 9"
            in session["reason"]
        )
        lost = {disk["name"]: disk["lost"] for disk in control.call("GET", "disks")["disks"]}
        assert lost["vdb"] is None
        assert "qemu-storage-daemon has ended" in lost["vda"]
        refused = try_run(FLEECENBD, "session", "begin", "m", "--control", f"{server.unix}.control")
        assert refused.returncode == 1
        assert "add it anew, or start the server again" in refused.stderr
        while not any(event["event"] == "bitmap-lost" for event in told):
            assert time.monotonic() < end, told
            time.sleep(0.05)
        assert not any(event["event"] == "disk-away" for event in told), "it is lost"
        refused = try_run(
            *(FLEECENBD, "bitmap", "add", "vda", "c"), "--control", f"{server.unix}.control"
        )
        assert "disk vda is lost" in refused.stderr
        whose = [(event["event"], event["disk"]) for event in told if "-lost" in event["event"]]
        assert whose == [("disk-lost", "vda"), ("bitmap-lost", "vda")]
        server.status = 1  # it could not be synced
    assert "qemu-storage-daemon has ended" in server.messages()
    assert "qemu-storage-daemon ended badly: killed by signal 9" in server.messages()
    run("qemu-img", "check", "-q", path)


def test_a_disk_whose_child_died_is_removed_and_added_anew(tmp_path: Path) -> None:
    path, before = _qcow2(tmp_path)
    with serving(tmp_path, f"qcow2:{path}") as server:
        (child,) = children_of(server)
        os.kill(child, signal.SIGKILL)
        wait_for_end(child)
        control = ("--control", f"{server.unix}.control")
        run(FLEECENBD, "disk", "remove", "vda", *control)
        run(FLEECENBD, "disk", "add", f"vda=qcow2:{path}", *control)
        assert read_all(server.uri("vda")) == before
    assert "disk vda: removed (lost)" in server.messages()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"raw" * 1000, "Image is not in qcow2 format"),
    ],
)
def test_what_is_no_qcow2_image_is_told_in_qemu_s_words(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "vda.qcow2"
    if content is not None:
        path.write_bytes(content)
    result = try_run(FLEECENBD, "serve", f"qcow2:{path}", "-U", tmp_path / "s")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fleecenbd: cannot open disk vda: qcow2:{path}: QEMU: ")
    assert words in line


def test_a_qcow2_image_of_no_bytes_is_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "vda.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "0")
    result = try_run(FLEECENBD, "serve", f"qcow2:{path}", "-U", tmp_path / "s")
    assert result.returncode == 1
    told = f"fleecenbd: cannot open disk vda: qcow2:{path}: the image is empty"
    assert told in result.stderr.splitlines()


def test_an_image_that_qemu_has_open_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = _qcow2(tmp_path)
    with serving(tmp_path, f"qcow2:{path}"):
        begun = time.monotonic()
        result = try_run(FLEECENBD, "serve", f"qcow2:{path}", "-U", tmp_path / "s")
        assert time.monotonic() - begun > 8, "the last server's child may be ending"
    assert result.returncode == 1
    assert "Failed to get" in result.stderr
    assert "another process has it open" in result.stderr


# -- other NBD servers -----------------------------------------------------------------------------


def test_a_disk_of_another_nbd_server_is_served_and_fleeced(tmp_path: Path) -> None:
    with backend_over(tmp_path, "--filter=delay", "rdelay=1ms", "wdelay=2ms") as backend:
        content = backend.image.read_bytes()
        with serving(tmp_path, f"vda={backend.uri}") as server:
            guest = RememberingGuest(server.uri("vda"), content)
            with remembering(guest):
                is_backed_up(server, guest, tmp_path, "n")
                is_backed_up(server, guest, tmp_path, "m")
            now = read_all(server.uri("vda"))
        assert backend.image.read_bytes() == now


def test_a_remote_disk_that_goes_away_and_comes_back_keeps_its_guest_waiting(
    tmp_path: Path,
) -> None:
    with backend_over(tmp_path) as backend:
        content = backend.image.read_bytes()
        with serving(tmp_path, f"vda={backend.uri}") as server:
            guest = RememberingGuest(server.uri("vda"), content)
            with remembering(guest):
                for name in ("n", "m"):
                    guest.wait(20)
                    backend.goes_away(0.5)
                    is_backed_up(server, guest, tmp_path, name)
            now = read_all(server.uri("vda"))
        assert backend.image.read_bytes() == now
    assert "connecting again" in server.messages()


def test_a_remote_disk_that_stays_away_breaks_the_session_and_lets_the_server_stop(
    tmp_path: Path,
) -> None:
    with backend_over(tmp_path) as backend, serving(tmp_path, f"vda={backend.uri}") as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", cbw_timeout=0.5)
        with connected(server.uri("vda")) as guest:
            backend.kill()
            waiting = guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0)
            session = control.call("GET", "sessions/n")
            end = time.monotonic() + TIMEOUT_S
            while session["state"] != "broken":
                assert time.monotonic() < end
                guest.poll(100)
                session = control.call("GET", "sessions/n")
            assert "a guest write waited over 0.5 s for copying old data" in session["reason"]
            assert not guest.aio_command_completed(waiting), "it waits for its disk"
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(TIMEOUT_S)
        server.status = 1  # it could not be synced
        backend.start()


def test_a_remote_disk_that_is_away_says_so_and_for_how_long(tmp_path: Path) -> None:
    with (
        backend_over(tmp_path) as backend,
        serving(tmp_path, f"vda={backend.uri}") as server,
        listening(server) as told,
    ):
        control = Control(f"{server.unix}.control")

        def wait_for(kind: str) -> None:
            end = time.monotonic() + TIMEOUT_S
            while not any(event["event"] == kind for event in told):
                assert time.monotonic() < end, told
                time.sleep(0.05)

        def is_away() -> bool:
            (disk,) = control.call("GET", "disks")["disks"]
            words = (FLEECENBD, "disk", "list", "--control", f"{server.unix}.control")
            assert disk["away"] == (", away" in run(*words))
            return bool(disk["away"])

        with connected(server.uri("vda")) as guest:
            assert not is_away()
            backend.kill()
            buffer = nbd.Buffer(4096)
            waiting = guest.aio_pread(buffer, 0)
            wait_for("disk-away")
            assert is_away()
            backend.start()
            while not guest.aio_command_completed(waiting):
                guest.poll(-1)
            assert bytes(buffer.to_bytearray()) == backend.image.read_bytes()[:4096]
            wait_for("disk-back")
            assert not is_away()
        ours = [event for event in told if event["event"] in ("disk-away", "disk-back")]
        assert [event["disk"] for event in ours] == ["vda", "vda"]
        assert ours[0]["image"] == backend.uri
    assert f"{backend.uri}: connected again, after " in server.messages()


def test_an_error_of_a_remote_disk_is_the_guest_s_or_its_session_s(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    words = ("--filter=error", "error=EIO", "error-rate=100%", f"error-file={errors}")
    with backend_over(tmp_path, *words) as backend:
        content = backend.image.read_bytes()
        with serving(tmp_path, f"vda={backend.uri}") as server:
            control = Control(f"{server.unix}.control")
            control.call("PUT", "sessions/n")
            with connected(server.uri("vda")) as guest:
                errors.touch()
                for call in (lambda: guest.pread(4096, 0), lambda: guest.pwrite(bytes(4096), 0)):
                    with pytest.raises(nbd.Error, match="Input/output error"):
                        call()
                session = control.call("GET", "sessions/n")
                assert session["state"] == "broken"
                assert f"old data could not be copied: {backend.uri}" in session["reason"]
                errors.unlink()
                assert bytes(guest.pread(4096, 0)) == content[:4096], "nothing was written"
            control.call("DELETE", "sessions/n")
            guest = RememberingGuest(server.uri("vda"), content)
            with remembering(guest):
                is_backed_up(server, guest, tmp_path, "m")


def test_a_remote_disk_of_blocks_takes_writes_of_any_length(tmp_path: Path) -> None:
    words = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    with backend_over(tmp_path, "--filter=blocksize-policy", *words) as backend:
        content = backend.image.read_bytes()
        with serving(tmp_path, f"vda={backend.uri}") as server:
            guest = RememberingGuest(server.uri("vda"), content)
            with remembering(guest):
                is_backed_up(server, guest, tmp_path, "n")
            now = read_all(server.uri("vda"))
        assert backend.image.read_bytes() == now


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-r",), "it can only be read; serve it with --read-only"),
        (("--filter=nofilter-is-there",), "there is no such socket"),
    ],
)
def test_what_can_be_no_disk_is_told_why(tmp_path: Path, words: tuple[str, ...], text: str) -> None:
    backend = Backend(tmp_path, *words)
    if words == ("-r",):
        backend.start()
    try:
        result = try_run(FLEECENBD, "serve", f"vda={backend.uri}", "-U", tmp_path / "s")
        assert result.returncode == 1
        assert text in result.stderr
        (_line,) = result.stderr.splitlines()
        if words == ("-r",):
            with serving(tmp_path, f"vda={backend.uri}", "-r") as server:
                assert read_all(server.uri("vda")) == backend.image.read_bytes()
    finally:
        if words == ("-r",):
            backend.kill()


def test_disks_of_every_kind_can_be_added_to_a_server_and_removed(tmp_path: Path) -> None:
    path, content = _qcow2(tmp_path)
    with (
        backend_over(tmp_path) as backend,
        serving(tmp_path, make_disk(tmp_path / "a.raw", MIB)) as server,
    ):
        control = ("--control", f"{server.unix}.control")
        run(FLEECENBD, "disk", "add", f"q=qcow2:{path}", *control)
        run(FLEECENBD, "disk", "add", f"r={backend.uri}", *control)
        assert read_all(server.uri("q")) == content
        assert read_all(server.uri("r")) == backend.image.read_bytes()
        again = try_run(FLEECENBD, "disk", "add", f"r2={backend.uri}", *control)
        assert again.returncode == 1
        assert "r and r2 are the same image" in again.stderr
        own = try_run(FLEECENBD, "disk", "add", f"o={server.uri('a')}", *control)
        assert (own.returncode, "is this very server" in own.stderr) == (1, True)
        (child,) = children_of(server)
        run(FLEECENBD, "disk", "remove", "q", *control)
        wait_for_end(child)
        run(FLEECENBD, "disk", "remove", "r", *control)


# -- raw disks: sizes, sectors, and the page cache -------------------------------------------------


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("size", [8 * MIB + 512, 8 * MIB + 4095, 1234567])
def test_an_image_of_any_size_is_backed_up_to_its_last_byte(
    tmp_path: Path, cache: str, size: int
) -> None:
    path = make_disk(tmp_path / "vda.raw", size, islands=40)
    with serving(tmp_path, path, "--cache", cache) as server:
        guest = RememberingGuest(server.uri("vda"), path.read_bytes())
        with remembering(guest):
            is_backed_up(server, guest, tmp_path, "n")
        now = read_all(server.uri("vda"))
    assert path.read_bytes() == now


@pytest.mark.skipif(not HAS_LOOP_DEVICES, reason="loop devices are root's")
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_block_device_of_any_sectors_is_backed_up(
    tmp_path: Path, cache: str, sector_size: int
) -> None:
    path = make_disk(tmp_path / "image.raw", 8 * MIB + 4096, islands=40)
    with (
        loop_device(path, sector_size) as device,
        serving(tmp_path, f"vda={device}", "--cache", cache) as server,
    ):
        guest = RememberingGuest(server.uri("vda"), path.read_bytes())
        with remembering(guest):
            is_backed_up(server, guest, tmp_path, "n")
        now = read_all(server.uri("vda"))
        server.stop()
        assert path.read_bytes() == now
