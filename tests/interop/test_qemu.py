"""QEMU's tools: qemu-img convert, compare, map, info, bench; qemu-io on both sides of a disk."""

import json
import subprocess
from pathlib import Path

from tests.disks import KIB, MIB, first_difference
from tests.interop.conftest import Fleeced, clients_vanish
from tests.serving import run, try_run


def _qemu_io(uri: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", "-f", "raw", *words, uri)


def test_convert_equals_the_disk_at_the_moment_of_begin(fleeced: Fleeced, tmp_path: Path) -> None:
    target = tmp_path / "backup.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", fleeced.backup, target)
    assert first_difference(fleeced.before, target) is None


def test_convert_with_many_coroutines_into_qcow2_loses_nothing(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    image, raw = tmp_path / "backup.qcow2", tmp_path / "backup.raw"
    run("qemu-img", "convert", "-m", "16", "-W", "-f", "raw", "-O", "qcow2", fleeced.backup, image)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert first_difference(fleeced.before, raw) is None


def test_compare_finds_the_backup_identical_and_the_guest_disk_different(fleeced: Fleeced) -> None:
    for uri, status in [(fleeced.backup, 0), (fleeced.guest, 1)]:
        result = try_run("qemu-img", "compare", "-f", "raw", "-F", "raw", fleeced.before, uri)
        assert result.returncode == status, result.stdout + result.stderr


@clients_vanish
def test_after_a_trim_convert_fails_and_the_rest_still_reads_right(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    _qemu_io(fleeced.backup, f"discard {3 * MIB} 64k")
    for output in ("raw", "qcow2"):
        result = try_run(
            *("qemu-img", "convert", "-f", "raw", "-O", output, fleeced.backup, tmp_path / output)
        )
        assert result.returncode != 0
        assert "Invalid argument" in result.stderr
    before = fleeced.before.read_bytes()
    rest = tmp_path / "rest.raw"
    for offset, length in [(0, 3 * MIB), (3 * MIB + 64 * KIB, 4 * MIB)]:
        part = (
            f"driver=raw,offset={offset},size={length},file.driver=nbd,file.export=vm@nightly,"
            f"file.server.type=unix,file.server.path={fleeced.server.unix}"
        )
        run("qemu-img", "convert", "--image-opts", part, "-O", "raw", rest)
        assert rest.read_bytes() == before[offset : offset + length]


def test_a_pull_that_trims_as_it_goes_is_complete(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    pulled = b""
    for offset in range(0, 8 * MIB, MIB):
        image = fleeced.server.unix.with_name("piece.raw")
        part = f"driver=raw,offset={offset},size={MIB},file.driver=nbd,file.export=vm@nightly"
        part += f",file.server.type=unix,file.server.path={fleeced.server.unix}"
        run("qemu-img", "convert", "--image-opts", part, "-O", "raw", image)
        pulled += image.read_bytes()
        _qemu_io(fleeced.backup, f"discard {offset} {MIB}")
    assert pulled == before[: 8 * MIB]


def test_info_says_what_size_the_export_has(fleeced: Fleeced) -> None:
    for uri in (fleeced.guest, fleeced.backup):
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))
        assert info["virtual-size"] == fleeced.size


def test_map_shows_holes_only_where_the_disk_was_zero(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    entries = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", fleeced.backup))
    assert sum(entry["length"] for entry in entries) == fleeced.size
    zeroes = [entry for entry in entries if entry["zero"]]
    assert zeroes, "a sparse disk of 8 MiB shows no zeroes at all"
    for entry in zeroes:
        start, length = entry["start"], entry["length"]
        assert not any(before[start : start + length]), f"data at [{start}, {start + length})"


def test_a_guest_writes_patterns_zeroes_and_discards_and_reads_them_back(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    _qemu_io(
        fleeced.guest,
        "write -P 0x11 0 1M",
        "write -P 0x22 1M 64k",
        f"write -z {MIB + 4 * KIB} 8k",
        "write -zu 2M 1M",
        "discard 4M 2M",
        "write -P 0x33 -f 7M 4k",
        "flush",
    )
    _qemu_io(
        fleeced.guest,
        "read -P 0x11 0 1M",
        "read -P 0x22 1M 4k",
        f"read -P 0 {MIB + 4 * KIB} 8k",
        f"read -P 0x22 {MIB + 12 * KIB} 52k",
        "read -P 0 2M 1M",
        "read -P 0x33 7M 4k",
    )
    target = tmp_path / "backup.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", fleeced.backup, target)
    assert first_difference(fleeced.before, target) is None


def test_a_write_to_the_backup_is_not_permitted(fleeced: Fleeced) -> None:
    result = try_run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", fleeced.backup)
    assert "Operation not permitted" in result.stdout + result.stderr
    assert run("qemu-io", "-f", "raw", "-c", "read 0 64k", fleeced.backup).startswith("read 65536")


def test_a_read_of_what_was_released_is_an_invalid_argument(fleeced: Fleeced) -> None:
    _qemu_io(fleeced.backup, "discard 1M 1M")
    result = try_run("qemu-io", "-f", "raw", "-c", "read 1536k 4k", fleeced.backup)
    assert "Invalid argument" in result.stdout + result.stderr
    assert "read 4096" in _qemu_io(fleeced.backup, "read 2M 4k")


def test_the_benchmark_of_qemu_img_writes_and_flushes_through_the_guest_export(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    run(
        *("qemu-img", "bench", "-w", "-t", "none", "-c", "2000", "-d", "16", "-s", "4096"),
        *("-S", "12288", "--flush-interval=16", "--no-drain", "-f", "raw", fleeced.guest),
    )
    target = tmp_path / "backup.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", fleeced.backup, target)
    assert first_difference(fleeced.before, target) is None


def test_a_qcow2_overlay_can_stand_on_the_backup(fleeced: Fleeced, tmp_path: Path) -> None:
    """An overlay on the export: reads come from the backup, writes stay in the overlay."""
    overlay, raw = tmp_path / "overlay.qcow2", tmp_path / "raw"
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", fleeced.backup, overlay),
        f"{fleeced.size}",
    )
    subprocess.run(["qemu-io", "-c", "write -P 0x77 0 64k", overlay], check=True)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, raw)
    expected = b"\x77" * 64 * KIB + fleeced.before.read_bytes()[64 * KIB :]
    assert raw.read_bytes() == expected
