"""A chain of backups under write load: a full one, 20 incrementals, and failures in between.

Two guests write, zero and discard all the time. Clients are killed while they read, temp images
fill up and break their session, backups are given up. After every backup that succeeded the disk
is restored from the one before it and the changes, and must be the disk as it was at the moment of
its session, byte for byte.
"""

import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.controlling import Control
from tests.disks import MIB, make_disk
from tests.remembering import Moment, RememberingGuest, granules, remembering
from tests.serving import Serving, connected, serving

SIZE = 12 * MIB + 512
BETWEEN_GUESTS = 6 * MIB + 1024  # within a granule: both change it
CONTEXT = "qemu:dirty-bitmap:chain"
GRANULARITY = 64 << 10
READ_LENGTH = MIB
INCREMENTALS = 20

# Reads the same 512 bytes over and over; says so once it does.
READER = """
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
while True:
    h.pread(512, int(sys.argv[2]))
    print("reading", flush=True)
"""

Extents = list[tuple[int, bytes]]


def _dirty(client: nbd.NBD) -> list[tuple[int, int]]:
    """(offset, length) of what the session's bitmap says has changed."""
    found: list[tuple[int, int]] = []
    position = 0

    def collect(context: str, offset: int, entries: list[int], _error: object) -> int:
        nonlocal position
        if context == CONTEXT:
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                if flags & 1:
                    found.append((offset, length))
                offset += length
            position = offset
        return 0

    while position < SIZE:
        client.block_status(SIZE - position, position, collect)
    return found


def _extents(uri: str, mode: str) -> Extents:
    """All that a session's export offers."""
    with connected(uri, lambda client: client.add_meta_context(CONTEXT)) as client:
        ranges = _dirty(client) if mode == "use" else [(0, SIZE)]
        return [
            (at, bytes(client.pread(min(READ_LENGTH, offset + length - at), at)))
            for offset, length in ranges
            for at in range(offset, offset + length, READ_LENGTH)
        ]


def _applied(backup: bytes, extents: Extents) -> bytes:
    restored = bytearray(backup)
    for offset, data in extents:
        restored[offset : offset + len(data)] = data
    return bytes(restored)


class _Chain:
    """Sessions with one bitmap, and the last good backup."""

    def __init__(self, server: Serving, guests: list[RememberingGuest]) -> None:
        self.control = Control(f"{server.unix}.control")
        self.guests = guests
        self.backup = bytes(SIZE)
        self.good: str | None = None
        self.good_moment = Moment(guests)
        self.modes: Counter[str] = Counter()
        self.changed: list[int] = []

    def begin(self, mode: str = "use-or-new", **options: object) -> dict[str, Any]:
        """Begin a session; it must count from the last good backup."""
        begun: dict[str, Any] = self.control.call(
            "PUT", "sessions/n", bitmap="chain", bitmap_mode=mode, **options
        )
        own = begun["disks"][0]["bitmap"]
        assert own["mode"] == ("use" if self.good and mode != "new" else "new")
        since = own["since"] and own["since"]["session_id"]
        assert since == self.good
        return begun

    def finish(self, result: str) -> str:
        """Finish it; how it really counts."""
        if self.guests[0].is_alive():
            self.guests[0].wait(5)
        return str(self.control.call("DELETE", f"sessions/n?result={result}")["result"])

    def bitmap(self) -> dict[str, Any] | None:
        """The recording bitmap, if there is one."""
        bitmaps = self.control.call("GET", "disks/vm/bitmaps")["bitmaps"]
        return bitmaps[0] if bitmaps else None

    def back_up(self) -> None:
        """A backup that succeeds."""
        moment = Moment(self.guests)
        begun = self.begin()
        moment.is_over()
        (disk,) = begun["disks"]
        extents = _extents(disk["uri"], disk["bitmap"]["mode"])
        restored = _applied(self.backup, extents)
        assert moment.is_shown_by(restored), begun
        if disk["bitmap"]["mode"] == "use":
            written = moment.granules_written_since(self.good_moment, GRANULARITY)
            assert granules(extents, GRANULARITY) <= written
            # The last granule is a small part of one, and counts whole.
            read = sum(-(-len(data) // GRANULARITY) * GRANULARITY for _, data in extents)
            assert min(read, SIZE) == disk["bitmap"]["dirty"]
            self.changed.append(disk["bitmap"]["dirty"])
            if self.guests[0].is_alive():
                assert not moment.is_shown_by(self.backup), "this would show nothing"
        assert self.finish("success") == "success"
        self.modes[disk["bitmap"]["mode"]] += 1
        self.backup, self.good, self.good_moment = restored, begun["id"], moment

    def fail(self, kind: str) -> None:
        """A backup that fails; after it the chain is where it was."""
        if kind == "killed":
            self._kill_a_client(self.begin())
            assert self.finish("failed") == "failed"
        elif kind == "given up":
            (disk,) = self.begin()["disks"]
            _extents(disk["uri"], disk["bitmap"]["mode"])
            assert self.finish("failed") == "failed"
        elif kind == "full":
            # A new chain that comes to nothing leaves the old one whole.
            self._kill_a_client(self.begin("new"))
            assert self.finish("failed") == "failed"
        else:
            self._break(self.begin(temp_limit=4096))
            # What its client believes does not count.
            assert self.finish("success") == "failed"
        left = self.bitmap()
        if self.good is None:
            assert left is None
        else:
            assert left is not None
            assert left["since"]["session_id"] == self.good
            assert left["used_by"] is None

    def _kill_a_client(self, begun: dict[str, Any]) -> None:
        (disk,) = begun["disks"]
        with connected(disk["uri"], lambda client: client.add_meta_context(CONTEXT)) as client:
            offset = 0 if disk["bitmap"]["mode"] == "new" else _dirty(client)[0][0]
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, disk["uri"], str(offset)], stdout=subprocess.PIPE
        )
        with reader:
            assert reader.stdout is not None
            line = reader.stdout.readline()
            reader.send_signal(signal.SIGKILL)
        assert line == b"reading\n"

    def _break(self, begun: dict[str, Any]) -> None:
        (disk,) = begun["disks"]
        seen = self.control.call("GET", "sessions/n")
        for _ in range(1000):
            if seen["state"] == "broken":
                break
            self.guests[0].wait(1)
            seen = self.control.call("GET", "sessions/n")
        assert "temp" in seen["reason"], seen
        with connected(disk["uri"]) as client, pytest.raises(nbd.Error, match="Input/output"):
            client.pread(512, 0)


def test_every_backup_of_a_chain_with_failures_is_the_disk_at_its_moment(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "vm.raw", SIZE, islands=100)
    first = disk.read_bytes()
    kinds = ("killed", "given up", "full", "broken")
    plan = ["good"] * INCREMENTALS + [kind for kind in kinds for _ in range(4)]
    random.Random("a chain").shuffle(plan)
    with serving(tmp_path, disk, "--shared", "2", "--log-level", "error") as server:
        uri = server.uri("vm")
        guests = [
            RememberingGuest(uri, first, end=BETWEEN_GUESTS, pause_s=0.001),
            RememberingGuest(uri, first, start=BETWEEN_GUESTS, pause_s=0.001),
        ]
        with remembering(*guests):
            chain = _Chain(server, guests)
            chain.fail("killed")
            chain.back_up()
            for kind in plan:
                guests[0].wait(20)
                if kind == "good":
                    chain.back_up()
                else:
                    chain.fail(kind)
        chain.back_up()
        chain.control.close()
    assert chain.backup == disk.read_bytes()
    assert chain.modes == {"new": 1, "use": INCREMENTALS + 1}
    assert min(chain.changed) < SIZE // 2, "an increment is as large as the disk"
    print(
        f"{sum(len(guest.writes) for guest in guests)} writes; changed, of {SIZE >> 10} KiB: "
        f"{[changed >> 10 for changed in chain.changed]} KiB"
    )
