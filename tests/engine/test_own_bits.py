"""A session's own bits: the four modes, the order of arming, commit and rollback."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from fleecenbd.engine import bit_status
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.own_bits import bitmaps_with
from fleecenbd.engine.recording import BitmapRequest, RecordingBitmap, Since, clear
from fleecenbd.engine.session import Session, SessionOptions, arm
from fleecenbd.engine.store import MEMORY, FleeceBits, RecordingBits
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, errno_of, simulated

SINCE = Since("sunday", "id of sunday", 1.0)
CLUSTERS = 8


class Buffers:
    """Bits in memory that note their end; whoever still has a view of them is found out."""

    def __init__(self, bits: Any, *names: str) -> None:
        for name in names:
            setattr(self, name, getattr(bits, name))
        self._names = names
        self.broken: str | None = None
        self.closed = False

    def mark_broken(self, cause: str) -> None:
        self.broken = cause

    def close(self) -> None:
        self.closed = True
        for name in self._names:
            buffer = getattr(self, name)
            if buffer is not None:
                buffer.append(0)  # BufferError while somebody has a view of it


class Store:
    """A store that keeps what it was asked, and may fail."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.log: list[str] = []
        self.fleece_bits: list[Buffers] = []
        self.recording_bits: list[Buffers] = []
        self.fails: str | None = None
        self.at_commit: list[str] = []
        self.gate: asyncio.Event | None = None

    def _step(self, what: str) -> None:
        self.log.append(what)
        if self.fails == what.split()[0]:
            raise OSError(errno.ENOSPC, f"a test: {what}")

    async def make_fleece_bits(
        self, session_id: str, disk: str, size: int, cluster_size: int, granularity: int | None
    ) -> FleeceBits:
        self._step("fleece")
        made = await MEMORY.make_fleece_bits(session_id, disk, size, cluster_size, granularity)
        self.fleece_bits.append(Buffers(made, "access", "done", "own"))
        return self.fleece_bits[-1]  # type: ignore[return-value]

    async def make_recording_bits(
        self, disk: str, bitmap_id: str, size: int, granularity: int
    ) -> RecordingBits:
        self._step("recording")
        made = await MEMORY.make_recording_bits(disk, bitmap_id, size, granularity)
        self.recording_bits.append(Buffers(made, "buffer"))
        return self.recording_bits[-1]  # type: ignore[return-value]

    async def commit(
        self, *, adding: Session | None = None, removing: Session | None = None
    ) -> None:
        what = "adding" if adding is not None else "removing" if removing is not None else "now"
        if adding is not None:
            for fleece in adding.fleeces:
                own = fleece.own.bitmap if fleece.own is not None else ""
                bits = {name: str(b.bitmap) for name, b in fleece.disk.bitmaps.items()}
                self.at_commit.append(f"own {own} recording {bits} access {fleece.access}")
            for name, (_, since) in bitmaps_with(self.disk, adding).items():
                self.at_commit.append(f"{name} since {since.session if since else None}")
        self._step(what)
        if self.gate is not None:
            await self.gate.wait()


class Night:
    """One disk with or without a bitmap, and a store."""

    def __init__(self, granularity: int = CLUSTER, *, bitmap: bool = True) -> None:
        self.device = GatedDevice("active", CLUSTERS * CLUSTER, b"o" * CLUSTERS * CLUSTER)
        self.disk = Disk("vda", self.device)
        self.store = Store(self.disk)
        self.temps: list[GatedDevice] = []
        self.given: list[str] = []
        if bitmap:
            self.disk.add_bitmap(RecordingBitmap("chain", self.disk.size, granularity, since=SINCE))

    async def arm(
        self,
        mode: str,
        name: str = "nightly",
        disks: list[Disk] | None = None,
        **options: Any,
    ) -> Session:
        async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
            self.given.append(session_id)
            self.temps.append(GatedDevice("temp", -(-disk.size // cluster_size) * cluster_size))
            return self.temps[-1]

        return await arm(
            name,
            disks or [self.disk],
            SessionOptions(cluster_size=options.pop("cluster_size", CLUSTER)),
            make_temp,
            clock=lambda: 5.0,
            bitmap=BitmapRequest("chain", mode, options.pop("granularity", CLUSTER)),
            store=self.store,
            **options,
        )

    async def write(self, *clusters: int) -> None:
        for cluster in clusters:
            await self.disk.write(cluster * CLUSTER, b"n" * CLUSTER)

    @property
    def chain(self) -> RecordingBitmap:
        return self.disk.bitmaps["chain"]

    def bits(self) -> str:
        return str(self.chain.bitmap)


@simulated
async def test_use_reads_what_is_dirty_and_lets_the_bitmap_start_anew() -> None:
    night = Night()
    await night.write(1, 4)
    session = await night.arm("use", owner="cron")
    fleece = session.fleeces[0]
    own = fleece.own
    assert own is not None
    assert (own.name, own.mode, own.reason, own.granularity) == ("chain", "use", None, CLUSTER)
    assert own.bitmap_id == night.chain.id
    assert own.since == SINCE
    assert str(own.bitmap) == str(fleece.access) == str(fleece.copy) == "01001000"
    assert (night.bits(), night.chain.since) == ("00000000", session.since)
    assert session.since == Since("nightly", session.id, 5.0)
    assert night.chain.used_by == "nightly"
    assert session.owner == "cron"
    assert night.given == [session.id]
    await night.write(4, 5)
    assert night.bits() == "00001100"
    assert str(own.bitmap) == "01001000"
    assert await fleece.read(4 * CLUSTER, CLUSTER) == b"n" * CLUSTER
    assert night.temps[0].log.count(f"write {4 * CLUSTER}+{CLUSTER}") == 1
    assert fleece.stats.copies_done == 1, "what is not dirty is not copied"
    assert await errno_of(fleece.read(5 * CLUSTER, CLUSTER)) == errno.EINVAL


@simulated
async def test_own_bits_are_written_before_the_description_and_recording_bits_cleared_after() -> (
    None
):
    night = Night()
    await night.write(2)
    await night.arm("use")
    assert night.store.log == ["fleece", "adding"]
    assert night.store.at_commit == [
        "own 00100000 recording {'chain': '00100000'} access 00100000",
        "chain since nightly",
    ]
    assert night.bits() == "00000000"


@simulated
async def test_guests_are_held_while_the_description_is_replaced() -> None:
    night = Night()
    night.store.gate = asyncio.Event()
    arming = asyncio.ensure_future(night.arm("use"))
    await settle()
    assert night.store.log == ["fleece", "adding"]
    write = asyncio.ensure_future(night.write(3))
    await settle()
    assert not night.disk.write_now(0, b"x")
    assert night.device.log == []
    night.store.gate.set()
    session = await arming
    await write
    assert session.fleeces[0].own is not None
    assert str(session.fleeces[0].own.bitmap) == "00000000"
    assert night.bits() == "00010000"


@simulated
async def test_a_store_that_hangs_holds_guests_no_longer_than_the_deadline() -> None:
    night = Night()
    night.store.gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    began = loop.time()
    arming = asyncio.ensure_future(night.arm("use", deadline_s=5.0))
    await asyncio.sleep(0)
    await night.disk.write(0, b"n" * CLUSTER)
    assert loop.time() - began == pytest.approx(5.0)
    night.store.gate.set()
    with pytest.raises(OSError, match="was not written down within the 5 s") as caught:
        await arming
    assert caught.value.errno == errno.ETIMEDOUT
    assert night.store.log[-2:] == ["adding", "removing"]
    assert night.disk.fleeces == []


@simulated
async def test_new_reads_everything_and_lets_the_bitmap_start_anew() -> None:
    night = Night()
    await night.write(6)
    session = await night.arm("new")
    fleece = session.fleeces[0]
    assert fleece.own is not None
    assert (fleece.own.mode, fleece.own.reason, fleece.own.made) == ("new", None, False)
    assert str(fleece.access) == str(fleece.copy) == "1" * 8
    assert str(fleece.own.bitmap) == "00000010"
    assert (night.bits(), night.chain.since) == ("00000000", session.since)


@simulated
async def test_new_makes_the_bitmap_where_there_is_none() -> None:
    night = Night(bitmap=False)
    await night.write(6)
    session = await night.arm("new", granularity=2 * CLUSTER)
    own = session.fleeces[0].own
    assert own is not None
    assert (own.made, own.since, own.granularity) == (True, None, 2 * CLUSTER)
    assert night.store.log == ["fleece", "recording", "adding"]
    assert night.store.at_commit == [
        "own 0000 recording {} access 11111111",
        "chain since nightly",
    ]
    await night.write(7)
    assert (night.bits(), night.chain.since) == ("0001", session.since)
    session.finish()
    assert (night.bits(), night.chain.used_by) == ("0001", None)


@simulated
async def test_keep_reads_what_is_dirty_and_lets_the_bitmap_go_on() -> None:
    night = Night()
    await night.write(1)
    session = await night.arm("keep")
    own = session.fleeces[0].own
    assert own is not None
    assert (own.mode, str(own.bitmap), own.since) == ("keep", "01000000", SINCE)
    await night.write(2)
    for failed in (True, False):
        assert (night.bits(), night.chain.since) == ("01100000", SINCE)
        assert night.chain.used_by is None
        session.finish(failed=failed)


@pytest.mark.parametrize("how", ["good", "missing", "lost", "begins no chain"])
def test_use_or_new_says_what_it_came_to_and_why(how: str) -> None:
    expected = {
        "good": ("use", None),
        "missing": ("new", "there was no such bitmap"),
        "lost": ("new", "the bitmap was lost: the machine crashed"),
        "begins no chain": ("new", "no backup has begun its chain yet"),
    }

    @simulated
    async def run() -> None:
        night = Night(bitmap=how != "missing")
        if how == "lost":
            night.chain.lost = "the machine crashed"
        elif how == "begins no chain":
            night.chain.since = None
        own = (await night.arm("use-or-new")).fleeces[0].own
        assert own is not None
        assert (own.mode, own.reason) == expected[how]

    run()


@simulated
async def test_use_or_new_chooses_disk_by_disk() -> None:
    night = Night()
    other = Disk("vdb", GatedDevice("other", CLUSTER))
    session = await night.arm("use-or-new", disks=[night.disk, other])
    modes = [fleece.own.mode for fleece in session.fleeces if fleece.own is not None]
    assert modes == ["use", "new"]
    assert other.bitmaps["chain"].since == night.chain.since == session.since


@pytest.mark.parametrize("mode", ["use", "new"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_session_that_fails_gives_the_bits_and_their_since_back(mode: str, broken: bool) -> None:
    @simulated
    async def run() -> None:
        night = Night()
        await night.write(1, 4)
        session = await night.arm(mode)
        await night.write(4, 5)
        if broken:
            session.fleeces[0].state.break_session("a test")
            assert night.store.fleece_bits[0].broken == "a test"
            assert night.bits() == "00001100", "only finish rolls back"
        session.finish(failed=not broken)
        assert session.failed
        assert (night.bits(), night.chain.since) == ("01001100", SINCE)
        assert night.chain.used_by is None
        session.finish()
        assert session.failed, "a second call changes nothing"

    run()


@pytest.mark.parametrize("mode", ["use", "new"])
def test_a_session_that_succeeds_drops_its_own_bits(mode: str) -> None:
    @simulated
    async def run() -> None:
        night = Night()
        await night.write(1, 4)
        session = await night.arm(mode)
        await night.write(5)
        session.finish()
        assert (night.bits(), night.chain.since) == ("00000100", session.since)
        session.finish(failed=True)
        assert (night.bits(), session.failed) == ("00000100", False)

    run()


@simulated
async def test_a_bitmap_that_a_failed_session_made_is_removed_again() -> None:
    night = Night(bitmap=False)
    session = await night.arm("new")
    await night.write(3)
    session.finish(failed=True)
    assert night.disk.bitmaps == {}
    assert night.store.recording_bits[0].closed
    await night.write(4)
    assert (await night.arm("new")).state == "active"


@pytest.mark.parametrize("failed", [True, False])
def test_that_a_session_failed_is_noted_before_its_bitmaps_roll_back(failed: bool) -> None:
    @simulated
    async def run() -> None:
        night = Night(bitmap=False)
        session = await night.arm("new")
        (bits,) = night.store.fleece_bits
        at_note = []

        def mark_broken(cause: str) -> None:
            at_note.append((cause, list(night.disk.bitmaps)))

        bits.mark_broken = mark_broken  # type: ignore[method-assign]
        session.finish(failed=failed)
        assert at_note == ([("it was finished as failed", ["chain"])] if failed else [])

    run()


@simulated
async def test_an_arming_that_may_be_described_is_noted_as_failed_before_guests_go_on() -> None:
    night = Night()
    night.store.gate = asyncio.Event()
    arming = asyncio.ensure_future(night.arm("use"))
    await settle()
    (bits,) = night.store.fleece_bits
    held = []
    bits.mark_broken = lambda cause: held.append((cause, night.disk._holds))  # type: ignore[method-assign]
    arming.cancel()
    await settle()
    assert held == [("its arming failed", 1)]
    night.store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await arming


@simulated
async def test_one_disk_that_breaks_rolls_back_the_bitmaps_of_all() -> None:
    night = Night()
    other = Disk("vdb", GatedDevice("other", CLUSTER))
    other.add_bitmap(RecordingBitmap("chain", CLUSTER, since=SINCE))
    await night.write(1)
    session = await night.arm("use", disks=[night.disk, other])
    session.fleeces[1].state.break_session("a test")
    session.finish()
    assert (night.bits(), night.chain.since) == ("01000000", SINCE)
    assert other.bitmaps["chain"].since == SINCE


@simulated
async def test_a_lost_bitmap_is_replaced_by_a_new_one_with_an_id_of_its_own() -> None:
    night = Night()
    lost = night.chain
    lost.lost = "the machine crashed"
    await night.write(1)
    session = await night.arm("new", granularity=2 * CLUSTER)
    assert night.chain is not lost
    assert night.chain.id != lost.id
    assert (night.chain.lost, night.chain.granularity) == (None, 2 * CLUSTER)
    await night.write(7)
    assert night.bits() == "0001"
    session.finish()
    assert (night.chain.lost, night.chain.since) == (None, session.since)


@simulated
async def test_a_lost_bitmap_is_back_and_still_lost_if_the_session_fails() -> None:
    night = Night()
    lost = night.chain
    lost.lost = "the machine crashed"
    session = await night.arm("use-or-new")
    assert lost.used_by == "nightly"
    session.finish(failed=True)
    assert night.chain is lost
    assert (lost.lost, lost.used_by) == ("the machine crashed", None)
    assert night.store.recording_bits[0].closed


@pytest.mark.parametrize("mode", ["use", "keep"])
def test_a_bitmap_that_is_missing_or_lost_cannot_be_used(mode: str) -> None:
    @simulated
    async def run() -> None:
        night = Night()
        night.chain.lost = "the machine crashed"
        with pytest.raises(OSError, match=r"chain of vda is lost .*a full backup is needed") as e:
            await night.arm(mode)
        assert e.value.errno == errno.EINVAL
        night = Night(bitmap=False)
        with pytest.raises(OSError, match="vda has no bitmap called chain") as e:
            await night.arm(mode)
        assert e.value.errno == errno.ENOENT
        assert night.given == [], "nothing was made for it"

    run()


@pytest.mark.parametrize("existing", [True, False])
def test_one_session_at_a_time_resets_a_bitmap(existing: bool) -> None:
    @simulated
    async def run() -> None:
        night = Night(bitmap=existing)
        first = await night.arm("new", "first")
        for mode in ("use", "new", "use-or-new"):
            with pytest.raises(OSError, match="is used by session first: one session") as caught:
                await night.arm(mode, "second")
            assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError, match="used by session first") as caught:
            night.disk.remove_bitmap("chain")
        assert caught.value.errno == errno.EBUSY
        await night.arm("keep", "beside")
        first.finish()
        await night.arm("use", "second")
        assert night.chain.used_by == "second"

    run()


@simulated
async def test_a_bitmap_that_is_being_made_is_claimed_already() -> None:
    night = Night(bitmap=False)
    night.store.gate = asyncio.Event()
    arming = asyncio.ensure_future(night.arm("new", "first"))
    await settle()
    assert await errno_of(night.arm("use-or-new", "second")) == errno.EBUSY
    with pytest.raises(OSError, match="has a bitmap called chain already"):
        night.disk.add_bitmap(RecordingBitmap("chain", night.disk.size))
    night.store.gate.set()
    (await arming).finish(failed=True)
    night.disk.add_bitmap(RecordingBitmap("chain", night.disk.size))


@pytest.mark.parametrize("where", ["fleece", "recording", "adding"])
@pytest.mark.parametrize("existing", [True, False])
def test_an_arming_that_fails_leaves_every_bitmap_as_it_was(where: str, existing: bool) -> None:
    @simulated
    async def run() -> None:
        night = Night(bitmap=existing)
        await night.write(1)
        night.store.fails = where
        if existing and where == "recording":
            night.chain.lost = "so that one has to be made"
        before = dict(night.disk.bitmaps)
        assert await errno_of(night.arm("new")) == errno.ENOSPC
        assert night.disk.bitmaps == before
        assert night.disk.bitmaps_begun == {}
        assert night.disk.fleeces == []
        if existing:
            assert (night.bits(), night.chain.since) == ("01000000", SINCE)
            assert night.chain.used_by is None
        assert all(temp.closed for temp in night.temps)
        made = [*night.store.fleece_bits, *night.store.recording_bits]
        assert all(bits.closed for bits in made)
        # What may have been described is taken back.
        assert night.store.log.count("removing") == (where == "adding")
        night.store.fails = None
        await night.write(2)
        assert (await night.arm("new", "again")).state == "active"

    run()


@simulated
async def test_an_arming_that_is_cancelled_while_it_is_described_is_taken_back() -> None:
    night = Night()
    night.store.gate = asyncio.Event()
    arming = asyncio.ensure_future(night.arm("use"))
    await settle()
    arming.cancel()
    await settle()
    night.store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await arming
    assert night.store.log == ["fleece", "adding", "removing"]
    assert night.chain.used_by is None
    assert night.disk.write_now(0, b"x"), "the guests are released"


@pytest.mark.parametrize("mode", ["use", "new", "keep"])
def test_a_bitmap_that_goes_or_is_lost_while_a_session_is_armed_fails_the_arming(mode: str) -> None:
    @simulated
    async def run() -> None:
        for lost in (True, False):
            night = Night()
            night.device.gate("write")
            write = asyncio.ensure_future(night.write(0))
            await night.device.reached("write")
            arming = asyncio.ensure_future(night.arm(mode))
            await settle()
            if lost:
                night.chain.lost = "a test"
                expected = errno.EINVAL
            elif mode == "keep":
                night.disk.remove_bitmap("chain")
                expected = errno.ENOENT
            else:
                night.device.open()
                assert (await arming).state == "active"
                continue
            night.device.open()
            assert await errno_of(arming) == expected
            await write

    run()


@simulated
async def test_a_bitmap_may_be_coarser_or_finer_than_the_clusters() -> None:
    for granularity, expected in ((4 * CLUSTER, "11110000"), (CLUSTER, "00110000")):
        night = Night(granularity)
        await night.write(2)
        fleece = (await night.arm("use", cluster_size=2 * CLUSTER)).fleeces[0]
        whole = "".join(pair[0] for pair in zip(expected[::2], expected[1::2], strict=True))
        assert str(fleece.access) == str(fleece.copy) == whole


@simulated
async def test_the_buffers_are_let_go_of_once_nothing_is_in_flight() -> None:
    night = Night(bitmap=False)
    session = await night.arm("new")
    night.temps[0].gate("write")
    write = asyncio.ensure_future(night.write(1))
    call = await night.temps[0].reached("write")
    session.finish()
    await write
    closing = asyncio.ensure_future(session.wait_closed())
    await settle()
    (bits,) = night.store.fleece_bits
    assert not bits.closed
    call.go()
    await closing
    assert bits.closed
    bitmap = night.disk.remove_bitmap("chain")
    bitmap.close()
    assert night.store.recording_bits[0].closed


@simulated
async def test_a_trim_leaves_the_own_bits_alone() -> None:
    night = Night()
    await night.write(1, 2)
    fleece = (await night.arm("use")).fleeces[0]
    await fleece.trim(CLUSTER, CLUSTER)
    assert fleece.own is not None
    assert (str(fleece.access), str(fleece.own.bitmap)) == ("00100000", "01100000")


@simulated
async def test_a_bitmap_in_use_is_not_cleared() -> None:
    night = Night()
    session = await night.arm("use")
    with pytest.raises(OSError, match="chain is used by session nightly"):
        clear(night.chain)
    session.finish()
    clear(night.chain)
    assert night.chain.since is None


@simulated
async def test_what_cannot_be_read_says_whether_it_was_released_or_never_there() -> None:
    night = Night()
    await night.write(1, 2)
    fleece = (await night.arm("use")).fleeces[0]
    await fleece.trim(CLUSTER, CLUSTER)
    with pytest.raises(OSError, match=f"offset {CLUSTER} was released, by a TRIM") as caught:
        await fleece.read(CLUSTER, 2 * CLUSTER)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(
        OSError, match=f"offset {3 * CLUSTER} is outside of the session's bitmap chain"
    ) as caught:
        await fleece.read(2 * CLUSTER, 2 * CLUSTER)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="offset 0 is outside"):
        fleece.read_now(0, 1)


@pytest.mark.parametrize("mode", ["use", "keep"])
def test_the_dirty_map_is_the_same_for_the_sessions_whole_life(mode: str) -> None:
    @simulated
    async def run() -> None:
        night = Night()
        await night.write(0, 2, 3)
        session = await night.arm(mode)
        fleece = session.fleeces[0]
        told = [(CLUSTER, 1), (CLUSTER, 0), (2 * CLUSTER, 1), (4 * CLUSTER, 0)]
        assert fleece.dirty_status(0, night.disk.size) == told
        await night.write(1, 5)
        await fleece.trim(0, 3 * CLUSTER)
        assert fleece.dirty_status(0, night.disk.size) == told
        assert fleece.dirty_status(CLUSTER - 1, 2) == [(1, 1), (1, 0)]
        session.finish()
        with pytest.raises(OSError, match="finished"):
            fleece.dirty_status(0, 1)

    run()


@simulated
async def test_a_dirty_map_of_very_many_extents_ends_early() -> None:
    night = Night()
    await night.write(0, 2, 4)
    fleece = (await night.arm("use")).fleeces[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_status, "STATUS_EXTENTS_MAX", 2)
        assert fleece.dirty_status(0, night.disk.size) == [(CLUSTER, n) for n in (1, 0, 1)]


@simulated
async def test_what_is_outside_of_the_bitmap_counts_as_data_and_cannot_be_read() -> None:
    night = Night()
    night.device.content[:] = bytes(night.disk.size)
    night.device.space.clear()
    await night.disk.write_zeroes(CLUSTER, CLUSTER)
    fleece = (await night.arm("use")).fleeces[0]
    rest = night.disk.size - 2 * CLUSTER
    assert await fleece.status(0, night.disk.size) == [(CLUSTER, 0), (CLUSTER, 3), (rest, 0)]
    assert fleece.access_status(0, night.disk.size) == [(CLUSTER, 0), (CLUSTER, 1), (rest, 0)]
