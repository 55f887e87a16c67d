"""Images that change their size: what the server makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.resizing import is_lost
from fleecenbd.server.size_watch import SizeWatch
from tests.server.controlled import Control, controlled
from tests.server.room import CLUSTER, pattern
from tests.simulation.gated import GatedDevice

SIZE = 16 * CLUSTER


class Image(GatedDevice):
    """Says what it is told to; ``answer`` is cleared where it hangs."""

    def __init__(self, name: str) -> None:
        super().__init__(name, SIZE, pattern(SIZE))
        self.now = SIZE
        self.asked = 0
        self.ends: list[int | None] = []
        self.answer = asyncio.Event()
        self.answer.set()

    async def present_size(self) -> int:
        self.asked += 1
        await self.answer.wait()
        return self.now

    def limit(self, end: int | None) -> None:
        self.ends.append(end)


class Watched:
    def __init__(self, control: Control) -> None:
        self.control = control
        self.server = control.served.server
        self.images = [self.add("a"), self.add("b")]
        self.events = self.server.events.listen()
        self.watch = SizeWatch(self.server)
        self.watch.start()

    def add(self, name: str) -> Image:
        image = Image(name)
        self.control.served.devices[name] = image
        self.server.add_disk(Disk(name, image))
        return image

    async def look(self) -> None:
        self.watch.look()
        for _ in range(5):
            await asyncio.sleep(0)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events._waiting if event["event"] == kind]


@asynccontextmanager
async def watching() -> AsyncIterator[Watched]:
    async with controlled() as control:
        watched = Watched(control)
        yield watched
        watched.watch.stop()


async def test_a_change_is_told_once_and_breaks_the_session_of_that_disk() -> None:
    async with watching() as watched:
        a, b = watched.images
        await watched.control.put("sessions/n", {"disks": ["a"]})
        await watched.control.put("sessions/m", {"disks": ["b"]})
        a.now = SIZE + CLUSTER
        for _ in range(3):
            await watched.look()
        (event,) = watched.told("disk-resized")
        assert (event["disk"], event["size"], event["image_size"]) == ("a", SIZE, SIZE + CLUSTER)
        assert watched.server.sessions["n"].state == "broken"
        assert watched.server.sessions["m"].state == "active"
        assert (set(a.ends), b.ends) == ({None}, [])
        a.now = CLUSTER
        await watched.look()
        assert len(watched.told("disk-resized")) == 2
        assert a.ends[-1] == CLUSTER


async def test_what_was_being_begun_meanwhile_breaks_too() -> None:
    async with watching() as watched:
        a, _ = watched.images
        a.now = CLUSTER
        await watched.look()
        status, message = await watched.control.refused("PUT", "sessions/n")
        assert status == 422
        assert f"the image of a has {CLUSTER} bytes now, and {SIZE} when it was opened" in message
        status, _ = await watched.control.refused("PUT", "disks/a/bitmaps/c")
        assert status == 422
        disk = watched.server.disks["a"]
        disk.image_size = SIZE  # as if the session had been let in a moment before
        await watched.control.put("sessions/n")
        disk.image_size = CLUSTER
        await watched.look()
        assert watched.server.sessions["n"].state == "broken"


async def test_bitmaps_are_lost_and_told_once() -> None:
    async with watching() as watched:
        a, _ = watched.images
        await watched.control.put("disks/a/bitmaps/c")
        await watched.control.put("disks/b/bitmaps/c")
        a.now = CLUSTER
        for _ in range(3):
            await watched.look()
        (event,) = watched.told("bitmap-lost")
        assert (event["disk"], event["bitmap"]) == ("a", "c")
        assert watched.server.disks["a"].bitmaps["c"].lost == event["reason"]
        assert watched.server.disks["b"].bitmaps["c"].lost is None
        a.now = SIZE
        await watched.look()
        assert watched.server.disks["a"].bitmaps["c"].lost == event["reason"]
        await watched.control.put("sessions/n", {"bitmap": "c", "bitmap_mode": "new"})


async def test_a_disk_that_is_lost_is_told_once_with_its_bitmaps() -> None:
    async with watching() as watched:
        a, _ = watched.images
        await watched.control.put("disks/a/bitmaps/c")
        await watched.control.put("disks/b/bitmaps/c")
        is_lost(watched.server.disks["a"], "its child has ended")
        for _ in range(3):
            await watched.look()
        assert a.asked == 0
        (event,) = watched.told("disk-lost")
        assert (event["disk"], event["reason"]) == ("a", "its child has ended")
        (event,) = watched.told("bitmap-lost")
        assert (event["disk"], event["bitmap"]) == ("a", "c")
        assert event["reason"] == "disk a is lost: its child has ended"
        assert watched.server.disks["a"].bitmaps["c"].lost == event["reason"]
        assert watched.server.disks["b"].bitmaps["c"].lost is None
        # What cannot be synced any more is removed all the same, and comes back whole.
        a.gate("flush")
        await watched.server.remove_disk("a")
        watched.add("a")
        await watched.look()
        assert len(watched.told("disk-lost")) == 1


async def test_a_disk_that_is_away_is_told_once_and_once_that_it_is_back() -> None:
    class Far(Image):
        is_usable = True

    async with watching() as watched:
        far = Far("far")
        watched.control.served.devices["far"] = far
        watched.server.add_disk(Disk("far", far))
        for away in (False, True, True, False, False, True):
            far.is_usable = not away
            await watched.look()
            assert (await watched.control.get("disks/far"))["away"] == away
        begun = await watched.control.put("sessions/n", {"disks": ["far"]})
        assert "far does not answer: reads of far wait for it" in begun["warnings"]
        is_lost(watched.server.disks["far"], "it is gone")
        await watched.look()
        about = {"disk": "far", "image": "far"}
        for kind, count in (("disk-away", 2), ("disk-back", 1), ("disk-lost", 1)):
            told = watched.told(kind)
            assert len(told) == count
            assert kind == "disk-lost" or all(event.items() >= about.items() for event in told)


async def test_a_disk_that_hangs_is_asked_once_and_holds_up_no_other() -> None:
    async with watching() as watched:
        a, b = watched.images
        a.answer.clear()
        for _ in range(5):
            await watched.look()
        assert (a.asked, b.asked) == (1, 5)
        b.now = CLUSTER
        await watched.look()
        assert [event["disk"] for event in watched.told("disk-resized")] == ["b"]
        a.now = CLUSTER
        await watched.server.remove_disk("a")
        a.answer.set()
        await watched.look()
        assert [event["disk"] for event in watched.told("disk-resized")] == ["b"], "it is not ours"
