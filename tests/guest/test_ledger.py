"""What the guest says is entered as it should be: the verdicts of all other tests rest on it."""

import pytest

from tests.guest.machine import KERNEL_FAULTS, Ledger


def _ledger(*lines: tuple[str, float]) -> Ledger:
    ledger = Ledger()
    for line, at in lines:
        ledger.take(line, at)
    return ledger


def test_a_file_counts_as_fsynced_until_somebody_writes_it_again() -> None:
    ledger = _ledger(("@writing /mnt/a/1", 0.0), ("@fsynced /mnt/a/1 abc", 1.0))
    assert ledger.fsynced == {"/a/1": "abc"}
    assert ledger.writing == set()
    ledger.take("@writing /mnt/a/1", 2.0)
    assert ledger.fsynced == {}
    assert ledger.writing == {"/a/1"}


def test_the_silence_of_one_writer_is_not_covered_by_another() -> None:
    ledger = _ledger(
        *((f"@fsynced /mnt/a/{second} x", float(second)) for second in range(10)),
        *((f"@fsynced /mnt/b/{second} x", float(second)) for second in (0, 1, 6, 7, 8, 9)),
    )
    assert ledger.longest_silence(2.0, 3.0) == 5.0
    assert ledger.longest_silence(0.0, 0.5) == 1.0
    assert ledger.longest_silence(7.0, 9.0) == 1.0


def test_what_others_print_is_no_entry() -> None:
    ledger = _ledger(("hello", 0.0), ("@ended 1 0", 0.0), ("@ready", 0.0))
    assert ledger == Ledger()


def test_a_failed_writer_is_entered() -> None:
    assert _ledger(("@failed /mnt/a/1", 0.0)).failed == ["/a/1"]


@pytest.mark.parametrize(
    "line",
    [
        "[    9.1] I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1",
        "[    9.1] Buffer I/O error on dev vda, logical block 8193, lost sync page write",
        "[    9.1] critical space allocation error, dev vda, sector 2048 op 0x3:(DISCARD)",
        "[    9.1] EXT4-fs error (device vda): ext4_journal_check_start:83: comm dd: Detected",
        "[    9.1] EXT4-fs warning (device vda): ext4_end_bio:343: I/O error 10 writing",
        "[    9.1] EXT4-fs (vda): Remounting filesystem read-only",
        "[    9.1] JBD2: Error -5 detected when updating journal superblock for vda-8.",
        "[    9.1] Aborting journal on device vda-8.\n",
        "[  242.9] INFO: task jbd2/vda-8:85 blocked for more than 120 seconds.",
    ],
)
def test_what_the_kernel_says_of_a_disk_with_errors_is_known(line: str) -> None:
    assert KERNEL_FAULTS.search(line)


def test_what_the_kernel_says_of_a_sound_disk_is_no_alarm() -> None:
    line = "[    1.9] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none."
    assert not KERNEL_FAULTS.search(line)
