"""Which images can be trusted after which end of the server: every line of the module's table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from fleecenbd.server.state.description import Clean, DiskEntry
from fleecenbd.server.state.trust import SLACK_NS, Evidence, Image, boot_id, why_not
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.memory import MemoryDevice

ENTRY = DiskEntry("vda", "/vm.raw", "file", 7, 42, 1 << 20, "stamps")
IMAGE = Image("file", 7, 42, 1 << 20, mtime_ns=5000, ctime_ns=6000)
IDLE = (4000, 5000, 0)
BUSY = (5000, 4000, 2)
KILLED = Evidence(is_marked=False, same_boot=True, stamps=IDLE)
STOPPED = Evidence(is_marked=True, same_boot=True, stamps=IDLE)
CLEAN = msgspec.structs.replace(ENTRY, clean=Clean(5000, 6000))


def _why(
    entry: DiskEntry = ENTRY,
    image: Image = IMAGE,
    evidence: Evidence = KILLED,
    *,
    trust_offline: bool = False,
) -> str | None:
    return why_not(entry, image, evidence, trust_offline=trust_offline)


def test_a_killed_server_s_image_is_trusted_up_to_the_end_of_the_last_write() -> None:
    assert _why() is None
    assert "somebody else wrote" in (_why(image=replace(IMAGE, mtime_ns=5001)) or "")


def test_with_writes_in_flight_it_is_trusted_for_two_seconds_after_the_last_began() -> None:
    busy = replace(KILLED, stamps=BUSY)
    assert _why(image=replace(IMAGE, mtime_ns=5000 + SLACK_NS), evidence=busy) is None
    late = replace(IMAGE, mtime_ns=5001 + SLACK_NS)
    assert "somebody else wrote" in (_why(image=late, evidence=busy) or "")
    assert SLACK_NS == 2 * 10**9


def test_without_stamps_nothing_is_known_after_a_kill() -> None:
    assert "stamps" in (_why(evidence=replace(KILLED, stamps=None)) or "")


@pytest.mark.parametrize("evidence", [STOPPED, replace(STOPPED, same_boot=False)])
def test_after_a_clean_stop_both_times_must_be_as_they_were(evidence: Evidence) -> None:
    assert _why(CLEAN, evidence=evidence) is None
    for changed in (replace(IMAGE, mtime_ns=4999), replace(IMAGE, ctime_ns=6001)):
        assert "somebody else changed" in (_why(CLEAN, changed, evidence) or "")


def test_a_clean_stop_is_not_undone_by_missing_stamps() -> None:
    assert _why(CLEAN, evidence=replace(STOPPED, stamps=None)) is None


def test_after_another_boot_only_a_clean_stop_counts() -> None:
    crashed = replace(KILLED, same_boot=False)
    for entry in (ENTRY, CLEAN):
        assert "the machine went down" in (_why(entry, evidence=crashed) or "")
    # The mark vouches only for what the last server had let go of.
    assert "the machine went down" in (_why(evidence=replace(STOPPED, same_boot=False)) or "")


def test_a_disk_that_was_not_served_since_a_clean_stop_stays_clean_until_the_next_boot() -> None:
    assert _why(CLEAN) is None
    assert "somebody else changed" in (_why(CLEAN, replace(IMAGE, mtime_ns=1)) or "")


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (replace(IMAGE, size=1 << 21), "had 1048576 bytes, and has 2097152 now"),
        (replace(IMAGE, inode=43), "another image"),
        (replace(IMAGE, device=8), "another image"),
        (replace(IMAGE, kind="block"), "another image"),
        (replace(IMAGE, kind="other"), "no raw file"),
    ],
)
def test_another_image_is_never_trusted(image: Image, word: str) -> None:
    for entry, evidence in ((ENTRY, KILLED), (CLEAN, STOPPED)):
        assert word in (_why(entry, image, evidence, trust_offline=True) or "")


def test_device_numbers_may_change_with_the_boot_and_at_no_other_time() -> None:
    moved = replace(IMAGE, device=9)
    assert _why(CLEAN, moved, replace(STOPPED, same_boot=False)) is None
    assert _why(CLEAN, moved, STOPPED) is not None


@pytest.mark.parametrize("evidence", [KILLED, STOPPED])
def test_a_block_device_is_trusted_on_the_admin_s_word_only(evidence: Evidence) -> None:
    entry = msgspec.structs.replace(CLEAN, kind="block")
    image = replace(IMAGE, kind="block")
    assert "--trust-offline" in (_why(entry, image, evidence) or "")
    assert _why(entry, image, evidence, trust_offline=True) is None
    crashed = replace(KILLED, same_boot=False)
    assert "went down" in (_why(entry, image, crashed, trust_offline=True) or "")


async def test_an_image_is_known_by_its_inode(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(8192))
    device = FileDevice.open(path)
    found = os.stat(path)
    image = Image.of(device)
    assert image == Image(
        "file", found.st_dev, found.st_ino, 8192, found.st_mtime_ns, found.st_ctime_ns
    )
    device.close()
    with pytest.raises(OSError, match="closed"):
        Image.of(device)
    assert Image.of(MemoryDevice(4096)).kind == "other"


def test_the_boot_id_is_a_line_of_a_file(tmp_path: Path) -> None:
    assert len(boot_id()) == 36
    (tmp_path / "boot").write_text("another\n")
    assert boot_id(tmp_path / "boot") == "another"
