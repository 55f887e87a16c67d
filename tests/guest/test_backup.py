"""A Linux guest writes files on its disk, with fsync, while the disk is being backed up.

    make guest      or, this file alone:   .venv/bin/python -m pytest -s tests/guest/test_backup.py

The kernel, the block layer and ext4 are Linux's own; QEMU carries their requests over. What the
guest says it has fsynced must be on its disk, and the backup must be the disk at arming.
"""

import os
from pathlib import Path

import pytest

from tests.disks import MIB, copy_disk, first_difference
from tests.guest.conftest import MachineMaker
from tests.guest.filesystem import faults, make_filesystem, sums
from tests.guest.machine import MOUNTED, Guest, booted
from tests.serving import Serving, connected, run, serving

SIZE = 256 * MIB
PIECES = 32  # of the disk, in the pull that releases as it goes


def test_a_backup_of_a_running_guest_is_its_disk_at_arming(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    machine = machine_maker(tmp_path, tmp_path / "f.sock")

    with serving(tmp_path, disk), booted(machine, "first") as guest:
        first_boot_s = guest.boot_s
        guest.mount()
        for folder in ("/kept", "/changed", "/removed"):
            guest.start_writer(folder, 40)
        guest.wait_fsynced(60)
        guest.stop_writers()
        at_arming = guest.fsynced()
        guest.unmount()
        guest.power_off()
    assert len(at_arming) == 120
    before = copy_disk(disk, tmp_path / "before.raw")
    assert faults(before, at_arming) == []

    pulled, released, live = (tmp_path / f"{name}.raw" for name in ("pulled", "released", "live"))
    with serving(tmp_path, disk, "--begin", "nightly", "--shared", "2") as server:
        with booted(machine, "second") as guest:
            guest.mount()
            guest.start_writer("/changed", 40)
            guest.start_writer("/new", 200)
            guest.wait_fsynced(20)
            # The blocks of these files are the guest's to discard, and the backup's to keep.
            guest.run(f"rm -r {MOUNTED}/removed && sync && fstrim {MOUNTED}")
            run("nbdcopy", server.uri("vm@nightly"), pulled)
            guest.wait_fsynced(20)
            run("nbdcopy", "--connections=1", server.uri("vm"), live)
            held_peak = _pull_and_release(server, guest, released)
            guest.wait_fsynced(20)
            held_in_the_end = server.temp_bytes()
            guest.stop_writers()
            told = guest.fsynced()
            guest.unmount()
            guest.power_off()
            assert guest.kernel_faults() == []
        second_boot_s = guest.boot_s

    for backup in (pulled, released):
        assert first_difference(before, backup) is None
        assert faults(backup, at_arming) == []
    assert held_peak > 0, "the guest has overwritten nothing: this has shown nothing"
    assert held_in_the_end == 0, "old data is kept that was released"
    kept = {file: total for file, total in at_arming.items() if file.startswith("/kept/")}
    assert faults(disk, kept | told) == []
    # Nobody can have got the backup from the live disk by luck: it is told apart.
    assert faults(live, at_arming) != []
    print(
        f"\nbooted in {first_boot_s:.1f} and {second_boot_s:.1f} s; {len(at_arming)} files at "
        f"arming, {sum(guest.ledger.counts().values())} fsyncs while it was backed up twice; "
        f"old data kept: at most {held_peak / MIB:.1f} MiB, none once all was released"
    )


def _pull_and_release(server: Serving, guest: Guest, target: Path) -> int:
    """Pull vm@nightly piece by piece, TRIM each; the most that the temp images held, in bytes.

    The guest goes on: between one piece and the next, each of its writers must have got further.
    """
    length = SIZE // PIECES
    held_peak = server.temp_bytes()
    with connected(server.uri("vm@nightly")) as client, target.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(0, SIZE, length):
            data = client.pread(length, offset)
            if data.count(0) != length:
                os.pwrite(file.fileno(), data, offset)
            os.fdatasync(file.fileno())
            client.trim(length, offset)
            guest.wait_fsynced(1)
            held_peak = max(held_peak, server.temp_bytes())
    return held_peak


def test_what_the_guest_discards_is_free_in_the_image(
    tmp_path: Path, machine_maker: MachineMaker
) -> None:
    disk = make_filesystem(tmp_path / "vm.raw", SIZE)
    machine = machine_maker(tmp_path, tmp_path / "f.sock")
    with serving(tmp_path, disk), booted(machine) as guest:
        guest.mount()
        empty = _allocated(disk)
        guest.run(f"dd if=/dev/urandom of={MOUNTED}/large bs=1M count=64 conv=fsync")
        full = _allocated(disk)
        guest.run(f"rm {MOUNTED}/large && sync")
        removed = _allocated(disk)
        guest.run(f"fstrim {MOUNTED}")
        trimmed = _allocated(disk)
        guest.unmount()
        sound = faults(copy_disk(disk, tmp_path / "sound.raw"), {})
        guest.run("blkdiscard /dev/vda")
        discarded = _allocated(disk)
        guest.power_off()
        assert guest.kernel_faults() == []
    print(
        f"\nMiB in use: {empty / MIB:.1f} empty, {full / MIB:.1f} with a file of 64, "
        f"{removed / MIB:.1f} once removed, {trimmed / MIB:.1f} once trimmed, "
        f"{discarded / MIB:.1f} with the whole disk discarded"
    )
    assert full - empty >= 64 * MIB
    assert removed >= full - MIB, "removing a file is not supposed to free anything by itself"
    assert trimmed <= empty + MIB
    assert sound == []
    assert discarded == 0


def _allocated(image: Path) -> int:
    """Bytes that an image takes."""
    return image.stat().st_blocks * 512


@pytest.fixture
def filesystem(tmp_path: Path) -> Path:
    """An image whose files are /a and /b, made without a guest."""
    image = make_filesystem(tmp_path / "image", 16 * MIB)
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"content of {name}")
        run("debugfs", "-w", "-R", f"write {tmp_path / name} {name}", image)
    return image


def test_a_sound_file_system_with_the_expected_files_has_no_faults(filesystem: Path) -> None:
    expected = sums(filesystem)
    assert expected.keys() == {"/a", "/b"}
    assert faults(filesystem, expected) == []
    assert faults(filesystem, {"/a": expected["/a"]}, others=True) == []


def test_a_file_that_is_missing_changed_or_too_many_is_noticed(filesystem: Path) -> None:
    expected = sums(filesystem)
    assert faults(filesystem, {**expected, "/c": expected["/a"]}) == ["/c is missing"]
    assert faults(filesystem, {**expected, "/a": expected["/b"]}) == ["/a has another content"]
    assert faults(filesystem, {"/a": expected["/a"]}) == ["/b should not be there"]


def test_a_damaged_file_system_is_noticed(filesystem: Path) -> None:
    expected = sums(filesystem)
    # A block that is in use is marked free, as after a lost write of the bitmap.
    block = run("debugfs", "-R", "blocks a", filesystem).split()[0]
    run("debugfs", "-w", "-R", f"freeb {block}", filesystem)
    found = faults(filesystem, expected)
    assert len(found) == 1
    assert found[0].startswith("fsck finds faults")
