"""Simple, structured and extended replies, read back by the client's side."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecenbd.nbd.constants import EXTENT_LENGTH_MAX, EXTENTS_MAX
from fleecenbd.nbd.replies import Buffer
from fleecenbd.nbd.transmission import ExtendedReplies, SimpleReplies, StructuredReplies
from tests.nbd import wire

KIB = 1024
MIB = 1024 * KIB
BLOCK = 64 * KIB
Replies = SimpleReplies | StructuredReplies | ExtendedReplies

ALL: dict[str, Replies] = {
    wire.SIMPLE: SimpleReplies(),
    wire.STRUCTURED: StructuredReplies(),
    wire.EXTENDED: ExtendedReplies(),
}
CHUNKED: dict[str, StructuredReplies] = {
    wire.STRUCTURED: StructuredReplies(),
    wire.EXTENDED: ExtendedReplies(),
}
every_mode = pytest.mark.parametrize("mode", ALL)
chunked_modes = pytest.mark.parametrize("mode", CHUNKED)


def noise(length: int) -> bytes:
    return b"\x5a" * length


def read_back(
    mode: str, data: bytes | bytearray, *, offset: int = 0, dont_fragment: bool = False
) -> tuple[wire.Reply, Sequence[Buffer]]:
    """The reply to a READ that returned ``data``, as its client understands it."""
    buffers = ALL[mode].read(5, offset, data, dont_fragment=dont_fragment)
    reader = wire.ReplyReader(mode)
    reader.asked(wire.READ, 5, offset, len(data), flags=wire.DF if dont_fragment else 0)
    (reply,) = reader.feed(b"".join(buffers))
    assert (reader.pending, reader.in_flight) == (0, 0)
    assert reply.data == data
    return reply, buffers


def status_back(
    mode: str,
    contexts: list[tuple[int, list[tuple[int, int]]]],
    length: int,
    *,
    req_one: bool = False,
) -> wire.Reply:
    buffers = CHUNKED[mode].block_status(5, 4096, contexts, req_one=req_one)
    reader = wire.ReplyReader(mode, chunk_max=1000 if req_one else 64 * MIB)
    ids = tuple(context_id for context_id, _ in contexts)
    flags = wire.REQ_ONE if req_one else 0
    reader.asked(wire.BLOCK_STATUS, 5, 4096, length, flags=flags, contexts=ids)
    (reply,) = reader.feed(b"".join(buffers))
    assert (reader.pending, reader.in_flight) == (0, 0)
    return reply


@every_mode
@pytest.mark.parametrize("command", [1, 3, 4, 5, 6])
def test_success_without_data_is_one_message(mode: str, command: int) -> None:
    reader = wire.ReplyReader(mode)
    reader.asked(command, 2**64 - 1, 512, 4096)
    (reply,) = reader.feed(ALL[mode].done(2**64 - 1, 512))
    assert (reply.error, reply.data, reader.pending) == (0, None, 0)
    assert reply.chunks == ([(0, 0)] if mode == wire.EXTENDED else [])


@every_mode
@pytest.mark.parametrize("command", range(8))
def test_an_error_is_one_message_for_every_command(mode: str, command: int) -> None:
    reader = wire.ReplyReader(mode)
    reader.asked(command, 9, 512, 4096, contexts=(1,))
    (reply,) = reader.feed(ALL[mode].error(9, 512, 22, "no", is_read=command == wire.READ))
    assert (reply.cookie, reply.error, reply.data) == (9, 22, None)
    assert reply.text == ("" if mode == wire.SIMPLE else "no")
    assert reader.pending == 0


@every_mode
def test_an_error_may_say_where(mode: str) -> None:
    reader = wire.ReplyReader(mode)
    reader.asked(wire.READ, 9, 512, 4096)
    sent = ALL[mode].error(9, 512, 5, "bad sector", is_read=True, error_offset=4607)
    (reply,) = reader.feed(sent)
    assert reply.error == 5
    assert reply.error_offset == (None if mode == wire.SIMPLE else 4607)


@chunked_modes
@pytest.mark.parametrize("text", ["", "x" * 899, "€" * 400, "a\0b", "\udcff"])
def test_an_error_text_stays_within_what_qemu_takes(mode: str, text: str) -> None:
    reader = wire.ReplyReader(mode, chunk_max=1000)
    reader.asked(wire.READ, 9, 0, 4096)
    (reply,) = reader.feed(CHUNKED[mode].error(9, 0, 22, text, is_read=True, error_offset=0))
    assert len(reply.text.encode()) <= 900
    assert text.startswith(reply.text) or "?" in reply.text
    assert bool(reply.text) == bool(text)


@chunked_modes
def test_an_error_that_says_0_is_a_bug_of_ours(mode: str) -> None:
    with pytest.raises(AssertionError):
        CHUNKED[mode].error(9, 0, 0, "nothing")


@every_mode
@pytest.mark.parametrize("length", [1, 511, 4096, BLOCK, BLOCK + 1, 4 * BLOCK])
@pytest.mark.parametrize("offset", [0, 512, 3 * BLOCK + 1])
def test_data_is_one_chunk_that_is_not_copied(mode: str, length: int, offset: int) -> None:
    data = noise(length)
    _, buffers = read_back(mode, data, offset=offset)
    assert len(buffers) == 2
    assert buffers[1] is data


@every_mode
@pytest.mark.parametrize("make", [bytes, bytearray])
@pytest.mark.parametrize("length", [1, 4096, BLOCK, BLOCK + 1, 3 * BLOCK + 512, MIB])
def test_a_reply_of_zeroes_is_one_hole(
    mode: str, length: int, make: type[bytes] | type[bytearray]
) -> None:
    reply, buffers = read_back(mode, make(length), offset=512)
    if mode != wire.SIMPLE:
        assert reply.chunks == [(2, 12)]
        assert len(buffers) == 1


@chunked_modes
@pytest.mark.parametrize("length", [2, 4096, BLOCK, 2 * BLOCK])
def test_one_byte_that_is_not_zero_makes_data(mode: str, length: int) -> None:
    for where in (0, 1, length // 2, length - 1):
        data = bytearray(length)
        data[where] = 1
        reply, _ = read_back(mode, data, dont_fragment=True)
        assert reply.chunks == [(1, 8 + length)]


@chunked_modes
def test_aligned_blocks_of_zeroes_inside_a_long_reply_are_holes(mode: str) -> None:
    data = noise(BLOCK) + bytes(2 * BLOCK) + noise(BLOCK) + bytes(BLOCK)
    reply, buffers = read_back(mode, data)
    assert reply.chunks == [(1, 8 + BLOCK), (2, 12), (1, 8 + BLOCK), (2, 12)]
    assert isinstance(buffers[1], memoryview)
    assert buffers[1].obj is data


@chunked_modes
def test_blocks_are_aligned_in_the_export_not_in_the_reply(mode: str) -> None:
    data = noise(512) + bytes(BLOCK) + noise(512)
    reply, _ = read_back(mode, data, offset=BLOCK - 512)
    assert reply.chunks == [(1, 8 + 512), (2, 12), (1, 8 + 512)]
    reply, _ = read_back(mode, data, offset=0)
    assert reply.chunks == [(1, 8 + len(data))]


@chunked_modes
def test_a_reply_no_longer_than_a_block_is_never_cut(mode: str) -> None:
    half = BLOCK // 2
    data = bytes(half) + noise(half)
    reply, _ = read_back(mode, data, offset=half)
    assert reply.chunks == [(1, 8 + BLOCK)]
    reply, _ = read_back(mode, data + noise(1), offset=half)
    assert reply.chunks == [(2, 12), (1, 8 + half + 1)]


@chunked_modes
def test_df_makes_one_chunk_of_data_and_zeroes(mode: str) -> None:
    data = noise(BLOCK) + bytes(4 * BLOCK) + noise(BLOCK)
    reply, buffers = read_back(mode, data, dont_fragment=True)
    assert reply.chunks == [(1, 8 + len(data))]
    assert buffers[1] is data
    reply, _ = read_back(mode, bytes(4 * BLOCK), dont_fragment=True)
    assert reply.chunks == [(2, 12)]


@chunked_modes
def test_no_chunk_is_longer_than_the_advertised_maximum_payload(mode: str) -> None:
    data = noise(64 * MIB)
    reply, _ = read_back(mode, data)
    assert reply.chunks == [(1, 8 + 32 * MIB), (1, 8 + 32 * MIB)]
    half = bytearray(data)
    half[:MIB] = bytes(MIB)
    reply, _ = read_back(mode, half)
    assert reply.chunks == [(2, 12), (1, 8 + 32 * MIB), (1, 8 + 31 * MIB)]


@settings(deadline=None)
@given(
    st.sampled_from(list(ALL)),
    st.integers(0, 3 * BLOCK),
    st.lists(st.tuples(st.booleans(), st.integers(1, 3 * BLOCK)), min_size=1, max_size=6),
    st.booleans(),
)
def test_whatever_is_read_comes_back_whole(
    mode: str, offset: int, runs: list[tuple[bool, int]], dont_fragment: bool
) -> None:
    data = b"".join(bytes(length) if zero else noise(length) for zero, length in runs)
    read_back(mode, data, offset=offset, dont_fragment=dont_fragment and mode != wire.SIMPLE)


@chunked_modes
def test_block_status_has_one_chunk_per_context_and_done_on_the_last(mode: str) -> None:
    contexts = [(7, [(4096, 0), (4096, 3)]), (9, [(8192, 1)]), (2, [(4096, 2)])]
    reply = status_back(mode, contexts, 8192)
    assert reply.contexts == {7: [(4096, 0), (4096, 3)], 9: [(8192, 1)], 2: [(4096, 2)]}
    assert list(reply.contexts) == [7, 9, 2]
    assert {kind for kind, _ in reply.chunks} == {6 if mode == wire.EXTENDED else 5}


@chunked_modes
def test_req_one_gives_one_extent_per_context(mode: str) -> None:
    contexts = [(1, [(4096, 0), (4096, 3)]), (2, [(512, 1), (512, 0)])]
    reply = status_back(mode, contexts, 8192, req_one=True)
    assert reply.contexts == {1: [(4096, 0)], 2: [(512, 1)]}


@chunked_modes
def test_a_block_status_ends_at_the_limit_of_extents(mode: str) -> None:
    extents = [(512, number & 1) for number in range(EXTENTS_MAX + 10)]
    reply = status_back(mode, [(1, extents)], 512 * len(extents))
    assert reply.contexts == {1: extents[:EXTENTS_MAX]}


def test_an_extent_above_32_bits_is_cut_and_ends_a_compact_reply() -> None:
    long = 5 << 32
    reply = status_back(wire.STRUCTURED, [(1, [(long, 3)])], 0xFFFFFFFF)
    assert reply.contexts == {1: [(EXTENT_LENGTH_MAX, 3)]}
    extents = [(512, 0), (long, 3), (512, 0)]
    reply = status_back(wire.STRUCTURED, [(1, extents)], 0xFFFFFFFF)
    assert reply.contexts == {1: [(512, 0), (EXTENT_LENGTH_MAX, 3)]}
    assert EXTENT_LENGTH_MAX % BLOCK == 0


def test_an_extent_above_32_bits_is_whole_in_an_extended_reply() -> None:
    for extents in ([(5 << 40, 3)], [(512, 0), (5 << 40, 3)]):
        reply = status_back(wire.EXTENDED, [(1, extents)], 6 << 40)
        assert reply.contexts == {1: extents}
    reply = status_back(wire.EXTENDED, [(1, [(5 << 40, 3)])], 6 << 40, req_one=True)
    assert reply.contexts == {1: [(5 << 40, 3)]}


def test_block_status_in_simple_replies_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        SimpleReplies().block_status(1, 0, [(1, [(512, 0)])], req_one=True)


@pytest.mark.parametrize("mode", [wire.SIMPLE, wire.EXTENDED])
def test_replies_may_come_in_any_order(mode: str) -> None:
    reader = wire.ReplyReader(mode)
    for cookie in (1, 2, 3):
        reader.asked(wire.READ, cookie, 512 * cookie, 512)
    sent = b"".join(
        part
        for cookie in (3, 1, 2)
        for part in ALL[mode].read(cookie, 512 * cookie, bytes([cookie]) * 512)
    )
    assert [(reply.cookie, reply.data) for reply in reader.feed(sent)] == [
        (cookie, bytes([cookie]) * 512) for cookie in (3, 1, 2)
    ]


def test_an_extent_of_the_greatest_length_is_followed_by_the_next_and_a_longer_one_is_cut() -> None:
    fits = [(EXTENT_LENGTH_MAX, 0), (4096, 3), (EXTENT_LENGTH_MAX + 4096, 0), (4096, 3)]
    reply = status_back(wire.STRUCTURED, [(1, fits)], 1 << 40)
    assert reply.contexts == {1: [*fits[:2], (EXTENT_LENGTH_MAX, 0)]}
