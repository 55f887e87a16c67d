"""Recording bitmaps over the control socket, and what a session makes of them."""

import errno
from typing import Any

import pytest

from fleecenbd.engine.store import MEMORY
from tests.nbd import wire
from tests.server.controlled import controlled
from tests.server.room import SIZE, pattern

GRANULARITY = 4096
BITMAP = "disks/vda/bitmaps/chain"
SMALL = {"granularity": GRANULARITY}


async def test_a_bitmap_records_from_when_it_was_added() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await guest.write(0, b"before")
        added = await control.put(BITMAP, SMALL)
        assert added["id"]
        assert {key: added[key] for key in added if key != "id"} == {
            "name": "chain",
            "granularity": GRANULARITY,
            "state": "good",
            "reason": None,
            "since": None,
            "dirty": 0,
            "used_by": None,
        }
        await guest.write(GRANULARITY - 1, b"xy")
        assert (await control.get(BITMAP))["dirty"] == 2 * GRANULARITY
        listed = (await control.get("disks/vda/bitmaps"))["bitmaps"]
        assert listed == (await control.get("disks/vda"))["bitmaps"] == [await control.get(BITMAP)]
        cleared = await control.call("POST", f"{BITMAP}/clear")
        assert (cleared.status, cleared.body["dirty"]) == (200, 0)
        assert await control.delete(BITMAP) is None
        assert await control.refused("GET", BITMAP) == (404, "vda has no bitmap called chain")


async def test_the_granularity_is_64_kib_where_nobody_says_otherwise() -> None:
    async with controlled() as control:
        assert (await control.put(BITMAP))["granularity"] == 64 << 10


async def test_bitmaps_of_a_disk_are_merged() -> None:
    async with controlled(size=1 << 20) as control:
        guest = await control.served.client("vda")
        await control.put("disks/vda/bitmaps/a", SMALL)
        await guest.write(0, b"x")
        await control.put("disks/vda/bitmaps/b", {"granularity": 2 * GRANULARITY})
        await guest.write(4 * GRANULARITY, b"x")
        merged = await control.call("POST", "disks/vda/bitmaps/b/merge", {"source": "a"})
        assert (merged.status, merged.body["dirty"]) == (200, 4 * GRANULARITY)
        assert (await control.get("disks/vda/bitmaps/a"))["dirty"] == 2 * GRANULARITY
        for source, status, words in (
            ("b", 422, "cannot be merged into itself"),
            ("c", 404, "vda has no bitmap called c"),
        ):
            refused = await control.refused("POST", "disks/vda/bitmaps/b/merge", {"source": source})
            assert refused[0] == status
            assert words in refused[1]
        assert (await control.refused("POST", "disks/vda/bitmaps/b/merge", {}))[0] == 422


async def _night(control: Any, **body: Any) -> dict[str, Any]:
    """Begin session n with the bitmap; what became of it."""
    answer = await control.put("sessions/n", {"bitmap": "chain", **body})
    found: dict[str, Any] = answer["disks"][0]["bitmap"]
    return found


async def test_a_chain_full_first_then_what_has_changed() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        own = await _night(control, bitmap_granularity=GRANULARITY)
        assert (own["mode"], own["made"]) == ("new", True)
        assert own["reason"] == "there was no such bitmap"
        assert (await control.get(BITMAP))["used_by"] == "n"
        await guest.write(0, b"x")
        first = await control.delete("sessions/n")
        assert first["disks"][0]["bitmap"] == own

        second = await _night(control)
        assert (second["mode"], second["reason"], second["made"]) == ("use", None, False)
        assert (second["dirty"], second["id"]) == (GRANULARITY, own["id"])
        assert second["since"]["session_id"] == first["id"]
        assert (await control.get("sessions/n"))["disks"][0]["accessible"] == GRANULARITY
        backup = await control.served.client("vda@n")
        assert await backup.read(0, GRANULARITY) == b"x" + pattern(SIZE)[1:GRANULARITY]
        assert (await backup.ask(wire.READ, GRANULARITY, 512)).error == errno.EINVAL
        await guest.write(2 * GRANULARITY, b"y")
        await control.delete("sessions/n?result=failed")
        left = await control.get(BITMAP)
        assert left["dirty"] == 2 * GRANULARITY, "no change is forgotten"
        assert left["since"]["session_id"] == first["id"]


async def test_keep_reads_what_has_changed_and_records_on() -> None:
    async with controlled() as control:
        guest = await control.served.client("vda")
        await _night(control, bitmap_granularity=GRANULARITY)
        await control.delete("sessions/n")
        await guest.write(0, b"x")
        own = await _night(control, bitmap_mode="keep")
        assert (own["mode"], own["dirty"]) == ("keep", GRANULARITY)
        await control.delete("sessions/n")
        assert (await control.get(BITMAP))["dirty"] == GRANULARITY


async def test_a_bitmap_in_use_is_left_alone() -> None:
    async with controlled() as control:
        await _night(control)
        for method, path in (
            ("DELETE", BITMAP),
            ("POST", f"{BITMAP}/clear"),
            ("PUT", BITMAP),
        ):
            assert (await control.refused(method, path))[0] == 409
        status, message = await control.refused("PUT", "sessions/m", {"bitmap": "chain"})
        assert status == 409
        assert "used by session n: one session at a time can reset it" in message


async def test_a_bitmap_that_is_not_there_freezes_nobody() -> None:
    async with controlled() as control:
        for mode in ("use", "keep"):
            body = {"bitmap": "chain", "bitmap_mode": mode, "freeze_cmd": "exit 1"}
            assert await control.refused("PUT", "sessions/n", body) == (
                404,
                "cannot begin session n: vda has no bitmap called chain",
            )


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (BITMAP, {"granularity": 5000}, 422, "granularity is a power of two"),
        (BITMAP, {"granularity": 2048}, 422, "at `body.granularity`"),
        (BITMAP, {"granularty": 4096}, 422, "unknown field"),
        ("disks/vda/bitmaps/a%2Fb", {}, 400, "'a/b' cannot be a bitmap's name"),
        (f"disks/vda/bitmaps/{'n' * 300}", {}, 400, "cannot be a bitmap's name"),
        ("disks/vdz/bitmaps/a", {}, 404, "there is no disk called 'vdz'"),
        ("sessions/n", {"bitmap": "a/b"}, 422, "at `body.bitmap`"),
        ("sessions/n", {"bitmap": ".."}, 400, "'..' cannot be a bitmap's name"),
        ("sessions/n", {"bitmap": "a\n"}, 400, "cannot be a bitmap's name"),
        ("sessions/n", {"bitmap": "a", "bitmap_mode": "usee"}, 422, "at `body.bitmap_mode`"),
        ("sessions/n", {"bitmap": "a", "bitmap_granularity": 5000}, 422, "power of two"),
    ],
)
async def test_what_cannot_be_is_refused(path: str, body: Any, status: int, words: str) -> None:
    async with controlled() as control:
        refused = await control.refused("PUT", path, body)
        assert refused[0] == status, refused
        assert words in refused[1]
        assert control.served.server.disks["vda"].bitmaps == {}


async def test_a_bitmap_that_cannot_be_described_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullStore:
        make_fleece_bits = MEMORY.make_fleece_bits
        make_recording_bits = MEMORY.make_recording_bits

        async def commit(self, **_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/state")

    async with controlled() as control:
        control.served.server.store = FullStore()
        assert await control.refused("PUT", BITMAP) == (507, "/state: No space left on device")
        control.served.server.store = None
        assert (await control.get("disks/vda"))["bitmaps"] == []


async def test_a_lost_bitmap_says_so_and_why() -> None:
    async with controlled() as control:
        await control.put(BITMAP)
        control.served.server.disks["vda"].bitmaps["chain"].lost = "the machine was started again"
        seen = await control.get(BITMAP)
        assert (seen["state"], seen["reason"]) == ("lost", "the machine was started again")
        status, message = await control.refused(
            "PUT", "sessions/n", {"bitmap": "chain", "bitmap_mode": "use"}
        )
        assert status == 422
        assert "a full backup is needed" in message
        own = await _night(control)
        assert (own["mode"], own["reason"]) == (
            "new",
            "the bitmap was lost: the machine was started again",
        )
