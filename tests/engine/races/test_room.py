"""The reserve of the temp image's file system, and what throttle makes of a guest's writes."""

from __future__ import annotations

import asyncio
import errno

import pytest

from fleecenbd.engine import room
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.room import RESERVE_MIN, default_reserve
from fleecenbd.engine.session import SessionOptions, arm
from fleecenbd.engine.state import BREAK_GUEST_WRITE, BREAK_SNAPSHOT, THROTTLE
from tests.engine.scene import CLUSTER, Scene, errno_of, read, simulated, trim
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

GIB = 1 << 30


class Roomy(GatedDevice):
    """On a file system with ``free`` clusters above the reserve; ``answers`` is cleared where it
    hangs."""

    reserve = 10

    def __init__(self, name: str, size: int, free: int) -> None:
        super().__init__(name, size)
        self.free = free
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def room(self) -> tuple[int, int]:
        self.asked += 1
        free = self.free
        await self.answers.wait()
        return (free + self.reserve) * CLUSTER, 1000 * CLUSTER


async def _arm(scene: Scene, free: int, name: str = "s", **options: object) -> tuple[Fleece, Roomy]:
    made: list[Roomy] = []

    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
        made.append(Roomy("temp", -(-disk.size // cluster_size) * cluster_size, free))
        return made[0]

    session = await arm(
        name,
        [scene.disk],
        SessionOptions(
            cluster_size=CLUSTER,
            temp_reserve=Roomy.reserve * CLUSTER,
            **options,  # type: ignore[arg-type]
        ),
        make_temp,
        clock=asyncio.get_running_loop().time,
    )
    return session.fleeces[0], made[0]


def test_by_default_a_twentieth_is_kept_and_a_gibibyte_at_least() -> None:
    assert RESERVE_MIN == GIB
    assert default_reserve(GIB) == GIB
    assert default_reserve(20 * GIB) == GIB
    assert default_reserve(100 * GIB) == 5 * GIB


@simulated
async def test_without_room_for_a_cluster_no_session_begins() -> None:
    scene = Scene(8)
    with pytest.raises(OSError, match=r"40960 bytes free of 4096000, and 40960 are its") as refused:
        await _arm(scene, 0)
    assert refused.value.errno == errno.ENOSPC
    assert "--temp-dir" in str(refused.value)
    assert scene.disk.fleeces == []
    await scene.write(0)


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE, THROTTLE])
def test_a_copy_that_would_take_of_the_reserve_fails_as_a_full_temp_image(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(8)
        fleece, temp = await _arm(scene, 2, on_cbw_error=policy)
        await scene.write(0, 2)
        temp.free = 0  # as the file system sees it
        number = await errno_of(scene.write(2, 3))
        assert temp.asked == 2, "at arming, and before it failed"
        cause = "the file system of vda@s's temp image has 40960 bytes free, and 40960 are its"
        if policy == BREAK_GUEST_WRITE:
            assert number == errno.EIO
            assert fleece.broken is None
            assert scene.now(2) == scene.old(2)
            assert await read(fleece, 0, 8) == scene.old(0, 8)
        else:
            assert number is None
            assert fleece.broken is not None
            assert cause in fleece.broken
            assert scene.now(2) == b"\x77" * CLUSTER
        assert fleece.stats.limit_hits == 1

    run()


@simulated
async def test_a_copy_that_finds_room_after_all_goes_on() -> None:
    scene = Scene(8)
    fleece, temp = await _arm(scene, 2)
    await scene.write(0, 2)
    temp.free = 3  # others have freed some
    await scene.write(2, 3)
    assert (fleece.broken, temp.asked, fleece.stats.limit_hits) == (None, 2, 0)
    assert await read(fleece, 0, 8) == scene.old(0, 8)
    assert fleece.state.room.left == 0


@simulated
async def test_what_was_asked_before_is_not_the_last_word() -> None:
    """A look was under way when others freed some: a copy that needs it has it asked anew."""
    scene = Scene(8)
    fleece, temp = await _arm(scene, 2)
    await scene.write(0, 2)
    temp.free = 0
    temp.answers.clear()
    look = asyncio.ensure_future(fleece.state.room.look())
    await settle()
    temp.free = 3
    waiting = [scene.write(2), scene.write(3)]
    await settle()
    temp.answers.set()
    await asyncio.gather(look, *waiting)
    assert (fleece.broken, temp.asked) == (None, 3)
    assert await read(fleece, 0, 8) == scene.old(0, 8)


@simulated
async def test_what_is_charged_while_a_look_is_under_way_counts() -> None:
    """The file system may have answered before it got that."""
    scene = Scene(8)
    fleece, temp = await _arm(scene, 4)
    state = fleece.state
    temp.free = 5
    temp.answers.clear()
    look = asyncio.ensure_future(state.room.look())
    await settle()
    await scene.write(0, 3)
    assert state.room.left == 1
    temp.answers.set()
    await look
    assert state.room.left == 2
    await state.room.look()
    assert state.room.left == 5


@simulated
async def test_a_temp_write_in_flight_counts_for_a_look() -> None:
    scene = Scene(8)
    fleece, temp = await _arm(scene, 4)
    temp.gate("write")
    waiting = scene.write(0, 3)
    await temp.reached("write")
    await fleece.state.room.look()
    assert fleece.state.room.left == 1
    temp.open("write")
    await waiting


@simulated
async def test_one_look_at_a_time_and_a_failure_changes_nothing() -> None:
    scene = Scene(8)
    fleece, temp = await _arm(scene, 4)
    temp.answers.clear()
    looks = [asyncio.ensure_future(fleece.state.room.look()) for _ in range(3)]
    await settle()
    looks[0].cancel()
    assert temp.asked == 2
    temp.answers.set()
    await asyncio.gather(*looks[1:])

    async def fail() -> tuple[int, int]:
        raise OSError(errno.EIO, "a test")

    temp.room = fail  # type: ignore[method-assign]
    await fleece.state.room.look()
    assert fleece.state.room.left == 4


# -- throttle --------------------------------------------------------------------------------------


async def _took(write: asyncio.Future[None]) -> float:
    loop = asyncio.get_running_loop()
    started = loop.time()
    await write
    return loop.time() - started


async def _full(used: int, **options: object) -> tuple[Scene, Fleece]:
    """A session with a limit of 20 clusters that holds so many; low from 16 on."""
    scene = Scene(40)
    options.setdefault("on_cbw_error", THROTTLE)
    fleece = await scene.arm(temp_limit=20 * CLUSTER, **options)
    for cluster in range(used):
        fleece.state.charge(cluster, cluster + 1)  # as copies do, without their delays
        fleece.copy.bits[cluster] = 0
        fleece.done.bits[cluster] = 1
        fleece.temp.content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = scene.old(cluster)
    return scene, fleece


@pytest.mark.parametrize(
    ("used", "seconds"), [(0, 0.0), (16, 0.0), (17, 0.025), (18, 0.05), (19, 0.075)]
)
def test_a_write_that_copies_waits_in_proportion_to_what_is_gone_of_the_rest(
    used: int, seconds: float
) -> None:
    @simulated
    async def run() -> None:
        scene, fleece = await _full(used)
        assert await _took(scene.write(30)) == pytest.approx(seconds)
        assert fleece.stats.throttled == (seconds > 0)
        assert fleece.stats.throttled_s == pytest.approx(seconds)
        assert fleece.stats.guest_wait_max_s == pytest.approx(seconds), "and is told as a wait"
        assert await read(fleece, 0, 40) == scene.old(0, 40)
        if used:
            assert await _took(scene.write(0)) == 0, "nothing is copied"
        assert await _took(scene.write(30)) == 0

    run()


@simulated
async def test_when_it_is_full_a_write_waits_the_most_and_then_the_session_breaks() -> None:
    scene, fleece = await _full(20)
    assert await _took(scene.write(30)) == pytest.approx(room.THROTTLE_MAX_S)
    assert fleece.broken is not None
    assert "reached its limit" in fleece.broken
    assert await _took(scene.write(31)) == 0


@simulated
async def test_the_other_policies_delay_nothing() -> None:
    for policy in (BREAK_SNAPSHOT, BREAK_GUEST_WRITE):
        scene, fleece = await _full(19, on_cbw_error=policy)
        assert await _took(scene.write(30)) == 0
        assert fleece.stats.throttled == 0


@pytest.mark.parametrize("timeout_s", [0.02, 0.2, 0.0])
def test_a_delay_leaves_the_copy_half_of_the_request_s_time(timeout_s: float) -> None:
    @simulated
    async def run() -> None:
        scene, fleece = await _full(19, cbw_timeout_s=timeout_s)
        assert isinstance(fleece.temp, GatedDevice)
        fleece.temp.gate("write")
        write = scene.write(30)
        expected = min(0.075, timeout_s / 2) if timeout_s else 0.075
        await fleece.temp.reached("write")
        assert asyncio.get_running_loop().time() == pytest.approx(expected)
        if timeout_s:
            assert await _took(write) + expected == pytest.approx(timeout_s)
            assert fleece.broken is not None
            assert f"over {timeout_s:g} s" in fleece.broken
        fleece.temp.open("write")
        await write

    run()


@simulated
async def test_a_release_of_what_it_writes_ends_a_delay_at_once() -> None:
    scene, fleece = await _full(19)
    write = scene.write(30, 2)
    await asyncio.sleep(0.01)
    assert await _took(trim(fleece, 30)) == 0
    await settle()
    assert not write.done(), "half of it has to be copied"
    await trim(fleece, 31)
    await settle()
    assert write.done()
    assert fleece.stats.copies_started == 0


@simulated
async def test_a_release_elsewhere_makes_delays_shorter_and_ends_them() -> None:
    scene, fleece = await _full(19)
    write = asyncio.ensure_future(_took(scene.write(30)))
    await asyncio.sleep(0.03)
    await trim(fleece, 0, 1)  # 18 are left: 50 ms
    assert await write == pytest.approx(0.05)
    scene, fleece = await _full(19)
    write = asyncio.ensure_future(_took(scene.write(30)))
    await asyncio.sleep(0.03)
    await trim(fleece, 0, 4)
    assert await write == pytest.approx(0.03)


@pytest.mark.parametrize("during", [False, True], ids=["after a look", "during one"])
def test_a_release_shortens_delays_where_the_reserve_is_the_limit(during: bool) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(40)
        fleece, temp = await _arm(scene, 20, on_cbw_error=THROTTLE)
        for cluster in range(20):
            fleece.state.charge(cluster, cluster + 1)
            fleece.copy.bits[cluster] = 0
            fleece.done.bits[cluster] = 1
        temp.free = 0
        await fleece.state.room.look()
        assert fleece.state.room.delay_s() == room.THROTTLE_MAX_S
        waiting = asyncio.ensure_future(_took(scene.write(30)))
        await settle()
        if during:  # it is answered as of before
            temp.answers.clear()
            looking = asyncio.ensure_future(fleece.state.room.look())
            await settle()
        temp.free = 15
        await trim(fleece, 0, 15)
        temp.answers.set()
        await settle()
        assert await waiting < 0.01
        assert fleece.broken is None
        if during:
            await looking

    run()


@pytest.mark.parametrize("end", ["finish", "break"])
def test_the_end_of_the_session_ends_a_delay(end: str) -> None:
    @simulated
    async def run() -> None:
        scene, fleece = await _full(19)
        write = asyncio.ensure_future(_took(scene.write(30)))
        await asyncio.sleep(0.01)
        if end == "finish":
            fleece.finish()
        else:
            fleece.state.break_session("a test")
        assert await write == pytest.approx(0.01)

    run()


@simulated
async def test_a_cancelled_delay_leaves_nothing_behind() -> None:
    scene, fleece = await _full(19)
    write = scene.write(30)
    await asyncio.sleep(0.01)
    write.cancel()
    assert await errno_of_cancelled(write)
    assert len(fleece.state.guests) == 0
    assert fleece.copy.bits[30]
    await scene.write(30)


async def errno_of_cancelled(write: asyncio.Future[None]) -> bool:
    try:
        await write
    except asyncio.CancelledError:
        return True
    return False


@simulated
async def test_two_sessions_delay_at_the_same_time() -> None:
    scene = Scene(40)
    fleeces = [
        await scene.arm(name, temp_limit=20 * CLUSTER, on_cbw_error=THROTTLE) for name in "ab"
    ]
    for fleece, used in zip(fleeces, (18, 19), strict=True):
        fleece.state.charge(0, used)
        fleece.copy.bits[:used] = 0
        fleece.done.bits[:used] = 1
    assert await _took(scene.write(30)) == pytest.approx(0.075)
    assert [fleece.stats.throttled for fleece in fleeces] == [1, 1]
    for fleece in fleeces:
        assert await read(fleece, 30) == scene.old(30)


@simulated
async def test_a_session_s_time_is_not_spent_by_another_s_delay() -> None:
    scene, throttled = await _full(19)
    other = await scene.arm("other", cbw_timeout_s=0.05, on_cbw_error=BREAK_GUEST_WRITE)
    scene.active.log.clear()
    other.temp.gate("write")
    write = scene.write(30)
    await other.temp.reached("write")
    assert asyncio.get_running_loop().time() == pytest.approx(0), "it copies at once"
    await asyncio.sleep(0.04)
    other.temp.open("write")
    await write
    assert asyncio.get_running_loop().time() == pytest.approx(0.075)
    assert (other.stats.timeouts, other.broken, throttled.broken) == (0, None, None)
    assert await _took(scene.write(31)) == pytest.approx(0.1), "as full as can be"
    assert await read(other, 0, 40) == scene.old(0, 40)


@simulated
async def test_nobody_else_waits_for_a_delayed_write() -> None:
    scene, fleece = await _full(19)
    delayed = scene.write(30)
    await settle()
    assert await _took(read(fleece, 0, 40)) == 0
    assert await _took(scene.write(0)) == 0
    assert await _took(trim(fleece, 35)) == 0
    assert await _took(asyncio.ensure_future(scene.disk.read(0, CLUSTER))) == 0
    assert not delayed.done()
    await delayed
