"""What holds for any bytes that a client may send; fuzzers and hypothesis look for bytes where not.

    handshake   ProtocolError or nothing; the same answers whatever the split; replies that a
                strict client understands; no more than one option's data kept
    requests    ProtocolError or nothing; the requests that the specification's layout says they
                are, whatever the split; no more than one payload kept; a request that the rules let
                through is inside the export; a refusal is a reply that a strict client takes

``decode`` is a decoder written from the specification alone, the simplest there can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import unpack_from

from fleecenbd.nbd.catalog import ExportInfo
from fleecenbd.nbd.errors import NegotiationError, ProtocolError
from fleecenbd.nbd.handshake import Handshake, HandshakeLimits
from fleecenbd.nbd.transmission import (
    ExtendedReplies,
    RequestDecoder,
    SimpleReplies,
    StructuredReplies,
)
from fleecenbd.nbd.validation import RequestRules
from tests.nbd import wire
from tests.wire import framing

OPTION_DATA_MAX, OPTION_DATA_DROP = 300, 900
PAYLOAD_MAX = 200
SIZE = 1 << 20
FILTER_MAX = 8 + 4 * 256

GUEST_FLAGS, READ_ONLY_FLAGS, FLEECING_FLAGS = 0b1100_0110_1101, 0b0100_0000_1111, 0b1_0010_0101
CONTEXTS = ("base:allocation", "x-fleecenbd:access")

EXPORTS = {
    "vm": ExportInfo("vm", "a disk", SIZE, GUEST_FLAGS, 1, 65536, 32 << 20, CONTEXTS[:1]),
    "vm@n": ExportInfo("vm@n", "", SIZE, FLEECING_FLAGS, 1, 65536, 32 << 20, CONTEXTS),
}


class Exports:
    """Two exports, and one that is busy."""

    def list(self) -> list[tuple[str, str]]:
        return [(info.name, info.description) for info in EXPORTS.values()]

    def info(self, name: str) -> ExportInfo:
        if name == "busy":
            raise NegotiationError(wire.ERR_POLICY, "no place is free")
        if name not in EXPORTS:
            raise NegotiationError(wire.ERR_UNKNOWN, f"no export {name!r}")
        return EXPORTS[name]

    def open(self, name: str) -> tuple[ExportInfo, object]:
        return self.info(name), name


# The handshake


def handshake(data: bytes) -> None:
    """Bit 0 of the choices: raw; bit 1: the server is shutting down."""
    choices, dice, rest = framing.head(data)
    stream = rest if choices & 1 else framing.made_options(rest)
    stopping = bool(choices & 2)
    whole = _converse([stream], stopping)
    parts = _converse(framing.splits(stream, dice), stopping)
    assert parts.error == whole.error
    if whole.error is None:
        assert parts == whole, "the answers depend on how the bytes were split"
    # Replies before the option that broke the protocol are only seen where they were sent.
    _understood(parts.replied)


@dataclass
class Conversation:
    replied: bytes = b""
    end: object = False
    left: bytes = b""
    error: str | None = None


def _converse(pieces: Iterable[bytes], stopping: bool) -> Conversation:
    limits = HandshakeLimits(option_data_max=OPTION_DATA_MAX, option_data_drop=OPTION_DATA_DROP)
    server = Handshake(Exports(), limits=limits)
    server.shutting_down = stopping
    seen = Conversation()
    over = False
    for piece in pieces:
        if over:
            seen.left += piece
            continue
        try:
            answer = server.receive_data(piece)
        except ProtocolError as error:
            seen.error = str(error)
            assert seen.error
            return seen
        seen.replied += answer
        seen.end = server.negotiated or server.ended
        over = bool(seen.end)
        if over:
            seen.left = server.leftover
        else:
            assert len(server._buffer) < OPTION_DATA_MAX + 1, "more was kept than one option's data"
    return seen


def _understood(replied: bytes) -> None:
    """Option replies, of which the last may be the bare answer to NBD_OPT_EXPORT_NAME."""
    position = 0
    options = 0
    while position < len(replied):
        if replied[position : position + 8] != (0x3E889045565A9).to_bytes(8, "big"):
            assert len(replied) - position in (10, 134), "neither a reply nor size and flags"
            return
        _, kind, length = unpack_from(">III", replied, position + 8)
        body = replied[position + 20 : position + 20 + length]
        assert len(body) == length
        if kind >= 1 << 31:
            assert kind <= wire.ERR_EXT_HEADER_REQD
            assert len(body) <= 4096
            body.decode()
        else:
            wire.require(kind in (1, 2, 3, 4), f"reply type {kind}")
            wire.require(kind != wire.ACK or not body, "an ACK with data")
        options += kind == wire.ACK or kind >= 1 << 31
        position += 20 + length
    assert options <= 32 + 32 * len(EXPORTS), "more options than one connection has"


# Requests

Plain = tuple[int, int, int, int, int, bytes | None]


def requests(data: bytes) -> None:
    """Bit 0 of the choices: raw; bit 1: extended; 2 and 3: what export; 4: contexts; 5: simple."""
    choices, dice, rest = framing.head(data)
    extended = bool(choices & 2)
    stream = rest if choices & 1 else framing.made_requests(rest, extended=extended)
    expected, broken = decode(stream, extended=extended)
    assert _decoded([stream], extended) == (expected, broken)
    assert _decoded(framing.splits(stream, dice), extended) == (expected, broken)
    mode = wire.EXTENDED if extended else wire.SIMPLE if choices & 32 else wire.STRUCTURED
    _judged(expected, (choices >> 2) % 4, contexts=bool(choices & 16), mode=mode)


def decode(stream: bytes, *, extended: bool) -> tuple[list[Plain], bool]:
    """(requests, whether the stream breaks off there with an error of the protocol)."""
    found: list[Plain] = []
    size, layout = (32, ">IHHQQQ") if extended else (28, ">IHHQQI")
    while len(stream) >= size:
        magic, flags, command, cookie, offset, length = unpack_from(layout, stream)
        if magic != (0x21E41C71 if extended else 0x25609513):
            return found, True
        stream = stream[size:]
        payload = None
        announced = extended and flags & wire.PAYLOAD_LEN and command != wire.DISC
        if command == wire.WRITE or announced:
            if length > PAYLOAD_MAX:
                return found, True
            if len(stream) < length:
                break
            payload, stream = stream[:length], stream[length:]
            if command not in (wire.WRITE, wire.BLOCK_STATUS):
                payload = b""
        found.append((flags, command, cookie, offset, length, payload))
    return found, False


def _decoded(pieces: Iterable[bytes], extended: bool) -> tuple[list[Plain], bool]:
    decoder = RequestDecoder(extended=extended, payload_max=PAYLOAD_MAX)
    found: list[Plain] = []
    for piece in pieces:
        decoder.feed(piece)
        try:
            while (request := decoder.next_request()) is not None:
                payload = request[5]
                found.append((*request[:5], None if payload is None else bytes(payload)))
        except ProtocolError:
            return found, True
        assert 0 <= decoder.buffered <= max(PAYLOAD_MAX, 31), "more was kept than one payload"
    return found, False


def _judged(found: list[Plain], export: int, *, contexts: bool, mode: str) -> None:
    flags = (GUEST_FLAGS, READ_ONLY_FLAGS, FLEECING_FLAGS, GUEST_FLAGS)[export]
    ids = (1, 2) if contexts else ()
    rules = RequestRules(
        flags=flags,
        size=SIZE,
        extended=mode == wire.EXTENDED,
        structured=mode != wire.SIMPLE,
        contexts=contexts,
        context_ids=ids,
        block_minimum=512 if export == 3 else 1,
    )
    replies = {
        wire.SIMPLE: SimpleReplies,
        wire.STRUCTURED: StructuredReplies,
        wire.EXTENDED: ExtendedReplies,
    }[mode]()
    for request in found:
        bits, command, cookie, offset, length, _ = request
        refused = rules.check(request)
        if command == wire.DISC:
            assert refused is None
        elif refused is None:
            _may_be_served(request, flags, ids, mode)
        else:
            error, text = refused
            assert text
            reader = wire.ReplyReader(mode)
            reader.asked(command, cookie, offset, length, flags=bits, contexts=ids)
            sent = replies.error(cookie, offset, error, text, is_read=command == wire.READ)
            (reply,) = reader.feed(bytes(sent))
            assert reply.error == error
            assert reply.error in (1, 22, 28, 75)


def _may_be_served(request: Plain, flags: int, ids: tuple[int, ...], mode: str) -> None:
    """What whoever serves a request relies on, whatever its kind."""
    bits, command, _, offset, length, payload = request
    assert command < 8
    if command == wire.FLUSH:
        return
    if command == wire.BLOCK_STATUS:
        assert ids
        assert mode != wire.SIMPLE
        if bits & wire.PAYLOAD_LEN:
            assert payload is not None
            length = int.from_bytes(payload[:8], "big")
            chosen = [
                int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)
            ]
            assert set(chosen) <= set(ids)
            assert chosen
    assert length > 0
    assert offset + length <= SIZE
    if command in (wire.WRITE, wire.TRIM, wire.WRITE_ZEROES):
        assert not flags & 2, "a change of a read-only export"
    if command == wire.WRITE:
        assert payload is not None
        assert len(payload) == length
    assert not bits & ~0x3F, "a flag that nobody knows"
    if bits & wire.PAYLOAD_LEN:
        assert mode == wire.EXTENDED
        assert command in (wire.WRITE, wire.BLOCK_STATUS)
    if bits & wire.FUA:
        assert flags & 8
