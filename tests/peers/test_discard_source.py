"""QEMU from 9.1 as the backup: a blockdev-backup job that discards at its source what it copied.

The one stock client known to TRIM what it reads: with it, the temp image shrinks during the pull.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.differential.daemon import Daemon, daemon
from tests.disks import KIB, MIB, copy_disk, first_difference, make_disk
from tests.serving import Serving, connected, serving

SIZE = 16 * MIB


@contextmanager
def _qemu(directory: Path, server: Serving, target: Path) -> Iterator[Daemon]:
    """A daemon with the fleecing export as node `source` and a new raw image as node `target`."""
    with target.open("wb") as image:
        image.truncate(SIZE)
    source = "driver=nbd,node-name=source,discard=unmap,export=vm@nightly,server.type=unix"
    with daemon(
        directory,
        *("--blockdev", f"{source},server.path={server.unix}"),
        *("--blockdev", f"driver=file,node-name=target,filename={target}"),
    ) as started:
        yield started


def _begin_pull(qemu: Daemon) -> None:
    qemu.command(
        "blockdev-backup",
        **{"job-id": "pull", "device": "source", "target": "target", "sync": "full"},
        **{"discard-source": True},
    )


def _end_pull(qemu: Daemon) -> None:
    """Wait for the job's end; it must not have failed."""
    ended = qemu.event("BLOCK_JOB_COMPLETED", device="pull")
    assert "error" not in ended, ended


def _access(server: Serving) -> list[tuple[int, int]]:
    context = "x-fleecenbd:access"
    found: list[tuple[int, int]] = []
    with connected(server.uri("vm@nightly"), lambda h: h.add_meta_context(context)) as backup:
        backup.block_status_64(
            SIZE, 0, lambda _name, _offset, extents, _error: found.extend(extents) or 0
        )
    return [tuple(extent) for extent in found]


def test_a_pull_is_complete_and_leaves_nothing_in_the_temp_image(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        with connected(server.uri("vm")) as guest:
            for offset in range(0, SIZE, 256 * KIB):
                guest.pwrite(b"g" * 8 * KIB, offset + 1000)
            assert server.temp_bytes() > 0
            with _qemu(tmp_path, server, tmp_path / "backup.raw") as qemu:
                _begin_pull(qemu)
                # The guest goes on, before and behind the job.
                for offset in range(SIZE - 128 * KIB, 0, -256 * KIB):
                    guest.pwrite(b"h" * 8 * KIB, offset + 1000)
                _end_pull(qemu)
            assert server.temp_bytes() == 0
            guest.pwrite(b"i" * MIB, 5 * MIB)
            assert server.temp_bytes() == 0
        assert _access(server) == [(SIZE, 0)]
    assert first_difference(before, tmp_path / "backup.raw") is None
