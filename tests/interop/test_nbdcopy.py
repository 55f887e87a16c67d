"""nbdcopy: pulls of whole disks while they change, pushes, and what it says after a TRIM."""

from pathlib import Path

import pytest

from tests.disks import GIB, KIB, MIB, copy_disk, first_difference, make_disk
from tests.interop.conftest import Fleeced, Serve, clients_vanish, overwrite
from tests.serving import FLEECENBD, connected, run, try_run

SIZES = {
    "1 MiB": MIB,
    "1 MiB + 512": MIB + 512,
    "64 KiB - 512": 64 * KIB - 512,
    "5 GiB sparse": 5 * GIB,
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_pull_equals_the_disk_at_the_moment_of_begin(
    tmp_path: Path, serving: Serve, size: int
) -> None:
    disk = make_disk(tmp_path / "vm.raw", size)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        with connected(server.uri("vm")) as guest:
            overwrite(guest, [(0, 4 * KIB + 1), (size // 2, 9 * KIB), (size - 700, 700)])
            guest.zero(2 * KIB, size // 3)
            guest.trim(8 * KIB, size // 5)
        run("nbdcopy", server.uri("vm@nightly"), tmp_path / "backup.raw")
    assert first_difference(before, tmp_path / "backup.raw") is None
    assert first_difference(before, disk) is not None, "the guest's writes did not reach the disk"


@pytest.mark.parametrize(
    "options",
    [
        ("--connections=1", "--requests=1"),
        ("--connections=4", "--requests=64"),
        ("--synchronous",),
        ("--no-extents",),
        ("--request-size=33554432",),
        ("--request-size=4096",),
    ],
    ids=" ".join,
)
def test_a_pull_is_the_same_with_whatever_options(
    fleeced: Fleeced, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run("nbdcopy", *options, fleeced.backup, tmp_path / "backup.raw")
    assert first_difference(fleeced.before, tmp_path / "backup.raw") is None


def test_a_pull_over_tcp_equals_the_disk_at_the_moment_of_begin(
    fleeced_over_tcp: Fleeced, tmp_path: Path
) -> None:
    run("nbdcopy", fleeced_over_tcp.server.tcp_uri("vm@nightly"), tmp_path / "backup.raw")
    assert first_difference(fleeced_over_tcp.before, tmp_path / "backup.raw") is None


def test_two_pulls_one_after_the_other_are_the_same_while_the_guest_goes_on(
    fleeced: Fleeced, tmp_path: Path
) -> None:
    run("nbdcopy", fleeced.backup, tmp_path / "first.raw")
    with connected(fleeced.guest) as guest:
        overwrite(guest, [(offset, 64 * KIB) for offset in range(0, 8 * MIB, 128 * KIB)])
    run("nbdcopy", fleeced.backup, tmp_path / "second.raw")
    assert first_difference(fleeced.before, tmp_path / "first.raw") is None
    assert first_difference(fleeced.before, tmp_path / "second.raw") is None


@clients_vanish
def test_after_a_trim_a_pull_of_the_whole_export_fails(fleeced: Fleeced, tmp_path: Path) -> None:
    with connected(fleeced.backup) as backup:
        backup.trim(64 * KIB, 3 * MIB)
    result = try_run("nbdcopy", fleeced.backup, tmp_path / "backup.raw")
    assert result.returncode != 0
    assert "Invalid argument" in result.stderr
    before = fleeced.before.read_bytes()
    with connected(fleeced.backup) as backup:
        end = 3 * MIB + 64 * KIB
        assert bytes(backup.pread(3 * MIB, 0)) == before[: 3 * MIB]
        assert bytes(backup.pread(fleeced.size - end, end)) == before[end:]


def test_a_disk_is_restored_through_the_guest_export(tmp_path: Path, serving: Serve) -> None:
    image = make_disk(tmp_path / "image.raw", 6 * MIB + 512, seed=9)
    disk = make_disk(tmp_path / "vm.raw", 6 * MIB + 512, seed=4)
    with serving(tmp_path, disk) as server:
        run("nbdcopy", "--flush", image, server.uri("vm"))
    assert first_difference(image, disk) is None


def test_restoring_a_disk_leaves_the_backup_as_it_was(tmp_path: Path, serving: Serve) -> None:
    image = make_disk(tmp_path / "image.raw", 4 * MIB, seed=9)
    disk = make_disk(tmp_path / "vm.raw", 4 * MIB, seed=4)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        run("nbdcopy", image, server.uri("vm"))
        run("nbdcopy", server.uri("vm@nightly"), tmp_path / "backup.raw")
    assert first_difference(image, disk) is None
    assert first_difference(before, tmp_path / "backup.raw") is None


def test_nbdcopy_starts_the_server_by_socket_activation(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB + 512)
    target = tmp_path / "out.raw"
    state = ("--state-dir", tmp_path / "state")
    run("nbdcopy", "--", "[", FLEECENBD, "serve", disk, "--begin", "n", *state, "]", target)
    assert first_difference(disk, target) is None


def test_nbdcopy_runs_under_the_server_by_run(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", MIB + 512)
    target = tmp_path / "backup.raw"
    state = ("--state-dir", tmp_path / "state")
    command = f'nbdcopy "$uri" {target}'
    run(FLEECENBD, "serve", disk, "--begin", "n", "-U", "-", *state, "--run", command)
    assert first_difference(disk, target) is None
