"""Extended headers: requests past 4 GiB in one piece, 64-bit block status, filtered contexts."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from tests.disks import GIB, KIB, MIB, copy_disk, first_difference, make_disk
from tests.serving import Serving, connected, run, serving, try_run

SIZE = 12 * GIB + 512
ALLOCATION = "base:allocation"
ACCESS = "x-fleecenbd:access"
READABLE = 1
HELD = 2

Extents = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class Large:
    """A disk `vm` of 12 GiB and 512 bytes, mostly holes, under session `nightly`."""

    server: Serving
    disk: Path
    before: Path

    @property
    def guest(self) -> str:
        """URI of the guest export."""
        return self.server.uri("vm")

    @property
    def backup(self) -> str:
        """URI of the fleecing export."""
        return self.server.uri("vm@nightly")


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Large]:
    disk = make_disk(tmp_path / "vm.raw", SIZE)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        yield Large(server, disk, before)


def _with_contexts(handle: nbd.NBD) -> None:
    handle.add_meta_context(ALLOCATION)
    handle.add_meta_context(ACCESS)


def _status(ask: Callable[[Callable[..., int]], object]) -> Extents:
    """The extents of one block status request, per context."""
    found: Extents = {}

    def collect(name: str, _offset: int, extents: list[tuple[int, int]], _error: object) -> int:
        found[name] = [tuple(extent) for extent in extents]
        return 0

    ask(collect)
    return found


def _refused(call: Callable[[], object]) -> int:
    with pytest.raises(nbd.Error) as caught:
        call()
    assert caught.value.errnum is not None
    return caught.value.errnum


def test_libnbd_and_nbdinfo_agree_on_extended_headers(large: Large) -> None:
    for uri in (large.guest, large.backup):
        with connected(uri) as client:
            assert client.get_extended_headers_negotiated()
            assert client.can_block_status_payload()
        assert json.loads(run("nbdinfo", "--no-content", "--json", uri))["extended"] is True


def test_qemu_agrees_on_extended_headers(large: Large) -> None:
    trace = try_run("qemu-io", "-T", "nbd_*", "-f", "raw", "-c", "map", large.backup).stderr
    assert "option reply 11 (extended headers), type 1 (ack)" in trace
    assert "(block status (64-bit))" in trace


def test_a_client_without_extended_headers_is_served_as_before(large: Large) -> None:
    with connected(large.backup, lambda h: h.set_request_extended_headers(False)) as backup:
        assert not backup.get_extended_headers_negotiated()
        assert backup.get_structured_replies_negotiated()
        assert len(backup.pread(MIB, SIZE - MIB)) == MIB


def test_one_trim_of_ten_gib_releases_them(large: Large) -> None:
    with connected(large.guest) as guest, connected(large.backup, _with_contexts) as backup:
        guest.pwrite(b"x" * 8 * MIB, 5 * GIB)
        held = large.server.temp_bytes()
        backup.trim(10 * GIB, GIB)
        assert large.server.temp_bytes() < max(held, 1)
        found = _status(lambda collect: backup.block_status_64(SIZE, 0, collect))
        assert found[ACCESS] == [(GIB, READABLE), (10 * GIB, 0), (GIB + 512, READABLE)]
        assert _refused(lambda: backup.pread(1, 11 * GIB - 1)) == errno.EINVAL
        assert len(backup.pread(1, 11 * GIB)) == 1


def test_a_guest_zeroes_and_trims_five_gib_in_one_request(large: Large) -> None:
    with connected(large.guest, _with_contexts) as guest, connected(large.backup) as backup:
        backup.trim(6 * GIB, 0)  # nothing to copy there: it is the requests that are tried
        guest.pwrite(b"z" * MIB, 4 * GIB)
        guest.zero(5 * GIB, 0)
        assert bytes(guest.pread(MIB, 4 * GIB)) == bytes(MIB)
        found = _status(lambda collect: guest.block_status_64(5 * GIB, 0, collect))
        assert found == {ALLOCATION: [(5 * GIB, nbd.STATE_HOLE | nbd.STATE_ZERO)]}
        guest.pwrite(b"t" * MIB, 5 * GIB)
        guest.trim(5 * GIB, GIB)
        assert bytes(guest.pread(MIB, 5 * GIB)) == bytes(MIB)


def test_a_guest_zeroes_what_the_backup_has_not_read_yet(large: Large, tmp_path: Path) -> None:
    with connected(large.guest) as guest:
        guest.zero(512 * MIB, 3 * GIB)
        guest.zero(SIZE - 11 * GIB, 11 * GIB)
    run("nbdcopy", large.backup, tmp_path / "backup.raw")
    assert first_difference(large.before, tmp_path / "backup.raw") is None


def test_the_status_of_twelve_gib_comes_in_one_reply(large: Large) -> None:
    with connected(large.backup, _with_contexts) as backup:
        found = _status(lambda collect: backup.block_status_64(SIZE, 0, collect))
    assert found[ACCESS] == [(SIZE, READABLE)]
    assert sum(length for length, _ in found[ALLOCATION]) == SIZE
    descriptor = os.open(large.before, os.O_RDONLY)
    try:
        position = 0
        for length, flags in found[ALLOCATION]:
            if flags & nbd.STATE_ZERO:
                data = os.lseek(descriptor, position, os.SEEK_DATA)
                assert data >= position + length, f"data in [{position}, {position + length})"
            position += length
    finally:
        os.close(descriptor)


def test_an_extent_of_more_than_four_gib_is_one_extent(tmp_path: Path) -> None:
    disk = tmp_path / "vm.raw"
    with disk.open("wb") as image:
        image.truncate(9 * GIB)
    with (
        serving(tmp_path, disk, "--begin", "n") as server,
        connected(server.uri("vm@n"), _with_contexts) as backup,
    ):
        found = _status(lambda collect: backup.block_status_64(9 * GIB, 0, collect))
        hole = nbd.STATE_HOLE | nbd.STATE_ZERO
        assert found == {ALLOCATION: [(9 * GIB, hole)], ACCESS: [(9 * GIB, READABLE)]}
        one = _status(
            lambda collect: backup.block_status_64(9 * GIB, 0, collect, nbd.CMD_FLAG_REQ_ONE)
        )
        assert one == found


@pytest.mark.parametrize("context", [ALLOCATION, ACCESS])
def test_block_status_can_be_asked_for_one_context_alone(large: Large, context: str) -> None:
    with connected(large.backup, _with_contexts) as backup:
        all_of_it = _status(lambda collect: backup.block_status_64(SIZE, 0, collect))
        found = _status(lambda collect: backup.block_status_filter(SIZE, 0, [context], collect))
    assert found == {context: all_of_it[context]}


def test_what_is_held_is_told_past_four_gib(large: Large) -> None:
    with connected(large.guest) as guest, connected(large.backup, _with_contexts) as backup:
        guest.pwrite(b"h" * 64 * KIB, 7 * GIB)
        found = _status(lambda collect: backup.block_status_filter(SIZE, 0, [ACCESS], collect))
    assert found[ACCESS] == [
        (7 * GIB, READABLE),
        (64 * KIB, READABLE | HELD),
        (SIZE - 7 * GIB - 64 * KIB, READABLE),
    ]


def test_a_read_of_sixty_four_mib_comes_whole(large: Large) -> None:
    with connected(large.guest) as guest, connected(large.backup) as backup:
        guest.pwrite(b"r" * 3 * MIB, 10 * MIB + 1)
        data = backup.pread(64 * MIB, 0)
    with large.before.open("rb") as before:
        assert before.read(64 * MIB) == data


def test_the_reason_for_an_error_reaches_the_client(large: Large) -> None:
    with connected(large.backup) as backup:
        backup.trim(5 * GIB, GIB)
    read = f"h.pread(2, {6 * GIB - 1})"
    told = try_run("nbdsh", "-c", "h.set_debug(True)", "-u", large.backup, "-c", read)
    assert told.returncode != 0
    assert str(6 * GIB - 1) in told.stderr
    assert "released" in told.stderr


def test_errors_leave_the_connection_in_step(large: Large) -> None:
    def unchecked(handle: nbd.NBD) -> None:
        checks = nbd.STRICT_BOUNDS | nbd.STRICT_ZERO_SIZE | nbd.STRICT_COMMANDS | nbd.STRICT_FLAGS
        handle.set_strict_mode(handle.get_strict_mode() & ~checks)

    with connected(large.backup, unchecked) as backup, connected(large.guest, unchecked) as guest:
        assert _refused(lambda: backup.pwrite(b"w" * 30 * MIB, 0)) == errno.EPERM
        assert _refused(lambda: backup.zero(6 * GIB, 0)) == errno.EINVAL
        assert _refused(lambda: backup.trim(SIZE, 1)) == errno.EINVAL
        assert _refused(lambda: guest.zero(SIZE, 1)) == errno.ENOSPC
        assert _refused(lambda: guest.trim(1 << 62, 0)) == errno.EINVAL
        assert _refused(lambda: guest.pread(1, SIZE)) == errno.EINVAL
        assert len(backup.pread(512, SIZE - 512)) == len(guest.pread(512, SIZE - 512)) == 512
