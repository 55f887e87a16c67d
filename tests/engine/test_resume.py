"""A session taken up again from buffers, as after a kill: which bits count, and what goes on."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import RecordingBitmap, Since
from fleecenbd.engine.resume import FleeceRemains, OwnRemains, resume_session
from fleecenbd.engine.session import Session, SessionOptions
from fleecenbd.engine.state import BREAK_GUEST_WRITE
from fleecenbd.engine.store import MemoryFleeceBits
from tests.simulation.gated import GatedDevice

from .scene import CLUSTER, errno_of, simulated

SINCE = Since("sunday", "id of sunday", 1.0)


class Left:
    """What a dead server left of one disk in one session. Bits are given as digits."""

    def __init__(
        self, access: str, done: str, *, own: str | None = None, tail: int = 0, temp: str = ""
    ) -> None:
        clusters = len(access)
        size = clusters * CLUSTER - tail
        self.device = GatedDevice("active", size, random.Random(1).randbytes(size))
        self.disk = Disk("vda", self.device)
        self.bits = MemoryFleeceBits(size, CLUSTER, CLUSTER if own is not None else None)
        for digits, buffer in ((access, self.bits.access), (done, self.bits.done)):
            _put(digits, buffer, size)
        content = b"".join(
            (b"t" if digit == "1" else b"\0") * CLUSTER for digit in temp.ljust(clusters, "0")
        )
        self.temp = GatedDevice("temp", clusters * CLUSTER, content)
        self.own: OwnRemains | None = None
        if own is not None:
            assert self.bits.own is not None
            _put(own, self.bits.own, size)
            self.chain = RecordingBitmap("chain", size, CLUSTER)
            self.disk.add_bitmap(self.chain)
            self.own = OwnRemains("chain", "use", self.chain, SINCE)

    async def resume(self, broken: str | None = None, **options: object) -> Session:
        remains = FleeceRemains(
            self.disk,
            CLUSTER,
            self.bits,
            None if broken is not None else self.temp,
            broken=broken,
            own=self.own,
        )
        return await resume_session(
            "nightly",
            SessionOptions(cluster_size=CLUSTER, **options),  # type: ignore[arg-type]
            [remains],
            session_id="the id",
            armed_at=7.0,
            pause_s=0.25,
            owner="cron",
        )


def _put(digits: str, buffer: bytearray | memoryview, size: int) -> None:
    """The digits, and every padding bit set."""
    bitmap = Bitmap(size, CLUSTER, buffer=buffer)
    for number in range(len(bitmap.bits)):
        bitmap.bits[number] = number >= len(digits) or digits[number] == "1"


@pytest.mark.parametrize("tail", [0, 1, 512, CLUSTER - 1])
@pytest.mark.parametrize("access", ["1", "110101", "1111111", "01111111", "101010101"])
def test_bits_that_a_kill_left_half_stored_are_put_right(access: str, tail: int) -> None:
    done = "".join(random.Random(access).choice("01") for _ in access)

    @simulated
    async def run() -> None:
        left = Left(access, done, tail=tail)
        fleece = (await left.resume()).fleeces[0]
        expected = [(a == "1", d == "1") for a, d in zip(access, done, strict=True)]
        assert str(fleece.access) == access
        assert str(fleece.done) == "".join(str(int(a and d)) for a, d in expected)
        assert str(fleece.copy) == "".join(str(int(a and not d)) for a, d in expected)
        for bitmap in (fleece.access, fleece.done, fleece.copy):
            assert not bitmap.bits[bitmap.clusters :].any()
        assert bytes(left.bits.access) == fleece.access.bits.tobytes()
        assert left.disk.fleeces == [fleece]

    run()


@simulated
async def test_the_session_is_the_one_that_it_was() -> None:
    session = await Left("11", "00").resume(on_cbw_error=BREAK_GUEST_WRITE, temp_limit=CLUSTER)
    assert (session.name, session.id, session.owner) == ("nightly", "the id", "cron")
    assert (session.armed_at, session.pause_s, session.state) == (7.0, 0.25, "active")
    state = session.fleeces[0].state
    assert (state.name, state.on_cbw_error, state.temp_limit) == (
        "vda@nightly",
        BREAK_GUEST_WRITE,
        CLUSTER,
    )


@simulated
async def test_reads_come_from_where_they_came_before_and_guests_copy_what_is_left() -> None:
    left = Left("1110", "0100", temp="0100")
    old = bytes(left.device.content)
    fleece = (await left.resume()).fleeces[0]
    assert await fleece.read(CLUSTER, CLUSTER) == b"t" * CLUSTER
    await left.disk.write(0, b"n" * 4 * CLUSTER)
    assert await fleece.read(0, CLUSTER) == old[:CLUSTER]
    assert await fleece.read(2 * CLUSTER, CLUSTER) == old[2 * CLUSTER : 3 * CLUSTER]
    assert await errno_of(fleece.read(3 * CLUSTER, CLUSTER)) == errno.EINVAL
    assert str(fleece.done) == "1110"


@simulated
async def test_what_the_temp_image_holds_is_charged_and_what_was_released_is_freed() -> None:
    left = Left("110011", "100000", temp="111101")
    fleece = (await left.resume()).fleeces[0]
    assert left.temp.log == [f"extents 0+{6 * CLUSTER}", f"trim {2 * CLUSTER}+{2 * CLUSTER}"]
    assert str(fleece.state.charged) == "110001"
    assert fleece.stats.temp_clusters == 3
    # A copy that had failed, or was in flight, left something in cluster 1: zeroes are written.
    left.device.content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    await left.disk.write(CLUSTER, b"n")
    assert await fleece.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize(
    ("own", "mode", "released"),
    [(None, "", 4), ("011011", "use", 2), ("011011", "keep", 2), ("011011", "new", 4)],
)
def test_what_was_released_is_known_still(own: str | None, mode: str, released: int) -> None:
    @simulated
    async def run() -> None:
        left = Left("010010", "000000", own=own)
        if left.own is not None:
            left.own = replace(left.own, mode=mode)
        fleece = (await left.resume()).fleeces[0]
        assert fleece.stats.released_bytes == released * CLUSTER
        await fleece.trim(CLUSTER, CLUSTER)
        assert fleece.stats.released_bytes == (released + 1) * CLUSTER
        fleece.state.break_session("a test")
        assert fleece.stats.released_bytes == (released + 2) * CLUSTER

    run()


@simulated
async def test_a_temp_image_that_tells_no_extents_is_charged_whole() -> None:
    left = Left("101", "100")

    async def extents(offset: int, length: int) -> list[tuple[int, int]]:
        raise OSError(errno.EOPNOTSUPP, "a test")

    left.temp.extents = extents  # type: ignore[method-assign]
    fleece = (await left.resume()).fleeces[0]
    assert str(fleece.state.charged) == "101"
    assert left.temp.log == [f"trim {CLUSTER}+{CLUSTER}"]


@simulated
async def test_space_that_cannot_be_freed_stays_charged_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = Left("10", "10", temp="11")
    left.temp.gate("trim")
    resuming = asyncio.ensure_future(left.resume())
    (await left.temp.reached("trim")).fail()
    fleece = (await resuming).fleeces[0]
    assert str(fleece.state.charged) == "11"
    assert fleece.stats.temp_clusters == 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "vda@nightly: temp space could not be freed" in caplog.text


class _Preallocated(GatedDevice):
    """Holds all of its space from the start, and frees many ranges by one call."""

    holds_space = True
    fails_at: int | None = None

    def __init__(self, clusters: int) -> None:
        super().__init__("temp", clusters * CLUSTER, bytes(clusters * CLUSTER))
        self.calls: list[list[tuple[int, int]]] = []

    async def trim_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        if len(self.calls) == self.fails_at:
            raise OSError(errno.EIO, "a test")
        self.calls.append([(offset // CLUSTER, length // CLUSTER) for offset, length in ranges])


@pytest.mark.parametrize("fails_at", [None, 0, 1])
def test_all_that_was_released_is_freed_by_few_calls(
    fails_at: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fleecenbd.engine.resume.PUNCHED_AT_ONCE", 2)

    @simulated
    async def run() -> None:
        left = Left("0101001", "0100000")
        left.temp = temp = _Preallocated(7)
        temp.fails_at = fails_at
        fleece = (await left.resume()).fleeces[0]
        assert temp.log == []
        calls = [[(0, 1), (2, 1)], [(4, 2)]]
        assert temp.calls == calls[:fails_at]
        charged = {None: "0101001", 0: "1111111", 1: "0101111"}[fails_at]
        assert str(fleece.state.charged) == charged
        assert fleece.stats.temp_clusters == charged.count("1")
        assert ("vda@nightly: temp space could not be freed" in caplog.text) == (
            fails_at is not None
        )

    run()


@pytest.mark.parametrize("failed", [True, False])
def test_own_bits_are_committed_or_rolled_back_as_if_nothing_had_been(failed: bool) -> None:
    @simulated
    async def run() -> None:
        left = Left("0110", "0000", own="0110")
        session = await left.resume()
        own = session.fleeces[0].own
        assert own is not None
        assert (str(own.bitmap), own.since, left.chain.used_by) == ("0110", SINCE, "nightly")
        left.chain.since = session.since
        await left.disk.write(3 * CLUSTER, b"n")
        session.finish(failed=failed)
        assert str(left.chain.bitmap) == ("0111" if failed else "0001")
        assert left.chain.since == (SINCE if failed else session.since)
        assert left.chain.used_by is None

    run()


@simulated
async def test_a_session_that_had_broken_is_broken_still() -> None:
    left = Left("1111", "0000", own="0110")
    session = await left.resume(broken="its time was up")
    fleece = session.fleeces[0]
    assert session.state == "broken"
    with pytest.raises(OSError, match="vda@nightly is broken: its time was up") as caught:
        await fleece.read(0, 1)
    assert caught.value.errno == errno.EIO
    assert "1" not in str(fleece.access)
    await left.disk.write(0, b"n")
    session.finish()
    assert session.failed
    assert str(left.chain.bitmap) == "1110", "rolled back, and the guest's write was recorded"
    await session.wait_closed()


@simulated
async def test_a_bitmap_that_a_broken_session_made_is_lost_and_goes_with_it() -> None:
    left = Left("1111", "0000", own="0000")
    assert left.own is not None
    left.own = OwnRemains("chain", "new", left.chain, None, made=True)
    session = await left.resume(broken="it was finished as failed")
    assert left.chain.lost == "session nightly, which made it, failed"
    session.finish()
    assert left.disk.bitmaps == {}


@simulated
async def test_a_session_that_is_not_broken_needs_its_temp_image() -> None:
    left = Left("1", "0")
    with pytest.raises(ValueError, match="vda@nightly is not broken"):
        await resume_session(
            "nightly",
            SessionOptions(),
            [FleeceRemains(left.disk, CLUSTER, left.bits, None)],
            session_id="the id",
            armed_at=7.0,
        )


@simulated
async def test_own_bits_that_are_missing_are_an_error() -> None:
    left = Left("1", "0", own="1")
    left.bits.own = None
    with pytest.raises(ValueError, match="own bits of bitmap chain of vda are missing"):
        await left.resume()
