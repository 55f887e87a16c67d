"""The client's side of the wire, written from the specification and from nothing in fleecenbd.

Numbers are spelled out here, so that a wrong constant of the server's is seen. Nothing here
does I/O: make bytes with ``client_flags``, ``option`` and ``request``; understand bytes with
``parse_greeting``, ``parse_option_replies`` and ``ReplyReader``, which raise WireError at
whatever a strict client may drop the connection for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import pack, unpack, unpack_from

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
(
    ERR_UNSUP,
    ERR_POLICY,
    ERR_INVALID,
    ERR_PLATFORM,
    ERR_TLS_REQD,
    ERR_UNKNOWN,
    ERR_SHUTDOWN,
    ERR_BLOCK_SIZE_REQD,
    ERR_TOO_BIG,
    ERR_EXT_HEADER_REQD,
) = range(0x80000001, 0x8000000B)

SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"
ERRORS_ALLOWED = frozenset((1, 5, 12, 22, 28, 75, 95, 108))


class WireError(Exception):
    """The server sent what it must not send."""


def require(holds: bool, text: str) -> None:
    if not holds:
        raise WireError(text)


# The handshake


def client_flags(*, fixed: bool = True, no_zeroes: bool = True) -> bytes:
    return pack(">I", fixed + 2 * no_zeroes)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def info_data(name: str, *types: int) -> bytes:
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""
    raw = name.encode()
    return pack(">I", len(raw)) + raw + pack(f">{1 + len(types)}H", len(types), *types)


def meta_data(name: str, *queries: str) -> bytes:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    raw = name.encode()
    data = pack(">I", len(raw)) + raw + pack(">I", len(queries))
    for query in queries:
        data += pack(">I", len(query.encode())) + query.encode()
    return data


def parse_greeting(data: bytes) -> int:
    """Handshake flags."""
    require(len(data) == 18, f"a greeting of {len(data)} bytes")
    require(data[:16] == b"NBDMAGICIHAVEOPT", "the greeting's magic is wrong")
    return int.from_bytes(data[16:], "big")


@dataclass(frozen=True)
class OptionReply:
    option: int
    kind: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return self.kind >= 1 << 31

    @property
    def text(self) -> str:
        """Of an error."""
        return self.data.decode()


def parse_option_replies(data: bytes) -> list[OptionReply]:
    """All replies in ``data``, which must hold nothing else."""
    replies = []
    while data:
        require(len(data) >= 20, "an option reply ends inside its header")
        magic, number, kind, length = unpack_from(">QIII", data)
        require(magic == 0x3E889045565A9, f"an option reply begins with {magic:#x}")
        require(len(data) >= 20 + length, "an option reply ends inside its data")
        replies.append(OptionReply(number, kind, data[20 : 20 + length]))
        require(kind != ACK or length == 0, "an ACK with data")
        data = data[20 + length :]
    return replies


@dataclass
class ExportSeen:
    """What the NBD_REP_INFO replies say."""

    size: int | None = None
    flags: int | None = None
    name: str | None = None
    description: str | None = None
    block_size: tuple[int, int, int] | None = None


def parse_infos(replies: list[OptionReply]) -> ExportSeen:
    """Of a successful NBD_OPT_INFO or NBD_OPT_GO."""
    seen = ExportSeen()
    require(replies[-1].kind == ACK, "the final reply is not an ACK")
    kinds = []
    for reply in replies[:-1]:
        require(reply.kind == INFO, f"reply type {reply.kind} among infos")
        (kind,) = unpack_from(">H", reply.data)
        body = reply.data[2:]
        kinds.append(kind)
        if kind == 0:
            require(len(reply.data) == 12, "NBD_INFO_EXPORT is not 12 bytes")
            seen.size, seen.flags = unpack(">QH", body)
        elif kind == 1:
            seen.name = body.decode()
        elif kind == 2:
            seen.description = body.decode()
        elif kind == 3:
            require(len(reply.data) == 14, "NBD_INFO_BLOCK_SIZE is not 14 bytes")
            seen.block_size = unpack(">III", body)
    require(0 in kinds, "NBD_INFO_EXPORT is missing")
    require(len(set(kinds)) == len(kinds), "an information type came twice")
    return seen


def parse_contexts(replies: list[OptionReply]) -> list[tuple[int, str]]:
    """(id, name) of a successful NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT."""
    require(replies[-1].kind == ACK, "the final reply is not an ACK")
    contexts = []
    for reply in replies[:-1]:
        require(reply.kind == META_CONTEXT, f"reply type {reply.kind} among contexts")
        contexts.append((int.from_bytes(reply.data[:4], "big"), reply.data[4:].decode()))
    return contexts


# Transmission


def request(
    command: int,
    cookie: int = 1,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    payload: bytes = b"",
    extended: bool = False,
) -> bytes:
    """One request. An extended WRITE gets PAYLOAD_LEN with its payload."""
    if extended:
        if command == WRITE and payload:
            flags |= PAYLOAD_LEN
        header = pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    else:
        header = pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
    return header + payload


@dataclass
class Reply:
    """A reply that is complete."""

    cookie: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytes | None = None
    contexts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """(chunk type, payload length) in order; empty for a simple reply."""


@dataclass
class _Asked:
    command: int
    offset: int
    length: int
    flags: int
    contexts: tuple[int, ...]
    reply: Reply
    covered: list[tuple[int, int]] = field(default_factory=list)
    buffer: bytearray = field(default_factory=bytearray)


class ReplyReader:
    """Understands replies; ``mode`` is SIMPLE, STRUCTURED or EXTENDED.

    Say what was asked with ``asked``, then ``feed`` bytes: what it returns are the replies that
    they complete. ``chunk_max``: payload of a chunk that is not data (QEMU: 1000).
    """

    def __init__(self, mode: str, *, chunk_max: int = 1000, data_max: int = 32 << 20) -> None:
        self.mode = mode
        self.chunk_max = chunk_max
        self.data_max = data_max
        self._buffer = bytearray()
        self._asked: dict[int, _Asked] = {}

    def asked(
        self,
        command: int,
        cookie: int = 1,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        contexts: tuple[int, ...] = (),
    ) -> None:
        require(cookie not in self._asked, f"cookie {cookie} is in flight")
        self._asked[cookie] = _Asked(command, offset, length, flags, contexts, Reply(cookie))

    @property
    def in_flight(self) -> int:
        return len(self._asked)

    @property
    def pending(self) -> int:
        """Bytes that make no whole message yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Reply]:
        self._buffer += data
        replies = []
        while (message := self._message()) is not None:
            if message.cookie in self._asked:
                continue
            replies.append(message)
        return replies

    def _message(self) -> Reply | None:
        """Take one message; its Reply, complete or not; None: more bytes are needed."""
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        magic = int.from_bytes(buffer[:4], "big")
        if magic == 0x67446698:
            return self._simple()
        require(self.mode != SIMPLE, f"magic {magic:#x} where only simple replies are allowed")
        if self.mode == STRUCTURED:
            require(magic == 0x668E33EF, f"magic {magic:#x} of a structured reply")
            header_size = 20
        else:
            require(magic == 0x6E8A278C, f"magic {magic:#x} of an extended reply")
            header_size = 32
        if len(buffer) < header_size:
            return None
        if self.mode == STRUCTURED:
            flags, kind, cookie, length = unpack_from(">HHQI", buffer, 4)
        else:
            flags, kind, cookie, offset, length = unpack_from(">HHQQQ", buffer, 4)
        if len(buffer) < header_size + length:
            return None
        asked = self._asked.get(cookie)
        require(asked is not None, f"cookie {cookie} was not asked for")
        assert asked is not None
        if self.mode == EXTENDED:
            require(offset == asked.offset, "an extended reply with another offset")
        payload = bytes(buffer[header_size : header_size + length])
        del buffer[: header_size + length]
        require(flags in (0, 1), f"reply flags {flags:#x}")
        self._chunk(asked, kind, payload, done=flags == 1)
        return asked.reply

    def _simple(self) -> Reply | None:
        require(self.mode != EXTENDED, "a simple reply where extended ones were agreed on")
        if len(self._buffer) < 16:
            return None
        error, cookie = unpack_from(">IQ", self._buffer, 4)
        asked = self._asked.get(cookie)
        require(asked is not None, f"cookie {cookie} was not asked for")
        assert asked is not None
        require(error == 0 or error in ERRORS_ALLOWED, f"error {error}")
        end = 16
        if asked.command == READ:
            require(self.mode == SIMPLE, "a simple reply to a structured READ")
            if error == 0:
                end += asked.length
                if len(self._buffer) < end:
                    return None
                asked.reply.data = bytes(self._buffer[16:end])
        require(asked.command != BLOCK_STATUS or error != 0, "simple success of BLOCK_STATUS")
        asked.reply.error = error
        del self._buffer[:end]
        del self._asked[cookie]
        return asked.reply

    def _chunk(self, asked: _Asked, kind: int, payload: bytes, *, done: bool) -> None:
        reply = asked.reply
        reply.chunks.append((kind, len(payload)))
        require(kind == 1 or len(payload) <= self.chunk_max, f"{len(payload)} bytes of no data")
        if kind == 0:
            require(done and not payload, "NONE that is not final, or has a payload")
        elif kind == 1:
            require(len(payload) >= 9, "OFFSET_DATA without data")
            require(len(payload) - 8 <= self.data_max, "more data than the maximum payload")
            self._content(asked, int.from_bytes(payload[:8], "big"), payload[8:])
        elif kind == 2:
            require(len(payload) == 12, "OFFSET_HOLE of another length than 12")
            begin, length = unpack(">QI", payload)
            require(length > 0, "an empty hole")
            self._content(asked, begin, bytes(length))
        elif kind in (5, 6):
            require((kind == 6) == (self.mode == EXTENDED), "the other kind of block status")
            self._status(asked, kind, payload)
        elif kind in (0x8001, 0x8002):
            self._error(asked, kind, payload)
        else:
            raise WireError(f"chunk type {kind}")
        if done:
            self._finish(asked)

    def _content(self, asked: _Asked, begin: int, data: bytes) -> None:
        require(asked.command == READ, "content for another command than READ")
        end = begin + len(data)
        require(
            asked.offset <= begin and end <= asked.offset + asked.length, "content outside request"
        )
        for other_begin, other_end in asked.covered:
            require(end <= other_begin or other_end <= begin, "content that overlaps")
        require(not (asked.flags & DF and asked.covered), "two content chunks in spite of DF")
        asked.covered.append((begin, end))
        if not asked.buffer:
            asked.buffer = bytearray(asked.length)
        asked.buffer[begin - asked.offset : end - asked.offset] = data

    def _status(self, asked: _Asked, kind: int, payload: bytes) -> None:
        require(asked.command == BLOCK_STATUS, "block status for another command")
        if kind == 5:
            require(len(payload) >= 12 and (len(payload) - 4) % 8 == 0, "length of block status")
            count = (len(payload) - 4) // 8
            (context_id, *numbers) = unpack(f">{1 + 2 * count}I", payload)
        else:
            require(len(payload) >= 24 and (len(payload) - 8) % 16 == 0, "length of block status")
            count = (len(payload) - 8) // 16
            (context_id, said, *numbers) = unpack(f">II{2 * count}Q", payload)
            require(said == count, "the count of descriptors")
        extents = list(zip(numbers[::2], numbers[1::2], strict=True))
        require(context_id in asked.contexts, f"context id {context_id} was not asked for")
        require(context_id not in asked.reply.contexts, "a context twice")
        require(all(length > 0 for length, _ in extents), "an extent of length 0")
        before = sum(length for length, _ in extents[:-1])
        require(len(extents) == 1 or before < asked.length, "extents go on past the request")
        if asked.flags & REQ_ONE:
            require(len(extents) == 1, "more than one extent in spite of REQ_ONE")
            require(extents[0][0] <= asked.length, "an extent longer than asked with REQ_ONE")
        asked.reply.contexts[context_id] = extents

    def _error(self, asked: _Asked, kind: int, payload: bytes) -> None:
        tail = 8 if kind == 0x8002 else 0
        require(len(payload) >= 6 + tail, "a short error chunk")
        error, length = unpack_from(">IH", payload)
        require(error in ERRORS_ALLOWED, f"error {error}")
        require(len(payload) == 6 + length + tail, "an error chunk with bytes left over")
        asked.reply.error = error
        asked.reply.text = payload[6 : 6 + length].decode()
        if tail:
            where = int.from_bytes(payload[-8:], "big")
            require(
                asked.offset <= where < asked.offset + asked.length, "an error outside the request"
            )
            asked.reply.error_offset = where

    def _finish(self, asked: _Asked) -> None:
        reply = asked.reply
        if reply.error == 0 and asked.command == READ:
            covered = sum(end - begin for begin, end in asked.covered)
            require(covered == asked.length, f"{covered} of {asked.length} bytes came")
            reply.data = bytes(asked.buffer)
        if reply.error == 0 and asked.command == BLOCK_STATUS:
            require(set(reply.contexts) == set(asked.contexts), "a context is missing")
        del self._asked[reply.cookie]
