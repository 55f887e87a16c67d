"""Temp images whose space was taken in advance, and those that can be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.fleece import Fleece
from fleecenbd.engine.resizing import is_lost, resized
from fleecenbd.engine.session import Guests, SessionOptions, arm
from fleecenbd.engine.state import BREAK_GUEST_WRITE, BREAK_SNAPSHOT
from fleecenbd.storage.losing import Losing
from tests.simulation.gated import GatedDevice

from .scene import CLUSTER, Scene, errno_of, read, simulated, trim


class Preallocated(GatedDevice):
    holds_space = True


class Elsewhere(GatedDevice):
    on_lost: Callable[[str], None] | None = None


async def _arm(
    scene: Scene,
    kind: type[GatedDevice],
    guests: Guests | None = None,
    made: list[GatedDevice] | None = None,
    **options: object,
) -> Fleece:
    async def make_temp(disk: Disk, cluster_size: int, session_id: str) -> GatedDevice:
        temp = kind("temp", disk.size)
        if made is not None:
            made.append(temp)
        return temp

    session = await arm(
        "s",
        [scene.disk],
        SessionOptions(cluster_size=CLUSTER, **options),  # type: ignore[arg-type]
        make_temp,
        clock=asyncio.get_running_loop().time,
        guests=guests,
    )
    return session.fleeces[0]


class Meanwhile:
    """Guests (engine.session.Guests): what happens while they are being put at rest."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens
        self.thawed = 0

    async def freeze(self) -> None:
        self.happens()

    def thaw(self) -> None:
        self.thawed += 1


@simulated
async def test_what_is_released_of_a_preallocated_image_is_freed_whether_written_or_not() -> None:
    scene = Scene(8)
    fleece = await _arm(scene, Preallocated)
    assert fleece.stats.temp_clusters == 8
    await scene.write(0, 2)
    await trim(fleece, 0, 6)
    assert isinstance(fleece.temp, GatedDevice)
    assert fleece.temp.log[-1] == f"trim 0+{6 * CLUSTER}"
    assert fleece.stats.temp_clusters == 2
    assert await read(fleece, 6, 2) == scene.old(6, 2)


@simulated
async def test_zeroes_are_written_to_a_preallocated_image() -> None:
    scene = Scene(8)
    await scene.disk.write(0, bytes(CLUSTER))
    fleece = await _arm(scene, Preallocated)
    await scene.write(0)
    assert isinstance(fleece.temp, GatedDevice)
    assert f"zero 0+{CLUSTER}" in fleece.temp.log
    assert await read(fleece, 0) == bytes(CLUSTER)


@simulated
async def test_a_limit_of_a_preallocated_image_means_nothing_and_is_refused() -> None:
    scene = Scene(8)
    with pytest.raises(OSError, match="takes all of its space at the start"):
        await _arm(scene, Preallocated, temp_limit=4 * CLUSTER)
    assert scene.disk.fleeces == []


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE])
def test_an_image_that_is_lost_breaks_its_session_and_no_guest_waits(policy: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(8)
        fleece = await _arm(scene, Elsewhere, on_cbw_error=policy)
        temp = fleece.temp
        assert isinstance(temp, Elsewhere)
        await scene.write(0)
        temp.gate("write")
        waiting = scene.write(1)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert temp.on_lost is not None
        temp.on_lost("it went away")
        await waiting
        assert scene.now(1) == b"\x77" * CLUSTER
        assert fleece.broken == "its temp image is lost: it went away"
        assert await errno_of(read(fleece, 0)) == 5
        await scene.write(2)
        temp.on_lost("again")
        assert fleece.broken == "its temp image is lost: it went away"
        temp.open("write")

    run()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("temp", "its temp image is lost: it went away"),
        ("disk", "is lost: it went away"),
        ("size", "bytes now, and"),
        ("size and back", "had another size in between"),
    ],
)
def test_what_is_lost_while_a_session_is_armed_fails_the_arming(what: str, text: str) -> None:
    @simulated
    async def run() -> None:
        scene = Scene(8)
        made: list[GatedDevice] = []

        def happens() -> None:
            if what == "temp":
                assert isinstance(made[0], Elsewhere)
                assert made[0].on_lost is not None
                made[0].on_lost("it went away")
            elif what == "disk":
                is_lost(scene.disk, "it went away")
            else:
                resized(scene.disk, scene.disk.size - CLUSTER)
                if what == "size and back":
                    resized(scene.disk, scene.disk.size)

        guests = Meanwhile(happens)
        with pytest.raises(OSError, match=text):
            await _arm(scene, Elsewhere, guests, made)
        assert (scene.disk.fleeces, made[0].closed, guests.thawed) == ([], True, 1)
        await scene.write(0)

    run()


@simulated
async def test_an_image_that_is_lost_before_its_session_is_there_fails_the_arming() -> None:
    class Gone(Losing, Elsewhere):  # type: ignore[misc]
        def __init__(self, name: str, size: int) -> None:
            super().__init__(name, size)
            self._lose("it went away")

    scene = Scene(8)
    guests = Meanwhile(lambda: None)
    with pytest.raises(OSError, match="its temp image is lost: it went away"):
        await _arm(scene, Gone, guests)
    assert (scene.disk.fleeces, guests.thawed) == ([], 0)


@simulated
async def test_a_disk_that_is_lost_before_it_is_one_says_so() -> None:
    class Gone(Losing, GatedDevice):
        pass

    image = Gone("image", 8 * CLUSTER)
    image._lose("it went away")
    assert Disk("vda", image).lost == "it went away"
