"""A pull in virtual time: one seed is one backup, over as many lives as its kills make of it.

The copy loop, the plan, the journal and the releasing are the real ones. Around them: a source
that forgets what is TRIMmed, a target of which a crash keeps what was flushed and a part, drawn at
random, of what was not, and a journal's file whose last line a kill may spoil.

    R  what a TRIM releases is whole clusters, and at that moment a crash of the target would keep
       every byte of it, and a crash of everything the line of the journal that says so
    E  the end: what is durable in the target is the snapshot, wherever that was wanted; the root
       is that of the snapshot
    L  everybody who waits is woken (the loop's Deadlock)
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fleecenbd.client import block_io, plan
from fleecenbd.client.checksums import Checksums
from fleecenbd.client.copy_loop import CopyLoop
from fleecenbd.client.endpoints import TargetLost
from fleecenbd.client.journal import Header, Journal
from fleecenbd.client.plan import ACCESS, ALLOCATION, DIRTY, READABLE, Plan
from fleecenbd.client.rate import Rate
from fleecenbd.client.verify import wanted_blocks
from fleecenbd.storage.device import Extent
from tests.simulation.loop import VirtualLoop

SECTOR = 512
BLOCK = 16 << 10
LIVES_MAX = 12
BITMAP = "monday"


class Violation(AssertionError):
    """What must hold did not."""


class Killed(BaseException):
    """The process is gone, between two callbacks of the loop."""


@dataclass
class Shape:
    """What a seed decides."""

    size: int
    cluster: int
    bitmap: bool
    is_zero: bool
    checksums: bool
    can_trim: bool
    snapshot: bytes
    zeroes: list[bool]
    """By sector: told by the map."""
    dirty: list[bool]
    """By sector."""


def shape_of(rng: random.Random) -> Shape:
    """A disk of some blocks: data, zeroes that the map tells, and zeroes within the data."""
    size = BLOCK * rng.randint(1, 24) - SECTOR * rng.choice([0, 0, 1, 7, 31])
    sectors = size // SECTOR
    content, zeroes = bytearray(), []
    while len(zeroes) < sectors:
        run = min(rng.choice([1, 3, 8, 40, 100, 300]), sectors - len(zeroes))
        kind = rng.choice(["data", "data", "zero", "told"])
        content += rng.randbytes(run * SECTOR) if kind == "data" else bytes(run * SECTOR)
        zeroes += [kind == "told"] * run
    cluster = rng.choice([4096, 4096, BLOCK, 4 * BLOCK])
    unit = max(cluster, 4096) // SECTOR
    dirty: list[bool] = []
    while len(dirty) < sectors:
        dirty += [rng.random() < 0.5] * unit * rng.choice([1, 1, 4])
    return Shape(
        size,
        cluster,
        bitmap=rng.random() < 0.3,
        is_zero=rng.random() < 0.5,
        checksums=rng.random() < 0.6,
        can_trim=rng.random() < 0.9,
        snapshot=bytes(content),
        zeroes=zeroes,
        dirty=dirty[:sectors],
    )


@dataclass
class World:
    """One backup: what lasts over the kills of the pulling process."""

    seed: int
    met: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"pull {self.seed}")
        self.shape = shape_of(self.rng)
        size = self.shape.size
        self.access = bytearray(b"\1") * size
        if self.shape.bitmap:
            self.access = bytearray(b"".join(bytes([d]) * SECTOR for d in self.shape.dirty))
        start = bytes(size) if self.shape.is_zero else self.rng.randbytes(size)
        self.durable = bytearray(start)
        """What a crash of the target keeps for certain."""
        self.unflushed: list[tuple[int, bytes]] = []
        """Writes that have ended, and those that have begun."""
        self.journal = b""
        """What is durable of it."""
        self.life = 0
        self.dead = False

    # -- lives ---------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Pull until it is complete. Raises Violation."""
        for life in range(LIVES_MAX):
            self.life = life
            self.last = life == LIVES_MAX - 1
            if self._live():
                self._check_end()
                return self.met
            self._crash(target=self.rng.random() < 0.5)
        raise Violation("L: the last life has no faults, and did not end well")

    def _live(self) -> bool:
        """One life of the process; True when it came to its good end."""
        loop = VirtualLoop(self.rng, steps_max=400_000)
        self.loop = loop
        self.dead = False
        self.lost = False
        plan.ZERO_BLOCKS_MAX = self.rng.choice([1, 2, 3, 8])
        self.flaky = 0.0 if self.last else self.rng.choice([0.0, 0.0, 0.002, 0.02])
        self.losing = 0.0 if self.last else self.rng.choice([0.0, 0.05, 0.2])
        if not self.last and self.rng.random() < 0.85:
            kill_at = self.rng.randint(1, self.rng.choice([60, 600, 3000]))

            def look() -> None:
                if loop.steps >= kill_at:
                    raise Killed

            loop.after_step = look
        try:
            return loop.run_until_complete(self._pull())
        except Killed:
            self.met["kills"] += 1
            return False
        finally:
            self.dead = True
            loop.cancel_everything()

    def _crash(self, *, target: bool) -> None:
        """What was not durable is there in part: of a kill of everything, or of the client alone.

        (Of the client alone, what the target has taken still lands.)"""
        for offset, data in self.unflushed:
            for at in range(0, len(data), SECTOR):
                if not target or self.rng.random() < 0.5:
                    self.durable[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
        self.unflushed.clear()

    async def _pull(self) -> bool:
        """As pull.py does it."""
        shape = self.shape
        source, target, file = SimSource(self), SimTarget(self), SimJournalFile(self)
        header = Header(
            "nbd://x",
            "t",
            shape.size,
            session="id",
            block=BLOCK,
            bitmap=BITMAP if shape.bitmap else None,
            algorithm="blake2s" if shape.checksums else None,
        )
        journal = Journal.read(self.journal, file) if self.journal else Journal(header, file)
        if journal.durable.bits.any():
            self.met["resumed"] += 1
        todo = Plan(source, journal.durable, bitmap=header.bitmap)
        sums = Checksums("blake2s", shape.size, block_size=BLOCK, run=_inline)
        copying = None
        ends = None
        try:
            await todo.scan()
            await journal.begin()
            copying = CopyLoop(
                source,
                target,
                todo,
                journal,
                rate=Rate(self.rng.choice([None, None, 1 << 20])),
                note=lambda text: None,
                checksums=sums if shape.checksums else None,
                in_flight_length=BLOCK * self.rng.choice([1, 2, 6]),
                batch_length=BLOCK * self.rng.choice([1, 3, 100]),
                read_length=self.rng.choice([4096, BLOCK]),
            )
            if self.rng.random() < 0.5:
                ends = asyncio.create_task(self._disturb(copying))
            await copying.run()
        except OSError as error:
            self.met[f"failed {errno.errorcode[error.errno or 0]}"] += 1
            return False
        finally:
            if ends is not None:
                ends.cancel()
        if copying.stopping and copying.durable < todo.to_copy:
            self.met["stopped"] += 1
            return False
        if shape.checksums:
            root = sums.root((block for block, _ in wanted_blocks(todo)), journal.digests)
            if root != self._root():
                raise Violation("E: the root is another")
        self.met["complete"] += 1
        self.met["released"] += copying.released
        return True

    async def _disturb(self, copying: CopyLoop) -> None:
        rng = self.rng
        while True:
            await asyncio.sleep(rng.uniform(0, 0.2))
            copying.paused = True
            await asyncio.sleep(rng.uniform(0, 2))
            copying.paused = False
            if not self.last and rng.random() < 0.05:
                copying.stop()

    # -- checks --------------------------------------------------------------------------------

    def _check_end(self) -> None:
        for at in range(0, self.shape.size, SECTOR):
            if self.is_wanted(at) and self.durable[at : at + SECTOR] != self._snapshot(at):
                raise Violation(f"E: {at} is not as in the snapshot, or not durable")

    def _snapshot(self, at: int) -> bytes:
        return self.shape.snapshot[at : at + SECTOR]

    def is_wanted(self, at: int) -> bool:
        """Is this byte to be copied?"""
        return not self.shape.bitmap or self.shape.dirty[at // SECTOR]

    def check_trim(self, offset: int, length: int) -> None:
        """R, when a TRIM is sent."""
        end = offset + length
        cluster = self.shape.cluster
        if offset % cluster or (end % cluster and end != self.shape.size):
            raise Violation(f"R: {offset}+{length} is not whole clusters of {cluster}")
        told = Journal.read(self.journal, SimJournalFile(self)).durable
        for at in range(offset, end, SECTOR):
            if not self.is_wanted(at):
                continue
            if self.durable[at : at + SECTOR] != self._snapshot(at):
                raise Violation(f"R: {at} is released, and is not durable in the target")
            if not told.any(at, SECTOR):
                raise Violation(f"R: {at} is released, and the journal does not say so")
        for start, data in self.unflushed:
            for at in range(max(start, offset), min(start + len(data), end), SECTOR):
                if data[at - start : at - start + SECTOR] != self._snapshot(at):
                    raise Violation(f"R: {at} is released, and being overwritten")

    def _root(self) -> str:
        """Computed as docs/pull.md says, not by the code under test."""
        shape, root = self.shape, hashlib.blake2s()
        for start in range(0, shape.size, BLOCK):
            stop = min(start + BLOCK, shape.size)
            wanted = [at for at in range(start, stop, SECTOR) if self.is_wanted(at)]
            if wanted:
                data = b"".join(map(self._snapshot, wanted))
                root.update(hashlib.blake2s(data).digest())
        return root.hexdigest()

    # -- what calls have in common -------------------------------------------------------------

    async def takes_time(self, what: str) -> None:
        """A call that takes a while, and may fail."""
        future = self.loop.create_future()
        self.loop.complete_at(self.loop.time() + self.rng.expovariate(1 / 0.01), _done, future)
        await future
        if self.rng.random() < self.flaky and not self.dead:
            self.met[f"{what} failed"] += 1
            raise OSError(errno.EIO, f"{what} failed")


async def _inline(function: Callable[[], bytes]) -> bytes:
    await asyncio.sleep(0)
    return function()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class SimSource:
    """endpoints.Source: forgets what is TRIMmed."""

    name = "sim:"
    requests = 4
    write_unit = 1

    def __init__(self, world: World) -> None:
        self._world = world
        shape = world.shape
        self.size = shape.size
        self.cluster = shape.cluster
        self.can_trim = shape.can_trim
        self.session_id = "id"
        self.contexts = frozenset(
            {ALLOCATION, ACCESS} | ({DIRTY + BITMAP} if shape.bitmap else set())
        )

    async def pread(self, offset: int, length: int) -> bytes:
        """EINVAL, and thereby a violation, where it was released."""
        await self._world.takes_time("read")
        if 0 in self._world.access[offset : offset + length]:
            raise Violation(f"E: {offset}+{length} is read, and was released")
        return self._world.shape.snapshot[offset : offset + length]

    async def trim(self, offset: int, length: int) -> None:
        """Released now, later, or not at all if the kill comes first."""
        world = self._world
        if world.dead:
            return
        world.check_trim(offset, length)
        if world.rng.random() < 0.5:
            self._release(offset, length)
        await world.takes_time("trim")
        if not world.dead:
            self._release(offset, length)
            world.met["trims"] += 1

    def _release(self, offset: int, length: int) -> None:
        self._world.access[offset : offset + length] = bytes(length)

    async def extents(self, context: str, offset: int, length: int) -> list[Extent]:
        """By sectors."""
        world = self._world
        await world.takes_time("map")
        found: list[Extent] = []
        for at in range(offset, offset + length, SECTOR):
            if context == ALLOCATION:
                flags = 3 if world.shape.zeroes[at // SECTOR] else 0
            elif context == ACCESS:
                flags = READABLE if world.access[at] else 0
            else:
                flags = int(world.shape.dirty[at // SECTOR])
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + SECTOR, flags)
            else:
                found.append((SECTOR, flags))
        return found

    async def close(self) -> None:
        """Nothing to do."""


class SimTarget:
    """endpoints.Target: what was not flushed may be lost."""

    name = "target"
    requests = 4
    write_unit = 1

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_zero = world.shape.is_zero

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Begun is in ``unflushed`` already: it may land any time."""
        world = self._world
        if world.dead:
            return
        write = (offset, bytes(data))
        world.unflushed.append(write)
        await world.takes_time("write")
        if world.dead:
            return
        if write not in world.unflushed:
            world.unflushed.append(write)  # lost in flight, and sent again
        if world.rng.random() < world.losing / 10:
            self._lose()

    async def zero(self, offset: int, length: int) -> None:
        """Like a write."""
        await self.pwrite(offset, bytes(length))

    def _lose(self) -> None:
        """The target's machine has crashed, and is back."""
        self._world.met["lost"] += 1
        self._world._crash(target=True)
        self._world.lost = True

    async def flush(self) -> None:
        """What had ended when it began is durable when it ends."""
        world = self._world
        if world.dead:
            return
        covered = list(world.unflushed)
        await world.takes_time("flush")
        if world.rng.random() < world.losing:
            self._lose()
        if world.dead:
            return
        if world.lost:
            world.lost = False
            raise TargetLost(errno.EIO, "connected anew")
        for write in covered:
            offset, data = write
            world.durable[offset : offset + len(data)] = data
            if write in world.unflushed:
                world.unflushed.remove(write)

    async def pread(self, offset: int, length: int) -> bytes:
        """Nobody reads back here."""
        raise NotImplementedError

    async def complete(self) -> None:
        """Nothing to do."""

    keep = discard = complete


class SimJournalFile:
    """journal.JournalFile: a kill during an append leaves a part of the line."""

    name = "journal"

    def __init__(self, world: World) -> None:
        self._world = world

    async def append(self, data: bytes) -> None:
        """A torn tail until it has ended."""
        world = self._world
        if world.dead:
            return
        before = world.journal
        world.journal = before + self._spoilt(data)
        await world.takes_time("journal")
        if not world.dead:
            world.journal = before + data

    def _spoilt(self, line: bytes) -> bytes:
        """Cut short, or with something in it that was there before."""
        at = self._world.rng.randrange(len(line))
        if self._world.rng.random() < 0.5:
            return line[:at]
        return line[:at] + b"%d" % self._world.rng.randrange(10) + line[at + 1 :]

    async def replace(self, data: bytes) -> None:
        """Old or new."""
        world = self._world
        if world.rng.random() < 0.5 and not world.dead:
            world.journal = data
        await world.takes_time("journal")
        if not world.dead:
            world.journal = data
            world.met["compactions"] += 1

    async def remove(self) -> None:
        """Nothing to do."""

    close = remove


SMALL = {
    (plan, "RUNS_AHEAD_MAX"): 20,
    (plan, "WINDOW_LENGTH"): 5 * BLOCK,
    (plan, "WINDOW_LENGTH_MIN"): BLOCK + SECTOR,
    (plan, "WINDOW_LENGTH_MAX"): 16 * BLOCK,
    (plan, "WINDOW_EXTENTS"): 16,
    (plan, "ZERO_LENGTH_MIN"): 2048,
    (plan, "ZERO_BLOCKS_MAX"): 3,
    (block_io, "ZERO_CALL_MIN"): 8192,
}
"""Limits that a small disk would not meet."""
