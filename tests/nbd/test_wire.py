"""The checker counts once planted bugs have shown that it catches."""

from struct import pack

import pytest

from tests.nbd import wire


def structured(flags: int, kind: int, payload: bytes, cookie: int = 1) -> bytes:
    return pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def extended(flags: int, kind: int, payload: bytes, offset: int = 0) -> bytes:
    return pack(">IHHQQQ", 0x6E8A278C, flags, kind, 1, offset, len(payload)) + payload


def data(offset: int, content: bytes) -> bytes:
    return pack(">Q", offset) + content


SIMPLE_OK = pack(">IIQ", 0x67446698, 0, 1)

BAD_READS = {
    "simple reply": SIMPLE_OK,
    "none without done": structured(0, 0, b""),
    "none with payload": structured(1, 0, b"x"),
    "no data": structured(1, 1, data(0, b"")),
    "outside": structured(1, 1, data(1, b"12345678")),
    "before": structured(1, 1, data(0, b"12345678") + b"9"),
    "short": structured(1, 1, data(0, b"1234")),
    "overlap": structured(0, 1, data(0, b"12345")) + structured(1, 1, data(4, b"5678")),
    "empty hole": structured(1, 2, pack(">QI", 0, 0)),
    "long hole": structured(1, 2, pack(">QIB", 0, 8, 0)),
    "error zero": structured(1, 0x8001, pack(">IH", 0, 0)),
    "host errno": structured(1, 0x8001, pack(">IH", 13, 0)),
    "error tail": structured(1, 0x8001, pack(">IHB", 22, 0, 0)),
    "error outside": structured(1, 0x8002, pack(">IHQ", 22, 0, 8)),
    "long text": structured(1, 0x8001, pack(">IH", 22, 2000) + bytes(2000)),
    "block status": structured(1, 5, pack(">III", 1, 8, 0)),
    "unknown chunk": structured(1, 9, b""),
    "unknown flag": structured(3, 1, data(0, b"12345678")),
    "unknown cookie": structured(1, 1, data(0, b"12345678"), cookie=9),
    "extended": extended(1, 1, data(0, b"12345678")),
}


@pytest.mark.parametrize("sent", BAD_READS.values(), ids=BAD_READS.keys())
def test_a_bad_reply_to_a_structured_read_is_caught(sent: bytes) -> None:
    reader = wire.ReplyReader(wire.STRUCTURED)
    reader.asked(wire.READ, 1, 0, 8)
    with pytest.raises(wire.WireError):
        reader.feed(sent)


def test_two_content_chunks_with_df_are_caught() -> None:
    sent = structured(0, 1, data(0, b"1234")) + structured(1, 1, data(4, b"5678"))
    reader = wire.ReplyReader(wire.STRUCTURED)
    reader.asked(wire.READ, 1, 0, 8)
    assert [reply.data for reply in reader.feed(sent)] == [b"12345678"]
    reader.asked(wire.READ, 1, 0, 8, flags=wire.DF)
    with pytest.raises(wire.WireError):
        reader.feed(sent)


BAD_STATUSES = {
    "simple success": SIMPLE_OK,
    "wide": structured(1, 6, pack(">IIQQ", 1, 1, 8, 0)),
    "no extent": structured(1, 5, pack(">I", 1)),
    "odd length": structured(1, 5, pack(">IIII", 1, 8, 0, 0)),
    "wrong context": structured(1, 5, pack(">III", 2, 8, 0)),
    "twice": structured(0, 5, pack(">III", 1, 8, 0)) + structured(1, 5, pack(">III", 1, 8, 0)),
    "zero extent": structured(1, 5, pack(">III", 1, 0, 0)),
    "past the request": structured(1, 5, pack(">IIIII", 1, 8, 0, 8, 0)),
    "missing": structured(1, 0, b""),
}


@pytest.mark.parametrize("sent", BAD_STATUSES.values(), ids=BAD_STATUSES.keys())
def test_a_bad_block_status_is_caught(sent: bytes) -> None:
    reader = wire.ReplyReader(wire.STRUCTURED)
    reader.asked(wire.BLOCK_STATUS, 1, 0, 8, contexts=(1,))
    with pytest.raises(wire.WireError):
        reader.feed(sent)


@pytest.mark.parametrize("extents", [(4, 0, 4, 1), (9, 0)])
def test_a_block_status_that_ignores_req_one_is_caught(extents: tuple[int, ...]) -> None:
    reader = wire.ReplyReader(wire.STRUCTURED)
    reader.asked(wire.BLOCK_STATUS, 1, 0, 8, flags=wire.REQ_ONE, contexts=(1,))
    with pytest.raises(wire.WireError):
        reader.feed(structured(1, 5, pack(f">I{len(extents)}I", 1, *extents)))


BAD_EXTENDED = {
    "simple": SIMPLE_OK,
    "structured": structured(1, 5, pack(">III", 1, 8, 0)),
    "narrow": extended(1, 5, pack(">III", 1, 8, 0)),
    "count": extended(1, 6, pack(">IIQQ", 1, 2, 8, 0)),
    "odd length": extended(1, 6, pack(">IIQ", 1, 1, 8)),
    "offset": extended(1, 6, pack(">IIQQ", 1, 1, 8, 0), offset=1),
}


@pytest.mark.parametrize("sent", BAD_EXTENDED.values(), ids=BAD_EXTENDED.keys())
def test_a_bad_extended_reply_is_caught(sent: bytes) -> None:
    reader = wire.ReplyReader(wire.EXTENDED)
    reader.asked(wire.BLOCK_STATUS, 1, 0, 8, contexts=(1,))
    with pytest.raises(wire.WireError):
        reader.feed(sent)


def test_a_chunk_where_only_simple_replies_are_allowed_is_caught() -> None:
    reader = wire.ReplyReader(wire.SIMPLE)
    reader.asked(wire.READ, 1, 0, 8)
    with pytest.raises(wire.WireError):
        reader.feed(structured(1, 1, data(0, b"12345678")))


@pytest.mark.parametrize(
    "sent",
    [
        b"x" * 20,
        pack(">QIII", 0x3E889045565A9, 3, 1, 4) + b"data",
        pack(">QIII", 0x3E889045565A9, 3, 2, 4) + b"dat",
        b"short",
    ],
)
def test_a_bad_option_reply_is_caught(sent: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.parse_option_replies(sent)
