"""RequestDecoder: bytes in, requests out."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleecenbd.nbd.errors import ProtocolError
from fleecenbd.nbd.transmission import Request, RequestDecoder
from tests.nbd import wire

KIB = 1024
Plain = tuple[int, int, int, int, int, bytes | None]


def drain(decoder: RequestDecoder) -> list[Plain]:
    requests: list[Plain] = []
    while (request := decoder.next_request()) is not None:
        requests.append(plain(request))
    return requests


def plain(request: Request) -> Plain:
    payload = request[5]
    return (*request[:5], None if payload is None else bytes(payload))


def decode(data: bytes, *, extended: bool = False) -> list[Plain]:
    decoder = RequestDecoder(extended=extended)
    decoder.feed(data)
    return drain(decoder)


def test_a_compact_request_has_28_bytes_in_this_order() -> None:
    data = bytes.fromhex("25609513 0004 0000 0102030405060708 1112131415161718 21222324")
    assert decode(data) == [(4, 0, 0x0102030405060708, 0x1112131415161718, 0x21222324, None)]


def test_an_extended_request_has_32_bytes_and_a_64_bit_length() -> None:
    data = bytes.fromhex("21e41c71 0008 0007 0102030405060708 1112131415161718 2122232425262728")
    assert decode(data, extended=True) == [
        (8, 7, 0x0102030405060708, 0x1112131415161718, 0x2122232425262728, None)
    ]


def test_a_request_waits_for_its_last_byte() -> None:
    decoder = RequestDecoder()
    data = wire.request(wire.WRITE, 7, 0, 4, payload=b"data")
    for byte in data[:-1]:
        decoder.feed(bytes([byte]))
        assert decoder.next_request() is None
    decoder.feed(data[-1:])
    assert drain(decoder) == [(0, wire.WRITE, 7, 0, 4, b"data")]


def test_a_payload_inside_one_feed_is_a_view_of_it_when_it_is_long() -> None:
    payload = bytes(range(256)) * 256
    decoder = RequestDecoder()
    decoder.feed(wire.request(wire.WRITE, 1, 0, len(payload), payload=payload))
    request = decoder.next_request()
    assert request is not None
    assert isinstance(request[5], memoryview)
    assert request[5] == payload


def test_a_short_payload_does_not_keep_its_feed_alive() -> None:
    decoder = RequestDecoder()
    decoder.feed(wire.request(wire.WRITE, 1, 0, 4096, payload=b"x" * 4096))
    request = decoder.next_request()
    assert request is not None
    assert isinstance(request[5], bytes)


def test_a_payload_over_several_feeds_is_one_bytearray() -> None:
    payload = bytes(range(256)) * 2048
    data = wire.request(wire.WRITE, 1, 0, len(payload), payload=payload) + wire.request(wire.DISC)
    decoder = RequestDecoder()
    got = []
    for begin in range(0, len(data), 100 * KIB):
        decoder.feed(data[begin : begin + 100 * KIB])
        if (request := decoder.next_request()) is not None:
            got.append(request)
    assert isinstance(got[0][5], bytearray)
    assert got[0][5] == payload
    assert drain(decoder) == [(0, wire.DISC, 1, 0, 0, None)]


def test_an_announced_payload_costs_no_memory_before_it_comes() -> None:
    decoder = RequestDecoder()
    decoder.feed(wire.request(wire.WRITE, 1, 0, 64 << 20)[:28] + b"x" * 10)
    assert decoder.next_request() is None
    assert decoder.buffered == 10


def test_a_payload_handed_out_stays_as_it_was() -> None:
    decoder = RequestDecoder()
    first = wire.request(wire.WRITE, 1, 0, 40, payload=b"a" * 40)
    second = wire.request(wire.WRITE, 2, 0, 40, payload=b"b" * 40)
    decoder.feed(first[:50])
    decoder.next_request()
    decoder.feed(first[50:] + second[:50])
    request = decoder.next_request()
    assert decoder.next_request() is None
    decoder.feed(second[50:])
    assert drain(decoder) == [(0, wire.WRITE, 2, 0, 40, b"b" * 40)]
    assert request is not None
    assert request[5] == b"a" * 40


@pytest.mark.parametrize("extended", [False, True])
def test_a_bad_magic_is_a_protocol_error_again_and_again(extended: bool) -> None:
    for split in (32, 5):
        decoder = RequestDecoder(extended=extended)
        data = wire.request(wire.READ, extended=not extended).ljust(32, b"\0")
        decoder.feed(data[:split])
        for _ in range(3):
            if split == 5:
                decoder.next_request()
                decoder.feed(data[split:])
                split = 0
            with pytest.raises(ProtocolError, match="requests begin with"):
                decoder.next_request()


@pytest.mark.parametrize("extended", [False, True])
def test_a_payload_above_the_limit_is_a_protocol_error(extended: bool) -> None:
    flags = wire.PAYLOAD_LEN if extended else 0
    header = wire.request(wire.WRITE, 1, 0, 1001, flags=flags, extended=extended)
    for parts in ([header], [header[:9], header[9:]]):
        decoder = RequestDecoder(extended=extended, payload_max=1000)
        for part in parts[:-1]:
            decoder.feed(part)
            assert decoder.next_request() is None
        decoder.feed(parts[-1])
        for _ in range(2):
            with pytest.raises(ProtocolError, match="1001 bytes was announced"):
                decoder.next_request()


def test_a_payload_of_64_mib_is_taken_and_one_more_byte_is_not() -> None:
    payload = bytes(64 << 20)
    decoder = RequestDecoder()
    decoder.feed(wire.request(wire.WRITE, 1, 0, len(payload), payload=payload))
    request = decoder.next_request()
    assert request is not None
    assert request[4] == 64 << 20
    decoder.feed(wire.request(wire.WRITE, 1, 0, (64 << 20) + 1))
    with pytest.raises(ProtocolError):
        decoder.next_request()


def test_a_read_of_any_length_is_no_payload() -> None:
    assert decode(wire.request(wire.READ, 1, 0, 0xFFFFFFFF)) == [(0, 0, 1, 0, 0xFFFFFFFF, None)]
    long = wire.request(wire.TRIM, 1, 0, (1 << 64) - 1, extended=True)
    assert decode(long, extended=True) == [(0, 4, 1, 0, (1 << 64) - 1, None)]


@pytest.mark.parametrize("flags", [0, wire.FUA, wire.PAYLOAD_LEN, 0xFFFF])
def test_a_compact_write_has_a_payload_whatever_its_flags(flags: int) -> None:
    data = wire.request(wire.WRITE, 1, 0, 3, flags=flags, payload=b"abc")
    assert decode(data + wire.request(wire.DISC)) == [
        (flags, wire.WRITE, 1, 0, 3, b"abc"),
        (0, wire.DISC, 1, 0, 0, None),
    ]


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 7, 8, 99])
def test_a_compact_request_but_write_has_no_payload_whatever_its_flags(command: int) -> None:
    data = wire.request(command, 1, 0, 3, flags=wire.PAYLOAD_LEN)
    assert decode(data + wire.request(wire.DISC))[1] == (0, wire.DISC, 1, 0, 0, None)


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize("size", [5, 5000])
def test_an_extended_payload_of_a_refused_kind_is_consumed(command: int, size: int) -> None:
    data = wire.request(
        command, 1, 0, size, flags=wire.PAYLOAD_LEN, payload=b"x" * size, extended=True
    ) + wire.request(wire.FLUSH, 2, extended=True)
    for step in (len(data), 7):
        decoder = RequestDecoder(extended=True)
        got = []
        for begin in range(0, len(data), step):
            decoder.feed(data[begin : begin + step])
            got += drain(decoder)
        kept = b"x" * size if command == wire.BLOCK_STATUS and size == 5 else b""
        assert got == [
            (wire.PAYLOAD_LEN, command, 1, 0, size, kept),
            (0, wire.FLUSH, 2, 0, 0, None),
        ]


def test_an_extended_write_has_a_payload_with_and_without_payload_len() -> None:
    # QEMU 10's client leaves the flag out, and sends the payload.
    data = wire.request(wire.WRITE, 1, 0, 8, extended=True) + b"payload."
    data += wire.request(wire.WRITE, 2, 0, 8, payload=b"flagged.", extended=True)
    assert decode(data + wire.request(wire.FLUSH, 3, extended=True), extended=True) == [
        (0, wire.WRITE, 1, 0, 8, b"payload."),
        (wire.PAYLOAD_LEN, wire.WRITE, 2, 0, 8, b"flagged."),
        (0, wire.FLUSH, 3, 0, 0, None),
    ]


def test_disc_waits_for_no_payload() -> None:
    data = wire.request(wire.DISC, 1, 9, 1 << 60, flags=wire.PAYLOAD_LEN, extended=True)
    for step in (32, 5):
        decoder = RequestDecoder(extended=True)
        got = []
        for begin in range(0, len(data), step):
            decoder.feed(data[begin : begin + step])
            got += drain(decoder)
        assert got == [(wire.PAYLOAD_LEN, wire.DISC, 1, 9, 1 << 60, None)]


def test_a_write_of_no_bytes_is_handed_out_at_once() -> None:
    assert decode(wire.request(wire.WRITE)) == [(0, wire.WRITE, 1, 0, 0, b"")]
    empty = wire.request(wire.WRITE, flags=wire.PAYLOAD_LEN, extended=True)
    assert decode(empty, extended=True) == [(wire.PAYLOAD_LEN, wire.WRITE, 1, 0, 0, b"")]


def test_feeds_that_come_before_the_first_is_used_up_keep_their_order() -> None:
    decoder = RequestDecoder()
    data = b"".join(wire.request(wire.WRITE, n, n, 5, payload=b"%05d" % n) for n in range(9))
    for begin in range(0, len(data), 50):
        decoder.feed(data[begin : begin + 50])
    assert decoder.buffered == len(data)
    assert decoder.next_request() == (0, wire.WRITE, 0, 0, 5, b"00000")
    assert decoder.buffered == len(data) - 33
    decoder.feed(wire.request(wire.DISC))
    assert [request[2] for request in drain(decoder)] == [*range(1, 9), 1]
    assert decoder.buffered == 0


def test_a_feed_of_nothing_changes_nothing() -> None:
    decoder = RequestDecoder()
    decoder.feed(b"")
    assert decoder.next_request() is None
    decoder.feed(wire.request(wire.READ)[:10])
    decoder.feed(b"")
    assert decoder.next_request() is None
    decoder.feed(wire.request(wire.READ)[10:])
    assert len(drain(decoder)) == 1


@st.composite
def conversations(draw: st.DrawFn, long: int) -> tuple[bool, bytes, list[Plain]]:
    """(extended, bytes on the wire, the requests they are)."""
    extended = draw(st.booleans())
    data = b""
    expected: list[Plain] = []
    for _ in range(draw(st.integers(0, 8))):
        command = draw(st.sampled_from([wire.WRITE, wire.WRITE, *range(9), 65535]))
        flags = draw(st.sampled_from([0, wire.FUA, wire.PAYLOAD_LEN, 0xFFFF]))
        cookie, offset = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**64 - 1))
        has_payload = command == wire.WRITE
        if extended:
            has_payload = command == wire.WRITE or (
                bool(flags & wire.PAYLOAD_LEN) and command != wire.DISC
            )
        if has_payload:
            length = draw(st.sampled_from([0, 1, 12, 27, 28, 29, 500, 1032, 1033, long]))
            payload = (b"%d" % cookie * (length + 1))[:length]
        else:
            length, payload = draw(st.integers(0, 2**32 - 1)), b""
        header = wire.request(command, cookie, offset, length, flags=flags, extended=extended)
        data += header + payload
        keep = command == wire.WRITE or (command == wire.BLOCK_STATUS and length <= 1032)
        kept = (payload if keep else b"") if has_payload else None
        expected.append((flags, command, cookie, offset, length, kept))
    return extended, data, expected


@settings(deadline=None)
@given(conversations(20_000), st.lists(st.tuples(st.integers(0, 30_000), st.booleans())))
@example((False, b"", []), [])
def test_any_split_of_the_bytes_gives_the_same_requests(
    conversation: tuple[bool, bytes, list[Plain]], steps: list[tuple[int, bool]]
) -> None:
    extended, data, expected = conversation
    decoder = RequestDecoder(extended=extended)
    got: list[Plain] = []
    position = 0
    for length, take in [*steps, (len(data), True)]:
        decoder.feed(data[position : position + length])
        position = min(position + length, len(data))
        if take:
            got += drain(decoder)
    assert got == expected
    assert decoder.buffered == 0


@settings(deadline=None)
@given(conversations(1100), st.binary(min_size=32, max_size=64), st.integers(1, 40))
def test_garbage_after_requests_is_a_protocol_error_and_nothing_else(
    conversation: tuple[bool, bytes, list[Plain]], garbage: bytes, step: int
) -> None:
    extended, data, expected = conversation
    decoder = RequestDecoder(extended=extended)
    data += b"\xff" + garbage
    got: list[Plain] = []

    def feed_all() -> None:
        for begin in range(0, len(data), step):
            decoder.feed(data[begin : begin + step])
            while (request := decoder.next_request()) is not None:
                got.append(plain(request))

    with pytest.raises(ProtocolError):
        feed_all()
    assert got == expected


@given(st.booleans(), st.lists(st.binary(max_size=100)))
def test_garbage_alone_never_ends_in_another_exception(extended: bool, feeds: list[bytes]) -> None:
    decoder = RequestDecoder(extended=extended)
    fed = 0
    try:
        for data in feeds:
            decoder.feed(data)
            fed += len(data)
            assert drain(decoder) == []
    except ProtocolError:
        assert fed >= 28
    assert decoder.buffered == fed


@pytest.mark.parametrize("step", [7, 1 << 20])
def test_payloads_of_writes_that_are_all_refused_are_dropped_as_they_come(step: int) -> None:
    decoder = RequestDecoder(keep_writes=False)
    data = wire.request(wire.WRITE, 1, 0, 20000, payload=b"x" * 20000)
    data += wire.request(wire.READ, 2, 0, 512)
    got = []
    for begin in range(0, len(data), step):
        decoder.feed(data[begin : begin + step])
        got += drain(decoder)
        assert decoder.buffered < 28
    assert got == [(0, wire.WRITE, 1, 0, 20000, b""), (0, wire.READ, 2, 0, 512, None)]
