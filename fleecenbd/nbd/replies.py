"""Replies of the transmission phase: simple, structured, extended. Plain calls, bytes out.

Wire layout, big-endian (specification, "Simple reply message" and the two after it):

    simple      u32 0x67446698  u32 error  u64 cookie                                  16 bytes
    structured  u32 0x668e33ef  u16 flags  u16 type  u64 cookie  u32 length            20 bytes
    extended    u32 0x6e8a278c  u16 flags  u16 type  u64 cookie  u64 offset  u64 length  32 bytes

and the payloads of the latter two:

    OFFSET_DATA       u64 offset, data
    OFFSET_HOLE       u64 offset, u32 length
    BLOCK_STATUS      u32 context id, n * (u32 length, u32 flags)
    BLOCK_STATUS_EXT  u32 context id, u32 n, n * (u64 length, u64 flags)
    ERROR             u32 error, u16 n, n bytes of text
    ERROR_OFFSET      the same, u64 offset

The header of an extended chunk repeats the offset of the request, not the chunk's.

Three classes with the same calls; none keeps state, none checks what the caller promises:
extents are merged and not empty, they sum up to the request's length at most, errors are
NBD errors, offsets lie inside the request. What a call returns is whole: written in one go,
no other reply can come in between (nor may one).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from struct import Struct, pack
from typing import Final, TypeAlias

from fleecenbd.nbd.constants import (
    ERROR_TEXT_MAX,
    EXTENT_LENGTH_MAX,
    EXTENTS_MAX,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    PAYLOAD_ADVERTISED,
)
from fleecenbd.nbd.errors import cut_text

Buffer: TypeAlias = bytes | bytearray | memoryview
Contexts: TypeAlias = list[tuple[int, list[tuple[int, int]]]]
"""[(context id, [(length in bytes, flags), ...]), ...]."""
Piece: TypeAlias = tuple[bool, int, int]
"""(reads as zeroes, begin, end) of reply data."""

ZERO_BLOCK: Final = 64 * 1024
"""Bytes: zeroes inside a longer reply are looked for in aligned blocks of this size."""
_ZEROES: Final = bytes(ZERO_BLOCK)
_ZEROES_VIEW: Final = memoryview(_ZEROES)

_SIMPLE = Struct(">IIQ").pack
_CHUNK = Struct(">IHHQI").pack
_CHUNK_DATA = Struct(">IHHQIQ").pack
_CHUNK_HOLE = Struct(">IHHQIQI").pack
_CHUNK_STATUS_ONE = Struct(">IHHQIIII").pack
_EXTENDED = Struct(">IHHQQQ").pack
_EXTENDED_DATA = Struct(">IHHQQQQ").pack
_EXTENDED_HOLE = Struct(">IHHQQQQI").pack
_EXTENDED_STATUS_ONE = Struct(">IHHQQQIIQQ").pack
_ERROR = Struct(">IH").pack


def _reads_as_zeroes(data: bytes | bytearray) -> bool:
    """Whether all of ``data`` is zero; at the price of one memcmp, and less for most data."""
    if data[0]:
        return False
    length = len(data)
    if length <= ZERO_BLOCK:
        return data.startswith(_ZEROES_VIEW[:length])
    # Compared with itself, one block on: memcmp over the whole, no buffer of its size.
    if not data.startswith(_ZEROES):
        return False
    view = memoryview(data)
    return data.startswith(view[: length - ZERO_BLOCK], ZERO_BLOCK)


def _pieces(offset: int, data: bytes | bytearray) -> Iterator[Piece]:
    """``data`` cut into runs of zeroes and of data; cuts lie on aligned blocks of the export."""
    length = len(data)
    zero: bool | None = None
    begin = 0
    block = 0
    while block < length:
        end = min(block + ZERO_BLOCK - (offset + block) % ZERO_BLOCK, length)
        block_zero = not data[block] and data.startswith(_ZEROES_VIEW[: end - block], block)
        if block_zero is not zero:
            if zero is not None:
                yield zero, begin, block
            zero = block_zero
            begin = block
        block = end
    yield bool(zero), begin, length


def _data_pieces(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same with data cut at the advertised maximum payload: no chunk may be longer."""
    for zero, begin, end in pieces:
        while not zero and end - begin > PAYLOAD_ADVERTISED:
            yield False, begin, begin + PAYLOAD_ADVERTISED
            begin += PAYLOAD_ADVERTISED
        yield zero, begin, end


class SimpleReplies:
    """Replies for a client that agreed on nothing."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Success of anything but NBD_CMD_READ."""
        return _SIMPLE(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(
        self,
        cookie: int,
        offset: int,
        error: int,
        text: str = "",
        *,
        is_read: bool = False,
        error_offset: int | None = None,
    ) -> bytes:
        """Failure. A simple reply has no place for ``text`` and ``error_offset``."""
        return _SIMPLE(NBD_SIMPLE_REPLY_MAGIC, error, cookie)

    def read(
        self, cookie: int, offset: int, data: bytes | bytearray, *, dont_fragment: bool = False
    ) -> list[Buffer]:
        """Success of NBD_CMD_READ; ``data`` is exactly what was asked for, and is not copied."""
        return [_SIMPLE(NBD_SIMPLE_REPLY_MAGIC, 0, cookie), data]

    def block_status(
        self, cookie: int, offset: int, contexts: Contexts, *, req_one: bool
    ) -> list[Buffer]:
        """Never called: RequestRules refuses NBD_CMD_BLOCK_STATUS without structured replies."""
        raise AssertionError("a simple reply cannot carry block status")


class StructuredReplies:
    """Replies after NBD_OPT_STRUCTURED_REPLY."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Success of anything but NBD_CMD_READ: a simple reply is allowed, and shorter."""
        return _SIMPLE(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(
        self,
        cookie: int,
        offset: int,
        error: int,
        text: str = "",
        *,
        is_read: bool = False,
        error_offset: int | None = None,
    ) -> bytes:
        """Failure of any request: one chunk, which ends the reply."""
        kind, payload = _error_payload(error, text, error_offset)
        return (
            _CHUNK(NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, kind, cookie, len(payload))
            + payload
        )

    def read(
        self, cookie: int, offset: int, data: bytes | bytearray, *, dont_fragment: bool = False
    ) -> list[Buffer]:
        """Success of NBD_CMD_READ: [header, data, ...]; zeroes are holes, data is not copied.

        ``data`` is at least one byte. ``dont_fragment``: one chunk, whatever it holds.
        """
        length = len(data)
        if _reads_as_zeroes(data):
            return [self._hole(NBD_REPLY_FLAG_DONE, cookie, offset, offset, length)]
        if dont_fragment or length <= ZERO_BLOCK:
            return [self._data(NBD_REPLY_FLAG_DONE, cookie, offset, offset, length), data]
        reply: list[Buffer] = []
        view = memoryview(data)
        for zero, begin, end in _data_pieces(_pieces(offset, data)):
            flags = NBD_REPLY_FLAG_DONE if end == length else 0
            if zero:
                reply.append(self._hole(flags, cookie, offset, offset + begin, end - begin))
            else:
                reply.append(self._data(flags, cookie, offset, offset + begin, end - begin))
                reply.append(data if end - begin == length else view[begin:end])
        return reply

    def block_status(
        self, cookie: int, offset: int, contexts: Contexts, *, req_one: bool
    ) -> list[Buffer]:
        """Success of NBD_CMD_BLOCK_STATUS: one chunk per context, in the order given.

        Each context has at least one extent. A reply may describe less than was asked for: it
        ends at EXTENTS_MAX extents, and where an extent had to be cut; with ``req_one`` after
        the first. Only the last chunk has NBD_REPLY_FLAG_DONE.
        """
        last = len(contexts) - 1
        return [
            self._status(
                NBD_REPLY_FLAG_DONE if index == last else 0,
                cookie,
                offset,
                context_id,
                extents[: 1 if req_one else EXTENTS_MAX],
            )
            for index, (context_id, extents) in enumerate(contexts)
        ]

    def _data(
        self, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> bytes:
        return _CHUNK_DATA(
            NBD_STRUCTURED_REPLY_MAGIC,
            flags,
            NBD_REPLY_TYPE_OFFSET_DATA,
            cookie,
            8 + length,
            offset,
        )

    def _hole(
        self, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> bytes:
        return _CHUNK_HOLE(
            NBD_STRUCTURED_REPLY_MAGIC,
            flags,
            NBD_REPLY_TYPE_OFFSET_HOLE,
            cookie,
            12,
            offset,
            length,
        )

    def _status(
        self,
        flags: int,
        cookie: int,
        offset: int,
        context_id: int,
        extents: list[tuple[int, int]],
    ) -> bytes:
        kind = NBD_REPLY_TYPE_BLOCK_STATUS
        magic = NBD_STRUCTURED_REPLY_MAGIC
        if len(extents) == 1:
            ((length, state),) = extents
            length = min(length, EXTENT_LENGTH_MAX)
            return _CHUNK_STATUS_ONE(magic, flags, kind, cookie, 12, context_id, length, state)
        if max(extents)[0] > EXTENT_LENGTH_MAX:
            extents = _cut_at_long_extent(extents)
        return _CHUNK(magic, flags, kind, cookie, 4 + 8 * len(extents)) + pack(
            f">{1 + 2 * len(extents)}I", context_id, *chain.from_iterable(extents)
        )


class ExtendedReplies(StructuredReplies):
    """Replies after NBD_OPT_EXTENDED_HEADERS: every reply is an extended one."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Success of anything but NBD_CMD_READ."""
        return _EXTENDED(
            NBD_EXTENDED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, offset, 0
        )

    def error(
        self,
        cookie: int,
        offset: int,
        error: int,
        text: str = "",
        *,
        is_read: bool = False,
        error_offset: int | None = None,
    ) -> bytes:
        """Failure of any request: one chunk, which ends the reply."""
        kind, payload = _error_payload(error, text, error_offset)
        return (
            _EXTENDED(
                NBD_EXTENDED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, kind, cookie, offset, len(payload)
            )
            + payload
        )

    def _data(
        self, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> bytes:
        return _EXTENDED_DATA(
            NBD_EXTENDED_REPLY_MAGIC,
            flags,
            NBD_REPLY_TYPE_OFFSET_DATA,
            cookie,
            request_offset,
            8 + length,
            offset,
        )

    def _hole(
        self, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> bytes:
        return _EXTENDED_HOLE(
            NBD_EXTENDED_REPLY_MAGIC,
            flags,
            NBD_REPLY_TYPE_OFFSET_HOLE,
            cookie,
            request_offset,
            12,
            offset,
            length,
        )

    def _status(
        self,
        flags: int,
        cookie: int,
        offset: int,
        context_id: int,
        extents: list[tuple[int, int]],
    ) -> bytes:
        magic = NBD_EXTENDED_REPLY_MAGIC
        kind = NBD_REPLY_TYPE_BLOCK_STATUS_EXT
        count = len(extents)
        if count == 1:
            ((length, state),) = extents
            return _EXTENDED_STATUS_ONE(
                magic, flags, kind, cookie, offset, 24, context_id, 1, length, state
            )
        return _EXTENDED(magic, flags, kind, cookie, offset, 8 + 16 * count) + pack(
            f">II{2 * count}Q", context_id, count, *chain.from_iterable(extents)
        )


def _cut_at_long_extent(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents up to the first that is too long for a compact reply, and a part of that one."""
    index = next(index for index, (length, _) in enumerate(extents) if length > EXTENT_LENGTH_MAX)
    return [*extents[:index], (EXTENT_LENGTH_MAX, extents[index][1])]


def _error_payload(error: int, text: str, error_offset: int | None) -> tuple[int, bytes]:
    """(chunk type, payload) of an error chunk."""
    assert error, "an error chunk must not say 0"
    message = cut_text(text, ERROR_TEXT_MAX)
    payload = _ERROR(error, len(message)) + message
    if error_offset is None:
        return NBD_REPLY_TYPE_ERROR, payload
    return NBD_REPLY_TYPE_ERROR_OFFSET, payload + error_offset.to_bytes(8, "big")
