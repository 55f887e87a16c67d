"""libnbd's Python module and nbdsh: single requests, and the errors that they get."""

import errno
import threading
from collections.abc import Callable

import nbd
import pytest

from tests.disks import KIB, MIB
from tests.interop.conftest import (
    META_CONTEXTS,
    OVERWRITTEN,
    Fleeced,
    clients_vanish,
    extents,
    not_behind_nbdkit,
)
from tests.serving import connected, run

ACCESS = "x-fleecenbd:access"
READABLE = 1
HELD = 2


def _with_contexts(handle: nbd.NBD) -> None:
    handle.add_meta_context("base:allocation")
    handle.add_meta_context(ACCESS)


def _refused(call: Callable[[], object]) -> nbd.Error:
    with pytest.raises(nbd.Error) as caught:
        call()
    return caught.value


def test_the_guest_reads_what_it_wrote_and_the_backup_what_was_before(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    with connected(fleeced.guest) as guest, connected(fleeced.backup) as backup:
        guest.pwrite(b"n" * 5000, 1_000_001)
        assert bytes(guest.pread(5002, 1_000_000)) == (
            before[1_000_000:1_000_001] + b"n" * 5000 + before[1_005_001:1_005_002]
        )
        assert bytes(backup.pread(5002, 1_000_000)) == before[1_000_000:1_005_002]


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_reads_are_right_with_simple_and_structured_replies(
    fleeced: Fleeced, structured: bool
) -> None:
    before = fleeced.before.read_bytes()
    with connected(
        fleeced.backup, lambda handle: handle.set_request_structured_replies(structured)
    ) as backup:
        assert backup.get_structured_replies_negotiated() is structured
        for offset, length in [(0, 1), (511, 3), (4095, 70_000), (0, fleeced.size)]:
            assert bytes(backup.pread(length, offset)) == before[offset : offset + length]


def test_reads_with_dont_fragment_come_in_one_piece(fleeced: Fleeced) -> None:
    pieces: list[int] = []

    def collect(data: bytes, _offset: int, _status: int, _error: object) -> int:
        pieces.append(len(data))
        return 0

    with connected(fleeced.backup) as backup:
        backup.pread_structured(fleeced.size, 0, collect, nbd.CMD_FLAG_DF)
    assert pieces == [fleeced.size]


def test_a_write_to_the_backup_is_refused_and_the_connection_lives_on(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    with connected(fleeced.backup) as backup:
        error = _refused(lambda: backup.pwrite(b"x" * 70_000, 4096))
        assert error.errnum == errno.EPERM
        assert bytes(backup.pread(4096, 4096)) == before[4096:8192]


def test_a_released_range_is_refused_with_its_offset_and_the_reason(fleeced: Fleeced) -> None:
    with connected(fleeced.backup) as backup:
        backup.trim(64 * KIB, MIB)
        for offset, length in [(MIB, 1), (MIB - 1, 2), (MIB + 64 * KIB - 1, 100), (0, 2 * MIB)]:
            assert _refused(lambda o=offset, n=length: backup.pread(n, o)).errnum == errno.EINVAL
        assert len(backup.pread(MIB, 0)) == MIB
        assert len(backup.pread(4096, MIB + 64 * KIB)) == 4096


def test_parts_of_a_cluster_are_released_once_they_add_up(fleeced: Fleeced) -> None:
    with connected(fleeced.backup) as backup:
        backup.trim(1000, 2 * MIB)
        assert len(backup.pread(4096, 2 * MIB)) == 4096
        backup.trim(3096, 2 * MIB + 1000)
        assert _refused(lambda: backup.pread(1, 2 * MIB)).errnum == errno.EINVAL


@not_behind_nbdkit(META_CONTEXTS)
def test_the_partial_cluster_at_the_end_of_the_disk_can_be_released(fleeced: Fleeced) -> None:
    with connected(fleeced.backup, _with_contexts) as backup:
        assert extents(backup, ACCESS, 512, 8 * MIB) == [(512, READABLE | HELD)]
        backup.trim(512, 8 * MIB)
        assert extents(backup, ACCESS, 512, 8 * MIB) == [(512, 0)]
        assert _refused(lambda: backup.pread(512, 8 * MIB)).errnum == errno.EINVAL


def test_what_is_released_is_reported_as_data_and_not_as_zeroes(fleeced: Fleeced) -> None:
    with connected(fleeced.backup, _with_contexts) as backup:
        backup.trim(fleeced.size, 0)
        assert extents(backup, "base:allocation", fleeced.size) == [(fleeced.size, 0)]


@not_behind_nbdkit(META_CONTEXTS)
def test_what_is_released_is_reported_as_such(fleeced: Fleeced) -> None:
    with connected(fleeced.backup, _with_contexts) as backup:
        backup.trim(fleeced.size, 0)
        assert extents(backup, ACCESS, fleeced.size) == [(fleeced.size, 0)]


@not_behind_nbdkit(META_CONTEXTS)
def test_a_guest_write_after_the_release_takes_no_space(fleeced: Fleeced) -> None:
    with connected(fleeced.backup, _with_contexts) as backup, connected(fleeced.guest) as guest:
        guest.pwrite(b"a" * MIB, 6 * MIB)
        assert extents(backup, ACCESS, MIB, 6 * MIB) == [(MIB, READABLE | HELD)]
        backup.trim(2 * MIB, 5 * MIB)
        guest.pwrite(b"b" * 2 * MIB, 5 * MIB)
        assert extents(backup, ACCESS, 2 * MIB, 5 * MIB) == [(2 * MIB, 0)]


def test_a_trim_frees_the_space_that_the_guests_writes_took(fleeced: Fleeced) -> None:
    with connected(fleeced.guest) as guest, connected(fleeced.backup) as backup:
        guest.pwrite(b"s" * 3 * MIB, 5 * MIB)
        held = fleeced.server.temp_bytes()
        assert held > 0
        backup.trim(8 * MIB, 0)
        # Of the last, partial cluster at most is left.
        assert fleeced.server.temp_bytes() <= 4 * KIB
        guest.pwrite(b"t" * 8 * MIB, 0)
        assert fleeced.server.temp_bytes() <= 4 * KIB


def test_small_writes_take_small_space(fleeced: Fleeced) -> None:
    before = fleeced.server.temp_bytes()
    dense = bytes(range(1, 256)) * 5000
    with connected(fleeced.guest) as guest:
        for offset in range(0, 8 * MIB, 64 * KIB):
            guest.pwrite(dense[: 4 * KIB], offset)
    # 128 writes of 4 KiB: at most one cluster each.
    assert fleeced.server.temp_bytes() - before <= 128 * 4 * KIB


def test_every_way_a_guest_can_write_is_kept_from_the_backup(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    with connected(fleeced.guest) as guest, connected(fleeced.backup) as backup:
        guest.pwrite(b"f" * 9000, 100, nbd.CMD_FLAG_FUA)
        guest.zero(300 * KIB + 7, MIB)
        guest.zero(64 * KIB, 4 * MIB, nbd.CMD_FLAG_NO_HOLE)
        guest.trim(2 * MIB, 5 * MIB)
        guest.flush()
        assert bytes(guest.pread(300 * KIB + 7, MIB)) == bytes(300 * KIB + 7)
        assert bytes(guest.pread(64 * KIB, 4 * MIB)) == bytes(64 * KIB)
        assert bytes(backup.pread(fleeced.size, 0)) == before


def test_zeroes_take_space_where_the_guest_wants_no_hole(fleeced: Fleeced) -> None:
    with connected(fleeced.guest) as guest:
        guest.pwrite(b"d" * MIB, 4 * MIB)
        guest.flush()
        used = fleeced.disk.stat().st_blocks * 512
        guest.zero(MIB, 4 * MIB, nbd.CMD_FLAG_NO_HOLE)
        guest.flush()
        assert fleeced.disk.stat().st_blocks * 512 >= used
        guest.zero(MIB, 4 * MIB)
        guest.flush()
        assert fleeced.disk.stat().st_blocks * 512 <= used - MIB
        assert bytes(guest.pread(MIB, 4 * MIB)) == bytes(MIB)


def test_requests_past_the_end_are_refused(fleeced: Fleeced) -> None:
    def unchecked(handle: nbd.NBD) -> None:
        # All that libnbd would refuse by itself; it must go on setting the flags that it sets.
        checks = nbd.STRICT_BOUNDS | nbd.STRICT_ZERO_SIZE | nbd.STRICT_COMMANDS | nbd.STRICT_FLAGS
        handle.set_strict_mode(handle.get_strict_mode() & ~checks)

    with (
        connected(fleeced.guest, unchecked) as guest,
        connected(fleeced.backup, unchecked) as backup,
    ):
        assert _refused(lambda: guest.pread(513, fleeced.size - 512)).errnum == errno.EINVAL
        assert _refused(lambda: guest.pwrite(b"x" * 513, fleeced.size - 512)).errnum == errno.ENOSPC
        assert _refused(lambda: guest.pread(0, 0)).errnum == errno.EINVAL
        assert _refused(lambda: backup.zero(4096, 0)).errnum == errno.EINVAL
        assert _refused(lambda: backup.trim(4096, 0, nbd.CMD_FLAG_FUA)).errnum == errno.EINVAL
        assert len(guest.pread(512, fleeced.size - 512)) == 512
        assert len(backup.pread(512, 0)) == 512


def test_many_requests_in_flight_are_all_answered(fleeced: Fleeced) -> None:
    before = fleeced.before.read_bytes()
    answers: dict[int, bytes] = {}
    with connected(fleeced.backup) as backup:
        buffers = {}
        for index in range(200):
            offset = index * 40_000
            buffer = nbd.Buffer(4096)
            buffers[offset] = buffer
            backup.aio_pread(buffer, offset)
        while backup.aio_in_flight():
            backup.poll(-1)
        for offset, buffer in buffers.items():
            answers[offset] = bytes(buffer.to_bytearray())
    assert answers == {offset: before[offset : offset + 4096] for offset in buffers}


@clients_vanish
def test_a_client_that_vanishes_in_the_middle_leaves_the_disk_to_the_next(
    fleeced: Fleeced,
) -> None:
    def vanish(uri: str, send: Callable[[nbd.NBD, int], object]) -> None:
        client = nbd.NBD()
        client.connect_uri(uri)
        for index in range(50):
            send(client, index * 64 * KIB)
        # The object ends here: the socket closes without DISC, with requests in flight.

    piece = bytearray(b"v" * 64 * KIB)
    vanish(fleeced.guest, lambda guest, at: guest.aio_pwrite(nbd.Buffer.from_bytearray(piece), at))
    vanish(fleeced.backup, lambda backup, at: backup.aio_pread(nbd.Buffer(64 * KIB), at))
    with connected(fleeced.guest) as again, connected(fleeced.backup) as backup_again:
        again.pwrite(b"again", 0)
        assert bytes(again.pread(5, 0)) == b"again"
        assert bytes(backup_again.pread(fleeced.size, 0)) == fleeced.before.read_bytes()


def test_two_clients_of_a_backup_share_what_is_released(fleeced: Fleeced) -> None:
    with connected(fleeced.backup) as one, connected(fleeced.backup) as other:
        assert one.can_multi_conn()
        one.trim(64 * KIB, 0)
        assert _refused(lambda: other.pread(1, 0)).errnum == errno.EINVAL


def test_a_second_guest_is_refused_while_the_first_is_connected(fleeced: Fleeced) -> None:
    with connected(fleeced.guest):
        second = nbd.NBD()
        _refused(lambda: second.connect_uri(fleeced.guest))
    with connected(fleeced.guest) as third:
        assert third.get_size() == fleeced.size


def test_a_guest_goes_on_while_a_backup_client_does_not_read_its_replies(
    fleeced: Fleeced,
) -> None:
    with connected(fleeced.backup) as backup, connected(fleeced.guest) as guest:
        for index in range(64):
            backup.aio_pread(nbd.Buffer(MIB), index % 8 * MIB)  # sent, replies left in the socket
        for index in range(0, 8 * MIB, 16 * KIB):
            guest.pwrite(b"w" * 4096, index)
        guest.flush()
        done = threading.Event()

        def drain() -> None:
            while backup.aio_in_flight():
                backup.poll(-1)
            done.set()

        thread = threading.Thread(target=drain)
        thread.start()
        thread.join(60)
        assert done.is_set(), "the replies never came"


def test_nbdsh_reads_both_sides_of_a_disk(fleeced: Fleeced) -> None:
    script = "print(h.get_size(), h.pread(4, 0))"
    expected = f"{fleeced.size} {bytearray(fleeced.before.read_bytes()[:4])}\n"
    assert run("nbdsh", "-u", fleeced.backup, "-c", script) == expected
    overwritten = f"{fleeced.size} {bytearray(OVERWRITTEN * 4)}\n"
    assert run("nbdsh", "-u", fleeced.guest, "-c", script) == overwritten
