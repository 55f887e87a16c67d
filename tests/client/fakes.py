"""A source in memory and a target that is a file, for pulls that need neither server nor libnbd."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleecenbd.client.endpoints import Source, Target
from fleecenbd.client.plan import ACCESS, ALLOCATION, IN_TEMP, READABLE
from fleecenbd.storage.device import Buffer, Data, Extent

UNIT = 4096


class FakeSource:
    """endpoints.Source: bytes, of which some are released."""

    def __init__(self, content: bytes, **facts: Any) -> None:
        self.content = content
        self.name = facts.get("name", "nbd+unix:///vda@n?socket=/s")
        self.size = len(content)
        self.cluster = facts.get("cluster", 64 << 10)
        self.can_trim = facts.get("can_trim", True)
        self.session_id: str | None = facts.get("session_id", "id-1")
        contexts = {ALLOCATION} if self.session_id is None else {ALLOCATION, ACCESS}
        self.contexts = frozenset(facts.get("contexts", contexts))
        self.requests = 8
        self.released: set[int] = set()
        """Units."""
        self.in_temp: set[int] = set()
        self.dirty: set[int] = set()
        self.reads: list[tuple[int, int]] = []
        self.trims: list[tuple[int, int]] = []
        self.before_read: Callable[[int], None] = lambda offset: None
        """May raise."""
        self.hold = asyncio.Event()
        """Reads wait for it."""
        self.hold.set()
        self.asked = asyncio.Event()
        """A read has come."""
        self.closed = False

    async def pread(self, offset: int, length: int) -> Buffer:
        """EINVAL where it was released."""
        self.asked.set()
        await self.hold.wait()
        self.before_read(offset)
        for unit in range(offset // UNIT, -(-(offset + length) // UNIT)):
            if unit in self.released:
                raise OSError(errno.EINVAL, f"{self.name}: {unit * UNIT} was released")
        self.reads.append((offset, length))
        return self.content[offset : offset + length]

    async def trim(self, offset: int, length: int) -> None:
        """Release."""
        self.trims.append((offset, length))
        self.released.update(range(offset // UNIT, -(-(offset + length) // UNIT)))

    async def extents(self, context: str, offset: int, length: int) -> list[Extent]:
        """Unit by unit."""
        found = []
        for start in range(offset, offset + length, UNIT):
            unit, count = start // UNIT, min(UNIT, offset + length - start)
            if context == ALLOCATION:
                flags = 3 if self.content[start : start + count] == bytes(count) else 0
            elif context == ACCESS:
                flags = 0 if unit in self.released else READABLE
                flags |= IN_TEMP if unit in self.in_temp else 0
            else:
                flags = int(unit in self.dirty)
            found.append((count, flags))
        return found

    async def close(self) -> None:
        """Noted."""
        self.closed = True

    async def open(self, uri: str, **_options: Any) -> Source:
        """pull.OpenSource: this one."""
        self.uri = uri
        return self


class FakeTarget:
    """endpoints.Target: PATH.part, and PATH when it is complete."""

    requests = 4
    write_unit = 1

    def __init__(self, path: Path, size: int, *, resume: bool, is_zero: bool = True) -> None:
        self.name = str(path)
        self.path = path
        self.part = Path(f"{path}.part")
        self.is_zero = is_zero
        self.flushes = 0
        self.before_flush: Callable[[], None] = lambda: None
        self.before_write: Callable[[int], None] = lambda offset: None
        flags = os.O_RDWR | (0 if resume else os.O_CREAT | os.O_EXCL)
        self.descriptor = os.open(self.part, flags, 0o600)
        os.truncate(self.descriptor, size)

    async def pwrite(self, offset: int, data: Data) -> None:
        """At once."""
        self.before_write(offset)
        assert os.pwrite(self.descriptor, data, offset) == len(data)

    async def zero(self, offset: int, length: int) -> None:
        """As data."""
        await self.pwrite(offset, bytes(length))

    async def pread(self, offset: int, length: int) -> Buffer:
        """From the file."""
        return os.pread(self.descriptor, length, offset)

    async def flush(self) -> None:
        """Noted."""
        self.before_flush()
        self.flushes += 1

    async def complete(self) -> None:
        """The final name."""
        self.part.rename(self.path)
        os.close(self.descriptor)

    async def keep(self) -> None:
        """It stays."""
        os.close(self.descriptor)

    async def discard(self) -> None:
        """It goes."""
        os.close(self.descriptor)
        self.part.unlink()


class FakeTargets:
    """pull.OpenTarget: makes FakeTargets, and remembers them."""

    def __init__(
        self, prepare: Callable[[FakeTarget], None] = lambda target: None, **facts: Any
    ) -> None:
        self.made: list[FakeTarget] = []
        self._prepare = prepare
        self._facts = facts

    async def open(
        self, text: str, size: int, *, force: bool, resume: bool, **_options: Any
    ) -> Target:
        """Refuses what is there, as targets.py does."""
        _make_way(text, force=force, resume=resume)
        target = FakeTarget(Path(text), size, resume=resume, **self._facts)
        self._prepare(target)
        self.made.append(target)
        return target


def _make_way(text: str, *, force: bool, resume: bool) -> None:
    if not force and os.path.exists(text):
        raise FileExistsError(errno.EEXIST, "it is there; give --force", text)
    if force and not resume:
        Path(f"{text}.part").unlink(missing_ok=True)
