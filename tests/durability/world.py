"""A guest that reconnects, a backup that resumes, and what they know must hold after a kill.

The guest is what QEMU is with ``reconnect-delay``: what was not answered when the connection broke
is sent again to the next server. Every block that it writes says which write it is of.

    T0  the backup reads the disk as it was at arming: all that it may still read, after each kill
    G   at the end the image holds the last write to each block
    C   what changed since the last good backup is in what an incremental session may read
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd

BLOCK = 4096
BLOCKS = 4096
SIZE = BLOCK * BLOCKS
GRANULARITY = 16384
GUEST_REQUESTS = 16
BACKUP_REQUESTS = 4
ACCESS = "x-fleecenbd:access"
ZERO = -1


def block_bytes(block: int, tag: int) -> bytes:
    """What write number ``tag`` puts into a block."""
    if tag == ZERO:
        return bytes(BLOCK)
    return (tag.to_bytes(8, "big") + block.to_bytes(8, "big")) * (BLOCK // 16)


@dataclass
class Write:
    """A guest's request without an answer."""

    first: int
    count: int
    tag: int
    sent: bool = False


@dataclass
class Totals:
    """What was seen, to be printed."""

    kills: int = 0
    idle_kills: int = 0
    """Kills that found no guest write or no copy in flight."""
    writes: int = 0
    active: int = 0
    copies: int = 0
    requests: int = 0
    acknowledged: int = 0
    verified: int = 0
    sessions: int = 0
    incrementals: int = 0
    orderly: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.idle_kills} of them with nothing in flight) and "
            f"{self.orderly} orderly stops; at the kills "
            f"{self.requests} guest requests without an answer, {self.active} active writes and "
            f"{self.copies} copies in flight; {self.acknowledged} guest writes acknowledged, "
            f"{self.sessions} sessions ({self.incrementals} incremental), "
            f"{self.verified >> 20} MiB read and compared"
        )


class World:
    """One image, one server after the other, and the checks."""

    def __init__(self, folder: Path, seed: int, totals: Totals) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.totals = totals
        self.image = folder / "vm.raw"
        self.tags = [0] * BLOCKS
        self.image.write_bytes(b"".join(block_bytes(b, 0) for b in range(BLOCKS)))
        self.next_tag = itertools.count(1)
        self.pending: dict[int, Write] = {}
        self.server: subprocess.Popen[str] | None = None
        self.guest: nbd.NBD | None = None
        self.last_good: bytes | None = None
        self.snapshot = b""
        self.kept: set[int] = set()
        """Blocks that the session may read for sure."""
        self.gone: set[int] = set()
        """Blocks whose TRIM was replied to."""
        self.has_bitmap = False

    # -- the server ------------------------------------------------------------------------

    def start(self) -> None:
        """Start a server, and connect the guest again."""
        way = self.random.choice(["pool", "pool", "inline"])
        command = [sys.executable, "-m", "tests.durability.killed", self.folder, self.image, way]
        self.log = (self.folder / "log").open("a")
        self.server = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._answer() == {"ready": True}
        self.connect_guest()

    def connect_guest(self) -> None:
        """Connect, and send again what was not answered, in the order of sending."""
        self.guest = self._connect("vda")
        for write in self.pending.values():
            write.sent = False
        self._send_pending()

    def _connect(self, export: str) -> nbd.NBD:
        client = nbd.NBD()
        client.add_meta_context(ACCESS)
        client.connect_uri(f"nbd+unix:///{export}?socket={self.folder}/f.sock")
        return client

    def tell(self, do: str, **options: Any) -> None:
        """Send a command."""
        assert self.server is not None
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.server.stdin.flush()

    def _answer(self) -> Any:
        """The answer, None if the server was killed before it."""
        assert self.server is not None
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def ask(self, do: str, **options: Any) -> Any:
        """Send a command; its answer, None if the server was killed first."""
        try:
            self.tell(do, **options)
        except BrokenPipeError:
            return None
        return self._answer()

    def wait_killed(self) -> None:
        """Wait for the end of the server, and count what was in flight."""
        assert self.server is not None
        self.server.wait(60)  # its stdin stays open: the end of that would be an orderly stop
        self._close_pipes()
        assert self.server.returncode == -9, f"{self.server.returncode}; see {self.folder}/log"
        writes, copies = map(int, (self.folder / "note").read_text().split())
        self.totals.kills += 1
        self.totals.active += writes
        self.totals.copies += copies
        self.totals.requests += len(self.pending)
        self.totals.idle_kills += not (writes and copies)
        self.guest = None
        self.log.close()

    def stop(self) -> None:
        """An orderly stop."""
        self.drain()
        assert self.ask("stop") == {"stopped": True}
        assert self.server is not None
        assert self.server.wait(30) == 0
        self._close_pipes()
        self.totals.orderly += 1
        self.guest = None
        self.log.close()

    def _close_pipes(self) -> None:
        assert self.server is not None
        for pipe in (self.server.stdin, self.server.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def kill_soon(self, *, waits: bool = True) -> None:
        """The server kills itself in a moment, with work in flight if it ``waits`` for some."""
        after = self.random.uniform(0, 0.15)
        note = str(self.folder / "note")
        assert self.ask("kill", after=after, note=note, waits=waits) == {}

    # -- the guest -------------------------------------------------------------------------

    def _new_write(self) -> None:
        busy = {b for w in self.pending.values() for b in range(w.first, w.first + w.count)}
        first = self.random.randrange(BLOCKS)
        count = min(self.random.choice([1, 1, 2, 8, 32]), BLOCKS - first)
        if busy.isdisjoint(range(first, first + count)):
            number = next(self.next_tag)
            tag = ZERO if self.random.random() < 0.15 else number
            self.pending[number] = Write(first, count, tag)

    def _send_pending(self) -> None:
        assert self.guest is not None
        for number, write in list(self.pending.items()):
            if write.sent:
                continue
            offset, done = write.first * BLOCK, self._written(number)
            blocks = range(write.first, write.first + write.count)
            if write.tag == ZERO:
                self.guest.aio_zero(write.count * BLOCK, offset, done)
            else:
                data = b"".join(block_bytes(block, write.tag) for block in blocks)
                self.guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, done)
            write.sent = True

    def _written(self, number: int) -> Callable[[Any], int]:
        def done(error: Any) -> int:
            if error.value == 0:
                write = self.pending.pop(number)
                for block in range(write.first, write.first + write.count):
                    self.tags[block] = write.tag
                self.totals.acknowledged += 1
            return 1

        return done

    def write_until_killed(self, backup: Backup | None) -> None:
        """Write at full speed, and pull and release beside that, until the connection breaks."""
        try:
            while True:
                while len(self.pending) < GUEST_REQUESTS:
                    self._new_write()
                self._send_pending()
                assert self.guest is not None
                self.guest.poll(10)
                if backup is not None:
                    backup.work()
        except nbd.Error:
            self.wait_killed()

    def write_some(self, count: int) -> None:
        """Write without a kill."""
        end = self.totals.acknowledged + count
        while self.totals.acknowledged < end:
            while len(self.pending) < GUEST_REQUESTS:
                self._new_write()
            self._send_pending()
            assert self.guest is not None
            self.guest.poll(1000)

    def drain(self) -> None:
        """Wait for the answers to all guest writes."""
        assert self.guest is not None
        while self.pending:
            self.guest.poll(1000)

    def check_guest(self) -> None:
        """G."""
        self.drain()
        image = self.image.read_bytes()
        for block, tag in enumerate(self.tags):
            found = image[block * BLOCK : (block + 1) * BLOCK]
            assert found == block_bytes(block, tag), f"G: block {block} is not of write {tag}"

    # -- the backup ------------------------------------------------------------------------

    def access_map(self, client: nbd.NBD) -> set[int]:
        """The blocks that may be read."""
        runs: list[int] = []

        def extents(context: str, offset: int, entries: list[int], error: Any) -> int:
            if context == ACCESS:
                runs.extend(entries)
            return 0

        client.block_status(SIZE, 0, extents)
        readable, block = set(), 0
        for length, flags in zip(runs[::2], runs[1::2], strict=True):
            count = length // BLOCK
            if flags & 1:
                readable.update(range(block, block + count))
            block += count
        assert block == BLOCKS
        return readable

    def check_session(self, name: str) -> Backup:
        """T0, and that exactly what was released is gone; a backup that resumes."""
        client = self._connect(f"vda@{name}")
        readable = self.access_map(client)
        assert self.kept <= readable, f"T0: {len(self.kept - readable)} blocks were lost"
        assert readable.isdisjoint(self.gone), "T0: released blocks are back"
        for first, end in _runs(readable):
            offset, length = first * BLOCK, (end - first) * BLOCK
            found = client.pread(length, offset)
            self.totals.verified += length
            assert found == self.snapshot[offset : offset + length], f"T0: at {offset}"
        self.kept = readable
        self.gone = set(range(BLOCKS)) - readable
        return Backup(self, client)

    def check_chain(self, name: str) -> None:
        """C, right after arming, when all own bits may be read."""
        readable = self.access_map(self._connect(f"vda@{name}"))
        assert self.last_good is not None, "an incremental follows a full backup"
        for block in set(range(BLOCKS)) - readable:
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            assert self.last_good[span] == self.snapshot[span], f"C: block {block} is forgotten"
        self.totals.incrementals += 1


@dataclass
class Backup:
    """A client that pulls and releases at random; its requests in flight."""

    world: World
    client: nbd.NBD
    in_flight: set[int] = field(default_factory=set)
    """Blocks of requests without an answer."""
    requests: int = 0

    def work(self) -> None:
        """Send requests, and take answers. Raises nbd.Error when the server is gone."""
        world = self.world
        while self.requests < BACKUP_REQUESTS and world.kept:
            first = world.random.choice(tuple(itertools.islice(world.kept, 64)))
            blocks = []
            for block in range(first, min(first + world.random.choice([1, 4, 16]), BLOCKS)):
                if block not in world.kept or block in self.in_flight:
                    break
                blocks.append(block)
            if not blocks:
                break
            self._send(blocks, trims=world.random.random() < 0.3)
        self.client.poll(0)

    def _send(self, blocks: list[int], *, trims: bool) -> None:
        world = self.world
        offset, length = blocks[0] * BLOCK, len(blocks) * BLOCK
        self.in_flight.update(blocks)
        self.requests += 1
        buffer = nbd.Buffer(length)
        if trims:
            world.kept.difference_update(blocks)

        def done(error: Any) -> int:
            self.requests -= 1
            self.in_flight.difference_update(blocks)
            if error.value == 0 and trims:
                world.gone.update(blocks)
            elif error.value == 0:
                found = bytes(buffer.to_bytearray())
                world.totals.verified += length
                assert found == world.snapshot[offset : offset + length], f"T0: at {offset}"
            return 1

        if trims:
            self.client.aio_trim(length, offset, done)
        else:
            self.client.aio_pread(buffer, offset, done)


def _runs(blocks: set[int]) -> list[tuple[int, int]]:
    """Ranges of at most 1 MiB."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block and block - runs[-1][0] < 256:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
