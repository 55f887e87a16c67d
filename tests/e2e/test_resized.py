"""Images that become longer or shorter while they are served."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.controlling import Control
from tests.disks import MIB
from tests.e2e.places import TIMEOUT_S, backend_over, listening, read_all
from tests.serving import FLEECENBD, connected, run, serving, try_run
from tests.storage.kinds import HAS_LOOP_DEVICES, loop_device

SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def _wait_for_size(control: Control, size: int) -> dict[str, Any]:
    end = time.monotonic() + TIMEOUT_S
    while True:
        (disk,) = control.call("GET", "disks")["disks"]
        if disk["image_size"] == size:
            return dict(disk)
        assert time.monotonic() < end, disk
        time.sleep(0.05)


@pytest.mark.parametrize("words", [(), ("--cache", "none")], ids=["writeback", "none"])
def test_an_image_that_shrinks_and_comes_back(
    tmp_path: Path, image: Path, words: tuple[str, ...]
) -> None:
    content = image.read_bytes()
    with serving(tmp_path, image, *words) as server, listening(server) as told:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n", bitmap="chain", on_cbw_error="break-guest-write")
        with connected(server.uri("vda")) as guest, connected(server.uri("vda@n")) as backup:
            guest.pwrite(b"before" * 100, 0)
            os.truncate(image, SIZE // 2)
            disk = _wait_for_size(control, SIZE // 2)
            assert disk["size"] == SIZE
            assert "8.0 MiB, image 4.0 MiB" in run(
                FLEECENBD, "disk", "list", "--control", f"{server.unix}.control"
            )
            beyond = SIZE // 2 - 300
            for call in (
                lambda: guest.pread(4096, SIZE - 4096),
                lambda: guest.pread(600, beyond),
                lambda: guest.pwrite(b"x" * 600, beyond),
                lambda: guest.pwrite(b"x" * 2 * MIB, SIZE - 2 * MIB),
                lambda: guest.zero(MIB, SIZE - MIB),
                lambda: guest.trim(MIB, SIZE - MIB),
            ):
                with pytest.raises(nbd.Error, match="Input/output error"):
                    call()
            assert image.stat().st_size == SIZE // 2, "nothing made it longer"
            guest.pwrite(b"still there", MIB)
            assert bytes(guest.pread(11, MIB)) == b"still there"
            guest.flush()
            session = control.call("GET", "sessions/n")
            assert session["state"] == "broken"
            why = f"the image of vda changed its size from {SIZE} to {SIZE // 2} bytes"
            assert why in session["reason"]
            with pytest.raises(nbd.Error, match="Input/output error"):
                backup.pread(4096, MIB)
            assert [(b["state"], b["reason"]) for b in disk["bitmaps"]] == [("lost", why)]
            control.call("DELETE", "sessions/n?result=failed")
            refused = try_run(
                FLEECENBD, "session", "begin", "m", "--control", f"{server.unix}.control"
            )
            assert refused.returncode == 1
            assert f"has {SIZE // 2} bytes now, and {SIZE} when it was opened" in refused.stderr

            os.truncate(image, SIZE)
            _wait_for_size(control, SIZE)
            guest.pwrite(b"again", SIZE - 5)
            assert bytes(guest.pread(5, SIZE - 5)) == b"again"
            control.call("PUT", "sessions/m", bitmap="chain")
            expected = content[: SIZE // 2] + bytes(SIZE // 2)
            seen = read_all(server.uri("vda@m"))
            assert seen[2 * MIB : -5] == expected[2 * MIB : -5]
            assert seen[-5:] == b"again"
    resized = [event for event in told if event["event"] == "disk-resized"]
    assert [(event["disk"], event["size"], event["image_size"]) for event in resized] == [
        ("vda", SIZE, SIZE // 2),
        ("vda", SIZE, SIZE),
    ]
    kinds = [event["event"] for event in told]
    assert kinds.count("bitmap-lost") == 1
    assert kinds.count("session-broken") == 1


def test_an_image_that_grows_serves_what_it_served_and_its_session_breaks(
    tmp_path: Path, image: Path
) -> None:
    content = image.read_bytes()
    with serving(tmp_path, image, "--begin", "n") as server:
        control = Control(f"{server.unix}.control")
        with connected(server.uri("vda")) as guest:
            os.truncate(image, 2 * SIZE)
            _wait_for_size(control, 2 * SIZE)
            assert guest.get_size() == SIZE
            guest.pwrite(b"new", SIZE - 3)
        assert control.call("GET", "sessions/n")["state"] == "broken"
        assert read_all(server.uri("vda")) == content[:-3] + b"new"
        run(FLEECENBD, "session", "finish", "n", "--failed", "--control", control._path)
        run(FLEECENBD, "disk", "remove", "vda", "--control", control._path)
        run(FLEECENBD, "disk", "add", f"vda={image}", "--control", control._path)
        (disk,) = control.call("GET", "disks")["disks"]
        assert disk["size"] == disk["image_size"] == 2 * SIZE
        control.call("PUT", "sessions/m")
    assert image.stat().st_size == 2 * SIZE


def test_what_was_kept_of_an_image_that_changed_its_size_is_lost_by_name_at_the_next_start(
    tmp_path: Path, image: Path
) -> None:
    with serving(tmp_path, image) as server:
        Control(f"{server.unix}.control").call("PUT", "sessions/n", bitmap="chain")
        server.kill()
    os.truncate(image, 2 * SIZE)
    with serving(tmp_path, image) as server:
        control = Control(f"{server.unix}.control")
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert f"had {SIZE} bytes, and has {2 * SIZE} now" in session["reason"]
        (disk,) = control.call("GET", "disks")["disks"]
        assert disk["size"] == 2 * SIZE
        assert [bitmap["state"] for bitmap in disk["bitmaps"]] == ["lost"]


def test_a_session_over_two_disks_breaks_with_the_one_that_shrank(
    tmp_path: Path, image: Path
) -> None:
    other = tmp_path / "vdb.raw"
    other.write_bytes(os.urandom(SIZE))
    with serving(tmp_path, image, other, "--begin", "n") as server:
        control = Control(f"{server.unix}.control")
        os.truncate(other, MIB)
        end = time.monotonic() + TIMEOUT_S
        while control.call("GET", "sessions/n")["state"] != "broken":
            assert time.monotonic() < end
            time.sleep(0.05)
        broken = [disk["broken"] for disk in control.call("GET", "sessions/n")["disks"]]
        assert broken[0] is None
        assert "the image of vdb changed its size" in broken[1]
        with connected(server.uri("vda")) as guest:
            guest.pwrite(b"x" * 4096, 0)


@pytest.mark.skipif(not HAS_LOOP_DEVICES, reason="loop devices are root's")
def test_a_block_device_that_changes_its_size(tmp_path: Path, image: Path) -> None:
    with loop_device(image) as device, serving(tmp_path, f"vda={device}") as server:
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n")
        with connected(server.uri("vda")) as guest:
            os.truncate(image, SIZE // 2)
            subprocess.run(["/sbin/losetup", "--set-capacity", device], check=True)
            _wait_for_size(control, SIZE // 2)
            assert control.call("GET", "sessions/n")["state"] == "broken"
            for call in (
                lambda: guest.pread(4096, SIZE - 4096),
                lambda: guest.pwrite(b"x" * 4096, SIZE - 4096),
                lambda: guest.pwrite(b"x" * 4096, SIZE // 2 - 512),
            ):
                with pytest.raises(nbd.Error, match="Input/output error"):
                    call()
            guest.pwrite(b"x" * 4096, SIZE // 2 - 4096)
            guest.flush()


def test_a_remote_disk_that_comes_back_with_another_size_is_asked_for_nothing(
    tmp_path: Path,
) -> None:
    with backend_over(tmp_path) as backend, serving(tmp_path, f"vda={backend.uri}") as server:
        size = backend.image.stat().st_size
        control = Control(f"{server.unix}.control")
        control.call("PUT", "sessions/n")
        with connected(server.uri("vda")) as guest:
            backend.kill()
            os.truncate(backend.image, 2 * size)
            backend.start()
            waiting = guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"x" * 4096)), 0)
            end = time.monotonic() + TIMEOUT_S
            while control.call("GET", "disks")["disks"][0]["image_size"] != 2 * size:
                assert time.monotonic() < end
                guest.poll(50)
            session = control.call("GET", "sessions/n")
            assert session["state"] == "broken"
            assert f"changed its size from {size} to {2 * size} bytes" in session["reason"]
            assert not guest.aio_command_completed(waiting)
            assert backend.image.read_bytes()[:4096] != b"x" * 4096
            backend.kill()
            os.truncate(backend.image, size)
            backend.start()
            while not guest.aio_command_completed(waiting):
                assert time.monotonic() < end
                guest.poll(50)
            _wait_for_size(control, size)
        assert backend.image.read_bytes()[:4096] == b"x" * 4096
        control.call("PUT", "sessions/m")
    assert "another disk answers there now" in server.messages()
