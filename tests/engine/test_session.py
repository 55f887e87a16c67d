"""Sessions: options, cluster sizes, armed all or nothing, and their ends."""

from __future__ import annotations

import asyncio
import errno
import uuid

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import (
    CLUSTER_SIZE_MAX,
    Session,
    SessionOptions,
    arm,
    default_cluster_size,
)
from fleecenbd.engine.state import (
    BITMAP_CLUSTERS_MAX,
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    CLUSTER_SIZE_MIN,
)
from tests.simulation.gated import GatedDevice
from tests.simulation.loop import settle

from .scene import CLUSTER, Scene, errno_of, simulated


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"on_cbw_error": "panic"},
            "one of break-snapshot, break-guest-write, throttle, not panic",
        ),
        ({"cbw_timeout_s": -0.1}, "cbw_timeout is a number of seconds, not -0.1"),
        ({"cbw_timeout_s": float("inf")}, "cbw_timeout is a number of seconds, not inf"),
        ({"cbw_timeout_s": float("nan")}, "cbw_timeout is a number of seconds, not nan"),
        ({"temp_limit": -1}, "temp_limit is a number of bytes, not -1"),
        ({"temp_reserve": -1}, "temp_reserve is a number of bytes, not -1"),
        ({"cluster_size": 5000}, "from 4096 to 33554432, not 5000"),
        ({"cluster_size": 0}, "from 4096 to 33554432, not 0"),
        ({"cluster_size": CLUSTER_SIZE_MIN // 2}, "not 2048"),
        ({"cluster_size": CLUSTER_SIZE_MAX * 2}, "not 67108864"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_reason(
    options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        SessionOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"on_cbw_error": BREAK_SNAPSHOT},
        {"on_cbw_error": BREAK_GUEST_WRITE},
        {"cbw_timeout_s": 0.0},
        {"temp_limit": 0},
        {"cluster_size": CLUSTER_SIZE_MIN},
        {"cluster_size": CLUSTER_SIZE_MAX},
    ],
)
def test_options_at_their_limits_are_taken(options: dict[str, object]) -> None:
    (name,) = options
    made = SessionOptions(**options)  # type: ignore[arg-type]
    assert getattr(made, name) == options[name]


def test_the_default_cluster_size_is_the_smallest_that_keeps_a_bitmap_small() -> None:
    limit = BITMAP_CLUSTERS_MAX * CLUSTER_SIZE_MIN
    assert default_cluster_size(1) == 4096
    assert default_cluster_size(limit) == 4096
    assert default_cluster_size(limit + 1) == 8192
    assert default_cluster_size(2 * limit) == 8192
    assert default_cluster_size(2 * limit + 1) == 16384


class Temps:
    """Makes temp images, and keeps what it was asked for."""

    def __init__(self, *, hole_size: int = CLUSTER, clusters_more: int = 0) -> None:
        self.hole_size = hole_size
        self.clusters_more = clusters_more
        self.asked: list[tuple[Disk, int]] = []
        self.made: list[GatedDevice] = []

    async def make(self, disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
        self.asked.append((disk, cluster_size))
        whole = max(cluster_size, self.hole_size)
        size = (-(-disk.size // whole) + self.clusters_more) * whole
        self.made.append(GatedDevice(f"temp {disk.name}", size, hole_size=self.hole_size))
        return self.made[-1]


def _disk(name: str, size: int = 8 * CLUSTER) -> Disk:
    return Disk(name, GatedDevice(name, size, b"x" * size))


async def _arm(disks: list[Disk], temps: Temps, **options: object) -> Session:
    return await arm(
        "nightly",
        disks,
        SessionOptions(**options),  # type: ignore[arg-type]
        temps.make,
        clock=lambda: 1234.5,
    )


@simulated
async def test_a_session_knows_what_it_was_armed_with() -> None:
    disks, temps = [_disk("vda"), _disk("vdb", 3 * CLUSTER + 512)], Temps()
    session = await _arm(
        disks, temps, on_cbw_error=BREAK_GUEST_WRITE, cbw_timeout_s=7.0, temp_limit=CLUSTER
    )
    assert temps.asked == [(disks[0], CLUSTER), (disks[1], CLUSTER)]
    assert (session.name, session.armed_at, session.pause_s) == ("nightly", 1234.5, 0.0)
    assert session.options.temp_limit == CLUSTER
    assert uuid.UUID(session.id).version == 4
    assert str(uuid.UUID(session.id)) == session.id
    assert uuid.UUID(session.id).variant == uuid.RFC_4122
    for fleece, disk, temp in zip(session.fleeces, disks, temps.made, strict=True):
        assert fleece.name == f"{disk.name}@nightly"
        assert fleece.disk is disk
        assert fleece.temp is temp
        assert disk.fleeces == [fleece]
        assert fleece.size == disk.size
        assert fleece.cluster_size == CLUSTER
        state = fleece.state
        assert (state.on_cbw_error, state.cbw_timeout_s, state.temp_limit) == (
            BREAK_GUEST_WRITE,
            7.0,
            CLUSTER,
        )


@simulated
async def test_sessions_have_ids_of_their_own() -> None:
    disk = _disk("vda")
    first, second = await _arm([disk], Temps()), await _arm([disk], Temps())
    assert first.id != second.id


@simulated
async def test_the_default_cluster_is_no_smaller_than_a_hole_of_the_temp_image() -> None:
    temps = Temps(hole_size=4 * CLUSTER)
    session = await _arm([_disk("vda")], temps)
    assert session.fleeces[0].cluster_size == 4 * CLUSTER
    assert temps.asked[0][1] == CLUSTER


@simulated
async def test_a_cluster_size_below_the_hole_of_the_temp_image_is_einval() -> None:
    disk, temps = _disk("vda"), Temps(hole_size=2 * CLUSTER)
    with pytest.raises(OSError, match="cluster size 4096 is below 8192") as caught:
        await _arm([disk], temps, cluster_size=CLUSTER)
    assert caught.value.errno == errno.EINVAL
    assert temps.made[0].closed
    assert disk.fleeces == []
    assert (await _arm([disk], temps, cluster_size=2 * CLUSTER)).state == "active"


@simulated
async def test_a_temp_limit_in_which_no_cluster_fits_is_einval() -> None:
    # The default cluster size of this temp image is known only once it was made.
    disk, temps = _disk("vda"), Temps(hole_size=4 * CLUSTER)
    with pytest.raises(OSError, match=r"limit of 16383 bytes .* one cluster of 16384") as caught:
        await _arm([disk], temps, temp_limit=4 * CLUSTER - 1)
    assert caught.value.errno == errno.EINVAL
    assert temps.made[0].closed
    assert disk.fleeces == []
    await _arm([disk], temps, temp_limit=4 * CLUSTER)
    assert len(disk.fleeces) == 1


@simulated
async def test_a_temp_image_that_is_too_small_is_refused_and_closed() -> None:
    disks, temps = [_disk("vda")], Temps(clusters_more=-1)
    with pytest.raises(ValueError, match="the temp image of vda@nightly is smaller"):
        await _arm(disks, temps)
    assert temps.made[0].closed
    assert (await _arm(disks, Temps(clusters_more=1))).state == "active"


@simulated
async def test_a_disk_whose_temp_image_cannot_be_made_leaves_the_others_as_they_were() -> None:
    disks, temps = [_disk("vda"), _disk("vdb")], Temps()

    async def make(disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
        if disk.name == "vdb":
            raise OSError(errno.ENOSPC, "full")
        return await temps.make(disk, cluster_size, session_id)

    assert (
        await errno_of(arm("s", disks, SessionOptions(), make, clock=lambda: 0.0)) == errno.ENOSPC
    )
    assert temps.made[0].closed
    assert [disk.fleeces for disk in disks] == [[], []]
    await disks[0].write(0, b"goes on")


@simulated
async def test_the_pause_is_as_long_as_writes_were_held() -> None:
    scene = Scene()
    scene.active.gate("write")
    write = scene.write(0)
    call = await scene.active.reached("write")
    arming = asyncio.ensure_future(scene.arm())
    await asyncio.sleep(1.25)
    call.go()
    await asyncio.gather(write, arming)
    assert scene.session is not None
    assert scene.session.pause_s == pytest.approx(1.25)


@simulated
async def test_an_arming_that_gives_up_says_which_disk_and_how_long() -> None:
    scene = Scene()
    scene.active.gate("write")
    write = scene.write(0)
    await scene.active.reached("write")
    with pytest.raises(OSError, match="writes to vda were still in flight after 5 s") as caught:
        await scene.arm()
    assert caught.value.errno == errno.ETIMEDOUT
    assert asyncio.get_running_loop().time() == pytest.approx(5)
    scene.active.open()
    await write


@simulated
async def test_a_session_is_active_until_one_of_its_disks_breaks() -> None:
    disks = [_disk("vda"), _disk("vdb")]
    session = await _arm(disks, Temps())
    assert (session.state, session.failed) == ("active", False)
    session.fleeces[1].state.break_session("a test")
    assert session.state == "broken"
    session.finish()
    assert (session.state, session.failed) == ("finished", True)
    assert [disk.fleeces for disk in disks] == [[], []]


@pytest.mark.parametrize("failed", [False, True])
def test_a_session_that_finishes_is_a_success_unless_somebody_says_no(failed: bool) -> None:
    @simulated
    async def run() -> None:
        session = await _arm([_disk("vda")], Temps())
        session.finish(failed=failed)
        assert (session.state, session.failed) == ("finished", failed)
        session.fleeces[0].finish()
        assert session.fleeces[0].finished

    run()


@simulated
async def test_a_session_is_closed_when_the_last_copy_no_longer_reads_the_disk() -> None:
    scene = Scene()
    await scene.arm()
    scene.active.gate("read")
    write = scene.write(0)
    call = await scene.active.reached("read")
    assert scene.session is not None
    scene.session.finish()
    await write
    closing = asyncio.ensure_future(scene.session.wait_closed())
    await settle()
    assert not closing.done()
    call.go()
    await closing


@simulated
async def test_a_session_is_closed_when_the_last_call_on_every_temp_image_has_ended() -> None:
    disks, temps = [_disk("vda"), _disk("vdb")], Temps()
    session = await _arm(disks, temps)
    temps.made[1].gate("write")
    write = asyncio.ensure_future(disks[1].write(0, b"y" * CLUSTER))
    call = await temps.made[1].reached("write")
    session.finish()
    await write
    closing = asyncio.ensure_future(session.wait_closed())
    await settle()
    assert not closing.done()
    call.go()
    await closing
    assert all(temp.closed for temp in temps.made)
