"""Where old data cannot be kept: file systems that are full, quotas, devices that fail. Each time
the guest is unharmed, the cause is told, the space is free again, and the next session is fine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

from fleecenbd.storage.filesystem import stores_may_fail
from tests.controlling import Control
from tests.disks import KIB, MIB
from tests.e2e.places import TIMEOUT_S, is_backed_up, listening, read_all
from tests.mounts import CAN_MOUNT, fill, mounted, tmpfs, unmount
from tests.remembering import RememberingGuest, remembering
from tests.serving import FLEECENBD, Serving, connected, run, serving, try_run
from tests.storage.kinds import loop_device

SIZE = 16 * MIB
PIECE = 64 * KIB

pytestmark = pytest.mark.skipif(not CAN_MOUNT, reason="mounts are root's")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vda.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _control(server: Serving) -> Control:
    return Control(f"{server.unix}.control")


def _overwrite(server: Serving, end: int = SIZE) -> int:
    """A guest writes to all pieces before ``end``; how many writes failed, all with EIO."""
    failed = 0
    with connected(server.uri("vda")) as guest:
        for offset in range(0, end, PIECE):
            try:
                guest.pwrite(_new(offset), offset)
            except nbd.Error as error:
                if error.errno != "EIO":
                    raise
                failed += 1
        guest.flush()
    return failed


def _new(offset: int) -> bytes:
    return (b"%016d" % offset) * (PIECE // 16)


def _is_overwritten(image: Path) -> None:
    content = image.read_bytes()
    for offset in range(0, SIZE, PIECE):
        assert content[offset : offset + PIECE] == _new(offset), offset


def _is_broken_and_the_next_is_fine(
    server: Serving, image: Path, folder: Path, cause: str
) -> dict[str, Any]:
    control = _control(server)
    session = control.call("GET", "sessions/n")
    assert session["state"] == "broken"
    assert cause in session["reason"]
    assert cause in server.messages()
    with connected(server.uri("vda@n")) as backup, pytest.raises(nbd.Error, match="output error"):
        backup.pread(4096, SIZE - 4096)
    control.call("DELETE", "sessions/n")
    guest = RememberingGuest(server.uri("vda"), image.read_bytes())
    with remembering(guest):
        is_backed_up(server, guest, folder, "m", temp_dir=str(folder), temp_reserve=0)
    return dict(session)


@pytest.mark.parametrize("policy", ["break-snapshot", "throttle"])
def test_a_tmpfs_that_is_full_costs_the_session(tmp_path: Path, image: Path, policy: str) -> None:
    with tmpfs(tmp_path / "small", 8 * MIB) as small:
        words = ("--temp-dir", small)
        with serving(tmp_path, image, *words) as server:
            before = _free(small)
            _control(server).call("PUT", "sessions/n", temp_reserve=0, on_cbw_error=policy)
            assert _overwrite(server) == 0
            _is_overwritten(image)
            assert _free(small) == before, "the space is free, though nobody has finished it"
            _is_broken_and_the_next_is_fine(server, image, tmp_path, "No space left on device")


def test_what_xfs_gives_a_growing_file_in_advance_is_room_for_it(tmp_path: Path) -> None:
    """Nobody else can have it: a qcow2 temp image, which grows, is not full for that."""
    held, size = 48 * MIB, 56 * MIB
    image = tmp_path / "vda.raw"
    image.write_bytes(os.urandom(size))
    with mounted("xfs", tmp_path) as temps, serving(tmp_path, image) as server:
        reserve = _free(temps) - size
        control = _control(server)
        words = {"temp": "qcow2", "temp_dir": str(temps), "temp_reserve": reserve}
        control.call("PUT", "sessions/n", **words)
        (file,) = temps.iterdir()
        ahead = 0
        with connected(server.uri("vda")) as guest:
            for offset in range(0, held, PIECE):
                guest.pwrite(_new(offset), offset)
                if offset % (4 * MIB) == 0:
                    time.sleep(0.2)  # the file system is asked once a second
                    ahead = max(ahead, file.stat().st_blocks * 512 - file.stat().st_size)
        session = control.call("GET", "sessions/n")
        assert session["state"] == "active", session["reason"]
        assert ahead > 8 * MIB, "this file system gives no file more than it needs"
        (disk,) = session["disks"]
        assert disk["temp"]["now"] == held
        assert disk["temp"]["room"] <= size - held
        control.call("DELETE", "sessions/n?result=failed")


def test_a_tmpfs_that_is_full_costs_the_guest_its_writes_where_the_backup_comes_first(
    tmp_path: Path, image: Path
) -> None:
    content = image.read_bytes()
    with tmpfs(tmp_path / "small", 8 * MIB) as small, serving(tmp_path, image) as server:
        _control(server).call(
            *("PUT", "sessions/n"),
            temp_reserve=0,
            temp_dir=str(small),
            on_cbw_error="break-guest-write",
        )
        assert _overwrite(server) >= 8 * MIB // PIECE
        assert read_all(server.uri("vda@n")) == content
        with connected(server.uri("vda@n")) as backup:
            backup.trim(SIZE, 0)
        assert _overwrite(server) == 0
        _is_overwritten(image)


def test_somebody_else_fills_the_file_system(tmp_path: Path, image: Path) -> None:
    with tmpfs(tmp_path / "small", 64 * MIB) as small, serving(tmp_path, image) as server:
        _control(server).call("PUT", "sessions/n", temp_reserve=0, temp_dir=str(small))
        assert _overwrite(server, 2 * MIB) == 0
        filler = fill(small)
        assert _overwrite(server) == 0
        _is_overwritten(image)
        _is_broken_and_the_next_is_fine(server, image, tmp_path, "No space left on device")
        filler.unlink()


# -- the reserve -----------------------------------------------------------------------------------


def test_a_session_breaks_before_it_takes_the_reserve(tmp_path: Path, image: Path) -> None:
    with (
        tmpfs(tmp_path / "small", 24 * MIB) as small,
        serving(tmp_path, image) as server,
        listening(server) as told,
    ):
        _control(server).call("PUT", "sessions/n", temp_reserve=12 * MIB, temp_dir=str(small))
        least = _free(small)
        with connected(server.uri("vda")) as guest:
            for offset in range(0, SIZE, PIECE):
                guest.pwrite(_new(offset), offset)
                least = min(least, _free(small))
        _is_overwritten(image)
        assert 12 * MIB <= least <= 13 * MIB
        end = time.monotonic() + TIMEOUT_S
        while "temp-full" not in [event["event"] for event in told]:
            assert time.monotonic() < end
            time.sleep(0.05)
        session = _is_broken_and_the_next_is_fine(
            server, image, tmp_path, f"and {12 * MIB} are its reserve"
        )
        assert session["temp_reserve"] == 12 * MIB


def test_by_default_a_gibibyte_is_kept_and_where_there_is_none_no_session_begins(
    tmp_path: Path, image: Path
) -> None:
    with tmpfs(tmp_path / "small", 64 * MIB) as small:
        words = ("--begin", "n", "--temp-dir", small)
        for more in (("-U", tmp_path / "s"), ("--run", "true")):
            refused = try_run(FLEECENBD, "serve", image, *words, *more)
            assert refused.returncode == 1
            assert f"bytes free of {64 * MIB}, and {1 << 30} are its reserve" in refused.stderr
            assert "--temp-dir" in refused.stderr
            assert "--temp-reserve" in refused.stderr
        run(FLEECENBD, "serve", image, *words, "--temp-reserve", "none", "--run", "true")
        run(FLEECENBD, "serve", image, *words, "--temp-reserve", "32M", "--run", "true")


def test_who_fills_the_file_system_up_to_the_reserve_is_seen_within_a_second(
    tmp_path: Path, image: Path
) -> None:
    with (
        tmpfs(tmp_path / "small", 64 * MIB) as small,
        serving(tmp_path, image) as server,
        listening(server) as told,
    ):
        control = _control(server)
        control.call("PUT", "sessions/n", temp_reserve=16 * MIB, temp_dir=str(small))
        assert _overwrite(server, 4 * MIB) == 0
        filler = small / "filler"
        filler.write_bytes(bytes(_free(small) - 16 * MIB - 512 * KIB))
        end = time.monotonic() + TIMEOUT_S
        while "temp-low" not in [event["event"] for event in told]:
            assert time.monotonic() < end
            time.sleep(0.05)
        (disk,) = control.call("GET", "sessions/n")["disks"]
        assert disk["temp"]["room"] <= 512 * KIB
        filler.unlink()
        assert _overwrite(server) == 0
        assert control.call("GET", "sessions/n")["state"] == "active", "a copy asks again"


@pytest.mark.parametrize("kind", ["btrfs", "ext4", "xfs"])
def test_a_file_system_that_somebody_fills_under_the_bitmaps_costs_no_guest(
    tmp_path: Path, image: Path, kind: str
) -> None:
    """Bits are stores into mapped files: one that finds no space would be the server's end."""
    with (
        mounted(kind, tmp_path, "state") as folder,
        serving(tmp_path, image, "--temp-reserve", "none") as server,
    ):
        may_fail = stores_may_fail(kind)
        assert ("is on btrfs: when that is full" in server.messages()) is may_fail
        if may_fail:
            return  # all that is promised with this version of Linux
        control = _control(server)
        control.call("PUT", "disks/vda/bitmaps/c", granularity=4 * KIB)
        control.call("PUT", "sessions/n", cluster_size=4 * KIB)
        assert _overwrite(server, MIB) == 0
        run("sync", "-f", folder)
        fill(folder)
        run("sync", "-f", folder)
        assert _overwrite(server) == 0
        _is_overwritten(image)
        assert control.call("GET", "disks/vda/bitmaps/c")["state"] == "good"


# -- quotas, and devices that fail -----------------------------------------------------------------


@contextmanager
def _with_quota(folder: Path, limit: int) -> Iterator[Path]:
    with mounted("btrfs", folder) as top:
        part = top / "part"
        run("btrfs", "subvolume", "create", part)
        run("btrfs", "quota", "enable", top)
        run("btrfs", "qgroup", "limit", str(limit), part)
        yield part


def test_a_quota_costs_the_session(tmp_path: Path, image: Path) -> None:
    with _with_quota(tmp_path, 6 * MIB) as part, serving(tmp_path, image) as server:
        _control(server).call("PUT", "sessions/n", temp_reserve=0, temp_dir=str(part))
        assert _overwrite(server) == 0
        _is_overwritten(image)
        _is_broken_and_the_next_is_fine(server, image, tmp_path, "Disk quota exceeded")


def test_a_device_that_fails_under_the_temp_images_costs_the_session(
    tmp_path: Path, image: Path
) -> None:
    """XFS on a loop device whose file was cut, and cannot grow again: it shuts itself down."""
    with tmpfs(tmp_path / "below", 128 * MIB) as below:
        disk = below / "disk.img"
        with disk.open("wb") as file:
            file.truncate(512 * MIB)
        with loop_device(disk) as device:
            run("mkfs.xfs", "-q", device)
            temps = tmp_path / "temps"
            temps.mkdir()
            run("mount", device, temps)
            try:
                with serving(tmp_path, image) as server:
                    control = _control(server)
                    control.call("PUT", "sessions/n", temp_reserve=0, temp_dir=str(temps))
                    assert _overwrite(server, 2 * MIB) == 0
                    os.truncate(disk, MIB)
                    fill(below)
                    end = time.monotonic() + TIMEOUT_S
                    while try_run("sync", "-f", temps).returncode == 0:
                        assert time.monotonic() < end
                        (temps / "more").touch()
                    assert _overwrite(server) == 0
                    _is_overwritten(image)
                    _is_broken_and_the_next_is_fine(server, image, tmp_path, "Input/output error")
            finally:
                unmount(temps)


def test_a_disk_that_fails_under_a_copy_costs_the_session(tmp_path: Path, image: Path) -> None:
    """A loop device over a file that was cut: it cannot be read beyond, but written."""
    content = image.read_bytes()
    with loop_device(image) as device, serving(tmp_path, f"vda={device}") as server:
        control = _control(server)
        control.call("PUT", "sessions/n")
        os.truncate(image, SIZE // 2)
        run("blockdev", "--flushbufs", device)
        with connected(server.uri("vda")) as guest:
            guest.pwrite(_new(SIZE - PIECE), SIZE - PIECE)
            assert bytes(guest.pread(PIECE, SIZE - PIECE)) == _new(SIZE - PIECE)
            assert bytes(guest.pread(PIECE, 0)) == content[:PIECE]
        session = control.call("GET", "sessions/n")
        assert session["state"] == "broken"
        assert "old data could not be copied" in session["reason"]
        assert "Input/output error" in session["reason"]
        control.call("DELETE", "sessions/n")
        os.truncate(image, SIZE)
        guest_now = RememberingGuest(server.uri("vda"), read_all(server.uri("vda")))
        with remembering(guest_now):
            is_backed_up(server, guest_now, tmp_path, "m")


# -- throttle --------------------------------------------------------------------------------------


def test_throttle_stretches_a_burst_and_asks_the_backup_to_hurry(
    tmp_path: Path, image: Path
) -> None:
    content = image.read_bytes()
    with serving(tmp_path, image) as server, listening(server) as told:
        control = _control(server)
        control.call("PUT", "sessions/n", temp_limit=10 * MIB, on_cbw_error="throttle")
        began = time.monotonic()
        assert _overwrite(server, 8 * MIB) == 0
        fast = time.monotonic() - began
        began = time.monotonic()
        assert _overwrite(server, 10 * MIB) == 0
        slow = time.monotonic() - began
        wait = control.call("GET", "sessions/n")["disks"][0]["guest_wait"]
        # 32 writes, at 0 to 97 of 100 ms.
        assert wait["throttled"] == 31
        assert wait["throttled_time"] == pytest.approx(0.1 * sum(range(32)) / 32, rel=0.2)
        assert slow - fast > wait["throttled_time"] - 1
        end = time.monotonic() + TIMEOUT_S
        while "temp-throttled" not in [event["event"] for event in told]:
            assert time.monotonic() < end
            time.sleep(0.05)
        with connected(server.uri("vda@n")) as backup:
            for offset in range(0, SIZE, MIB):
                assert bytes(backup.pread(MIB, offset)) == content[offset : offset + MIB]
                backup.trim(MIB, offset)
        while [event["delay"] > 0 for event in told if event["event"] == "temp-throttled"] != [
            True,
            False,
        ]:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert _overwrite(server) == 0
        session = control.call("GET", "sessions/n")
        assert session["state"] == "active"
        assert session["disks"][0]["guest_wait"]["throttled"] == 31
        control.request("GET", "/metrics")
        metrics = control.getresponse().read().decode()
        assert 'fleecenbd_fleece_throttled_seconds_count{disk="vda",session="n"} 31' in metrics
    _is_overwritten(image)
