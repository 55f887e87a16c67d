"""What is durable in the target: a small file, written before anything is released.

    a1b2c3d4 {"source":"nbd+unix:…","target":"/b/vm.raw","size":…,"session":"6f1c…",…,"journal":1}
    09d8e7f6 {"data":[[0,64]],"digests":"…"}
    5566aa77 {"data":[[64,3]],"zeroes":[[67,4000]]}
    0badcafe {"mark":"complete"}

A line is a record: the CRC-32 of the rest, in hexadecimal, and JSON. The first one, the header,
says what is copied where to; each of the others names blocks (see ``checksums.BLOCK_SIZE``) as
[first, count] that are durable: ``data`` with the digests of these blocks one after the other
(base64) if there are checksums, ``zeroes`` without. All records together are the state; they merge.

Order rules
    * A record is appended after the target's ``flush`` has returned, and a TRIM is sent after the
      record is durable. So what was released is durable, and the journal says so.
    * The next record is appended after the last one is durable. So a kill, or a crash of the
      machine, can spoil the last line only, which is then ignored: nothing was released on its
      word. A spoilt line before others is damage, and refused.
    * The file is made anew, shorter, once it is more than twice as long as it need be.
"""

from __future__ import annotations

import base64
import binascii
import errno
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec
from bitarray import bitarray

from fleecenbd.engine.bitmap import Bitmap, cluster_runs

VERSION = 1
COMPACT_LENGTH_MIN = 64 << 10
"""Bytes below which a journal is not made anew."""

COMPLETING = "completing"
"""All is durable, and the target is about to get its final name."""
COMPLETE = "complete"
"""The target is complete: what says so where there is no name to be given."""


class Header(msgspec.Struct, frozen=True):
    """What is copied, and where to."""

    source: str
    target: str
    size: int
    """Of the source, in bytes."""
    session: str | None = None
    """The session's id; None: the source has none."""
    block: int = 1 << 20
    """Bytes."""
    bitmap: str | None = None
    """Only what is dirty there is copied."""
    algorithm: str | None = None
    """Of the checksums."""
    force: bool = False
    """What has the target's name already is replaced."""
    verify: bool = False
    """It is not complete before it was read back, and compared."""
    checksum: bool = False
    """The checksum is written beside it."""
    journal: int = VERSION


class JournalFile(Protocol):
    """Where the journal is kept. One call at a time."""

    @property
    def name(self) -> str:
        """Its path, for messages."""

    async def append(self, data: bytes) -> None:
        """Return when ``data`` is durable at the end."""

    async def replace(self, data: bytes) -> None:
        """Return when the content is ``data``, durably: it was the old one or is the new one at
        any moment."""

    async def remove(self) -> None:
        """Close it, and let it be gone, durably."""

    async def close(self) -> None:
        """Close it; it stays."""


class Journal:
    """The state that the records tell, and the file behind it."""

    def __init__(self, header: Header, file: JournalFile) -> None:
        """Nothing is durable yet, and nothing is written: ``begin`` does that."""
        self.header = header
        self.durable = Bitmap(header.size, header.block)
        """A bit for each block."""
        self.digests: dict[int, bytes] = {}
        """Of durable blocks; one that is missing here is of zeroes."""
        self.mark: str | None = None
        self._file = file
        self._length = 0
        self._compact_length = 0

    @classmethod
    def read(cls, content: bytes, file: JournalFile) -> Journal:
        """What an earlier pull has left. Raises OSError where that cannot be believed."""
        lines = content.split(b"\n")
        whole = lines[:-1]  # the last one, if it has no end, was never durable
        records = [_decode(line) for line in whole]
        if whole and records[-1] is None:
            records.pop()
        if not records:
            raise OSError(
                errno.EINVAL, f"{file.name} tells nothing: the pull that made it was killed at once"
            )
        if any(record is None for record in records):
            raise OSError(
                errno.EINVAL,
                f"{file.name} is damaged: what is durable can no longer be told from it",
            )
        known = [record for record in records if record is not None]
        try:
            if known[0].get("journal") != VERSION:
                raise OSError(
                    errno.EINVAL, f"{file.name} is no journal of this version of fleecenbd"
                )
            journal = cls(msgspec.convert(known[0], Header), file)
            for record in known[1:]:
                journal._take(record)
        except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
            raise OSError(errno.EINVAL, f"{file.name} makes no sense: {error}") from error
        return journal

    def _take(self, record: Mapping[str, Any]) -> None:
        digests = base64.b64decode(record.get("digests", ""))
        data = [(int(first), int(count)) for first, count in record.get("data", [])]
        zeroes = [(int(first), int(count)) for first, count in record.get("zeroes", [])]
        for first, count in (*data, *zeroes):
            if not 0 <= first < first + count <= self.durable.clusters:
                raise ValueError(f"blocks {first} to {first + count} of {self.durable.clusters}")
            self.durable.bits[first : first + count] = 1
        if digests:
            blocks = [block for first, count in data for block in range(first, first + count)]
            length, rest = divmod(len(digests), len(blocks)) if blocks else (0, 1)
            if rest:
                raise ValueError("digests do not fit the blocks")
            for index, block in enumerate(blocks):
                self.digests[block] = digests[index * length : (index + 1) * length]
        self.mark = record.get("mark", self.mark)

    async def begin(self) -> None:
        """Write all that is known, as short as can be: a new journal, or one taken up again."""
        content = self._compact()
        await self._file.replace(content)
        self._length = self._compact_length = len(content)

    async def add(
        self,
        data: Iterable[tuple[int, int]],
        zeroes: Iterable[tuple[int, int]],
        digests: Mapping[int, bytes],
    ) -> None:
        """Blocks (first, count) are durable in the target; returns when that is durable here.

        ``digests``: of the blocks of ``data``, all of them or none.
        """
        data, zeroes = list(data), list(zeroes)
        line = _encode(_blocks_record(data, zeroes, digests))
        await self._file.append(line)
        self._length += len(line)
        for first, count in (*data, *zeroes):
            self.durable.bits[first : first + count] = 1
        self.digests.update(digests)
        if self._length > max(COMPACT_LENGTH_MIN, 2 * self._compact_length):
            await self.begin()

    async def forget(self, blocks: Iterable[int]) -> None:
        """These are not durable after all; returns when that is durable here."""
        for block in blocks:
            self.durable.bits[block] = 0
            self.digests.pop(block, None)
        await self.begin()

    async def set_mark(self, mark: str) -> None:
        """COMPLETING or COMPLETE, durably."""
        await self._file.append(_encode({"mark": mark}))
        self.mark = mark

    async def remove(self) -> None:
        """The target tells by its name that it is complete."""
        await self._file.remove()

    async def close(self) -> None:
        """It stays, for ``--resume``."""
        await self._file.close()

    def _compact(self) -> bytes:
        lines = [_encode(msgspec.to_builtins(self.header))]
        durable = self.durable.bits[: self.durable.clusters]
        if self.digests:
            held = bitarray(len(durable), endian="little")
            held.setall(0)
            held[list(self.digests)] = 1
            data, zeroes = _runs(held & durable), _runs(durable & ~held)
        else:
            data, zeroes = _runs(durable), []
        if data or zeroes:
            lines.append(_encode(_blocks_record(data, zeroes, self.digests)))
        if self.mark is not None:
            lines.append(_encode({"mark": self.mark}))
        return b"".join(lines)


def session_of(content: bytes) -> str | None:
    """Of which session a journal tells; None: of none, or it cannot be believed."""
    header = _decode(content.partition(b"\n")[0])
    return None if header is None else header.get("session")


def _runs(bits: bitarray) -> list[tuple[int, int]]:
    return [(first, end - first) for first, end in cluster_runs(bits, 0, len(bits))]


def _blocks_record(
    data: list[tuple[int, int]], zeroes: list[tuple[int, int]], digests: Mapping[int, bytes]
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if data:
        record["data"] = data
        if digests:
            blocks = (block for first, count in data for block in range(first, first + count))
            record["digests"] = base64.b64encode(
                b"".join(map(digests.__getitem__, blocks))
            ).decode()
    if zeroes:
        record["zeroes"] = zeroes
    return record


def _encode(record: object) -> bytes:
    body = msgspec.json.encode(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _decode(line: bytes) -> dict[str, Any] | None:
    """None for a line that was not written whole."""
    crc, _, body = line.partition(b" ")
    try:
        if len(crc) != 8 or int.from_bytes(binascii.unhexlify(crc), "big") != zlib.crc32(body):
            return None
        record = msgspec.json.decode(body)
    except (binascii.Error, msgspec.DecodeError):
        return None
    return record if isinstance(record, dict) else None
