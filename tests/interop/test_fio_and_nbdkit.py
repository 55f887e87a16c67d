"""fio's nbd engine on the guest export, and nbdkit's nbd plugin in front of both exports."""

import json
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.disks import MIB, first_difference
from tests.interop.conftest import Fleeced
from tests.serving import connected, run


def _fio(folder: Path, uri: str, *options: str) -> dict[str, Any]:
    """fio's report on its one job, which did not fail."""
    report = folder / "fio.json"
    run(
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", f"--size={8 * MIB}", *options),
        *("--output-format=json", f"--output={report}", f"--aux-path={folder}"),
    )
    # A greeting of the engine may stand before the report.
    text = report.read_text()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return job


def test_fio_verifies_what_it_wrote_and_the_backup_is_untouched(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    verify = ("--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
    job = _fio(tmp_path, fleeced.guest, "--rw=randwrite", "--bs=4k", "--iodepth=32", *verify)
    assert job["write"]["total_ios"] == 8 * MIB // 4096
    assert job["read"]["total_ios"] == 8 * MIB // 4096
    run("nbdcopy", fleeced.backup, tmp_path / "backup.raw")
    assert first_difference(fleeced.before, tmp_path / "backup.raw") is None


def test_fio_mixes_reads_writes_and_trims(fleeced: Fleeced, tmp_path: Path) -> None:
    sizes = ("--bsrange=512-64k", "--iodepth=16")
    mixed = _fio(tmp_path, fleeced.guest, "--rw=randrw", *sizes)
    assert mixed["read"]["total_ios"] > 0
    assert mixed["write"]["total_ios"] > 0
    assert _fio(tmp_path, fleeced.guest, "--rw=randtrim", *sizes)["trim"]["total_ios"] > 0
    run("nbdcopy", fleeced.backup, tmp_path / "backup.raw")
    assert first_difference(fleeced.before, tmp_path / "backup.raw") is None


def test_nbdkit_in_front_hands_the_backup_on(fleeced: Fleeced, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    run("nbdkit", "-U", "-", "nbd", fleeced.backup, "--run", f'nbdcopy "$uri" {target}')
    assert first_difference(fleeced.before, target) is None


def test_nbdkit_in_front_hands_a_trim_on(fleeced: Fleeced) -> None:
    command = f'nbdsh -u "$uri" -c "h.trim({MIB}, {MIB})"'
    run("nbdkit", "-U", "-", "nbd", fleeced.backup, "--run", command)
    with connected(fleeced.backup) as backup:
        for offset in (MIB, 2 * MIB - 1):
            with pytest.raises(nbd.Error) as caught:
                backup.pread(1, offset)
            assert caught.value.errno == "EINVAL"
        assert len(backup.pread(1, MIB - 1) + backup.pread(1, 2 * MIB)) == 2


def test_nbdkit_in_front_lets_a_guest_write(fleeced: Fleeced) -> None:
    command = 'qemu-io -f raw -c "write -P 0x5a 1M 1M" -c "read -P 0x5a 1M 1M" "$uri"'
    run("nbdkit", "-U", "-", "nbd", fleeced.guest, "--run", command)
    assert fleeced.disk.read_bytes()[MIB : 2 * MIB] == b"\x5a" * MIB
