"""RequestRules: which requests are refused, and as what. One test per row of the table."""

from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecenbd.nbd.transmission import Request
from fleecenbd.nbd.validation import COMMAND_NAMES, RequestRules, block_status_filter
from tests.nbd import wire

MIB = 1 << 20
EPERM, EINVAL, ENOSPC, EOVERFLOW = 1, 22, 28, 75

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = 32, 64, 128
SEND_CACHE, SEND_FAST_ZERO = 1024, 2048
EVERYTHING = (
    HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE | SEND_FAST_ZERO
)
FLEECING = HAS_FLAGS | SEND_FLUSH | SEND_TRIM
SIZE = 1 << 40

DATA_COMMANDS = (wire.READ, wire.WRITE, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES, wire.BLOCK_STATUS)


def rules(
    flags: int = EVERYTHING,
    *,
    size: int = SIZE,
    mode: str = wire.STRUCTURED,
    contexts: tuple[int, ...] = (1, 2),
    block_minimum: int = 1,
    read_once: bool = False,
) -> RequestRules:
    return RequestRules(
        flags=flags,
        size=size,
        extended=mode == wire.EXTENDED,
        structured=mode != wire.SIMPLE,
        contexts=bool(contexts),
        context_ids=contexts,
        block_minimum=block_minimum,
        read_once=read_once,
    )


def ask(
    rules: RequestRules,
    command: int,
    offset: int = 0,
    length: int = 4096,
    flags: int = 0,
    payload: bytes | None = None,
) -> int:
    """The NBD error, 0 for none; a refusal always has a text."""
    refusal = rules.check((flags, command, 1, offset, length, payload))
    if refusal is None:
        return 0
    error, text = refusal
    assert text
    return error


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_a_good_request_is_served(command: int) -> None:
    assert ask(rules(), command) == 0
    assert ask(rules(), command, SIZE - 1, 1) == 0
    flags = wire.PAYLOAD_LEN if command == wire.WRITE else 0
    assert ask(rules(mode=wire.EXTENDED), command, flags=flags) == 0


@pytest.mark.parametrize("command", [8, 9, 255, 65535])
def test_an_unknown_command_is_einval(command: int) -> None:
    assert ask(rules(), command) == EINVAL
    assert ask(rules(READ_ONLY | HAS_FLAGS), command, 0, 0) == EINVAL


@pytest.mark.parametrize("flags", [0, wire.FUA, 0xFFFF])
def test_disc_is_never_refused(flags: int) -> None:
    assert ask(rules(HAS_FLAGS), wire.DISC, 77, 99, flags) == 0
    assert ask(rules(HAS_FLAGS, mode=wire.EXTENDED), wire.DISC, 0, 0, flags) == 0


@pytest.mark.parametrize("command", [wire.WRITE, wire.TRIM, wire.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [HAS_FLAGS | READ_ONLY, EVERYTHING | READ_ONLY])
def test_a_read_only_export_is_eperm_before_anything_else(command: int, flags: int) -> None:
    read_only = rules(flags)
    assert ask(read_only, command) == EPERM
    assert ask(read_only, command, SIZE, 4096) == EPERM
    assert ask(read_only, command, 0, 0) == EPERM
    assert ask(read_only, command, 0, 1) == EPERM
    assert ask(read_only, wire.READ) == 0


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (wire.FLUSH, SEND_FLUSH),
        (wire.TRIM, SEND_TRIM),
        (wire.CACHE, SEND_CACHE),
        (wire.WRITE_ZEROES, SEND_WRITE_ZEROES),
    ],
)
def test_a_command_that_was_not_advertised_is_einval(command: int, flag: int) -> None:
    for length in (0, 1, 4096):
        assert ask(rules(EVERYTHING & ~flag), command, 0, length) == EINVAL
    assert ask(rules(EVERYTHING), command) == 0


def test_block_status_without_a_context_is_einval() -> None:
    for length in (0, 1, 4096):
        assert ask(rules(contexts=()), wire.BLOCK_STATUS, 0, length) == EINVAL
        assert ask(rules(mode=wire.SIMPLE), wire.BLOCK_STATUS, 0, length) == EINVAL
        extended = rules(mode=wire.EXTENDED, contexts=())
        assert ask(extended, wire.BLOCK_STATUS, 0, length) == EINVAL


@pytest.mark.parametrize("command", [*DATA_COMMANDS, wire.FLUSH])
def test_fua_is_every_commands_once_it_was_advertised(command: int) -> None:
    assert ask(rules(), command, flags=wire.FUA) == 0
    assert ask(rules(EVERYTHING & ~SEND_FUA), command, flags=wire.FUA) == EINVAL


FLAGS_OF = {
    wire.READ: wire.DF,
    wire.WRITE: 0,
    wire.FLUSH: 0,
    wire.TRIM: 0,
    wire.CACHE: 0,
    wire.WRITE_ZEROES: wire.NO_HOLE | wire.FAST_ZERO,
    wire.BLOCK_STATUS: wire.REQ_ONE,
}


@pytest.mark.parametrize("command", FLAGS_OF)
@pytest.mark.parametrize("bit", range(1, 16))
def test_a_flag_is_for_its_own_command_only(command: int, bit: int) -> None:
    flag = 1 << bit
    allowed = FLAGS_OF[command] & flag
    assert ask(rules(), command, flags=flag) == (0 if allowed else EINVAL)
    assert ask(rules(), command, flags=flag | wire.FUA) == (0 if allowed else EINVAL)


def test_df_needs_structured_replies() -> None:
    assert ask(rules(EVERYTHING | SEND_DF, mode=wire.SIMPLE), wire.READ, flags=wire.DF) == EINVAL
    assert ask(rules(mode=wire.EXTENDED), wire.READ, flags=wire.DF) == 0


def test_fast_zero_that_was_not_advertised_is_einval() -> None:
    without = rules(EVERYTHING & ~SEND_FAST_ZERO)
    assert ask(without, wire.WRITE_ZEROES, flags=wire.FAST_ZERO) == EINVAL
    assert ask(without, wire.WRITE_ZEROES, flags=wire.NO_HOLE) == 0


@pytest.mark.parametrize("command", [*DATA_COMMANDS, wire.FLUSH])
def test_bit_15_is_a_reads_and_only_where_it_was_agreed_on(command: int) -> None:
    for mode in (wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED):
        assert ask(rules(mode=mode), command, flags=1 << 15) == EINVAL
        agreed = ask(rules(mode=mode, read_once=True), command, flags=1 << 15)
        assert agreed == (0 if command == wire.READ else EINVAL)


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_a_length_of_zero_is_einval(command: int) -> None:
    for offset in (0, SIZE, SIZE + 1):
        assert ask(rules(), command, offset, 0) == EINVAL


def test_flush_looks_at_neither_offset_nor_length() -> None:
    assert ask(rules(), wire.FLUSH, 0, 0) == 0
    assert ask(rules(), wire.FLUSH, SIZE + 5, 1 << 31) == 0


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (wire.READ, EINVAL),
        (wire.TRIM, EINVAL),
        (wire.CACHE, EINVAL),
        (wire.BLOCK_STATUS, EINVAL),
        (wire.WRITE, ENOSPC),
        (wire.WRITE_ZEROES, ENOSPC),
    ],
)
def test_a_request_past_the_end_is_refused(command: int, error: int) -> None:
    for offset, length in ((SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 2**32 - 1)):
        assert ask(rules(), command, offset, length) == error
    assert ask(rules(size=0), command, 0, 1) == error
    extended = rules(mode=wire.EXTENDED)
    flags = wire.PAYLOAD_LEN if command == wire.WRITE else 0
    assert ask(extended, command, 1, 2**64 - 1, flags) == error


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_a_request_that_is_not_aligned_to_the_minimum_block_is_einval(command: int) -> None:
    blocks = rules(block_minimum=512)
    assert ask(blocks, command, 512, 1024) == 0
    assert ask(blocks, command, 256, 512) == EINVAL
    assert ask(blocks, command, 512, 513) == EINVAL
    refusal = blocks.check((0, command, 1, 256, 512, None))
    assert refusal is not None
    assert refusal[1].endswith("minimum block size, 512")


def test_a_read_of_more_than_64_mib_is_einval() -> None:
    for mode in (wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED):
        assert ask(rules(mode=mode), wire.READ, 0, 64 * MIB) == 0
        assert ask(rules(mode=mode), wire.READ, 0, 64 * MIB + 1) == EINVAL


def test_a_read_in_one_piece_of_more_than_the_maximum_payload_is_eoverflow() -> None:
    assert ask(rules(), wire.READ, 0, 65536, wire.DF) == 0
    assert ask(rules(), wire.READ, 0, 32 * MIB, wire.DF) == 0
    assert ask(rules(), wire.READ, 0, 32 * MIB + 1, wire.DF) == EOVERFLOW
    assert ask(rules(), wire.READ, 0, 64 * MIB + 1, wire.DF) == EOVERFLOW


@pytest.mark.parametrize("command", [wire.TRIM, wire.CACHE, wire.WRITE_ZEROES, wire.BLOCK_STATUS])
def test_a_length_without_payload_may_be_as_long_as_the_export(command: int) -> None:
    assert ask(rules(), command, 0, 2**32 - 1) == 0
    assert ask(rules(mode=wire.EXTENDED), command, 0, SIZE) == 0


def test_an_extended_write_is_served_with_and_without_payload_len() -> None:
    extended = rules(mode=wire.EXTENDED)
    assert ask(extended, wire.WRITE, flags=wire.PAYLOAD_LEN) == 0
    assert ask(extended, wire.WRITE, flags=wire.PAYLOAD_LEN | wire.FUA) == 0
    assert ask(extended, wire.WRITE) == 0
    assert ask(extended, wire.WRITE, 0, 0, wire.PAYLOAD_LEN, b"") == EINVAL


@pytest.mark.parametrize(
    "command", [wire.READ, wire.FLUSH, wire.TRIM, wire.CACHE, wire.WRITE_ZEROES]
)
def test_payload_len_on_a_command_without_payload_is_einval(command: int) -> None:
    flags = wire.PAYLOAD_LEN
    assert ask(rules(mode=wire.EXTENDED), command, 0, 5, flags, b"") == EINVAL


def test_payload_len_in_a_compact_request_is_einval() -> None:
    for mode in (wire.SIMPLE, wire.STRUCTURED):
        for command in FLAGS_OF:
            assert ask(rules(mode=mode), command, flags=wire.PAYLOAD_LEN) == EINVAL


def filter_of(length: int, *ids: int) -> bytes:
    return pack(f">Q{len(ids)}I", length, *ids)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (filter_of(4096, 1), 0),
        (filter_of(4096, 2, 1), 0),
        (filter_of(SIZE, 2), 0),
        (filter_of(4096), EINVAL),
        (filter_of(4096, 3), EINVAL),
        (filter_of(4096, 1, 3), EINVAL),
        (filter_of(4096, 1, 1), EINVAL),
        (filter_of(4096, 1) + b"\0", EINVAL),
        (filter_of(4096)[:7], EINVAL),
        (b"", EINVAL),
        (filter_of(0, 1), EINVAL),
        (filter_of(SIZE + 1, 1), EINVAL),
        (filter_of(2**64 - 1, 1), EINVAL),
    ],
)
def test_a_payload_filter_names_agreed_contexts_once_and_a_length(
    payload: bytes, error: int
) -> None:
    extended = rules(mode=wire.EXTENDED)
    for kind in (bytes, bytearray, memoryview):
        request = (wire.PAYLOAD_LEN, wire.BLOCK_STATUS, 1, 0, len(payload), kind(payload))
        refusal = extended.check(request)
        assert (refusal[0] if refusal else 0) == error


def test_a_payload_filter_may_come_with_req_one_and_without_a_context_is_einval() -> None:
    flags = wire.PAYLOAD_LEN | wire.REQ_ONE
    payload = filter_of(4096, 1)
    extended = rules(mode=wire.EXTENDED)
    assert ask(extended, wire.BLOCK_STATUS, 0, 12, flags, payload) == 0
    assert ask(extended, wire.BLOCK_STATUS, 0, 12, flags, None) == EINVAL
    none = rules(mode=wire.EXTENDED, contexts=())
    assert ask(none, wire.BLOCK_STATUS, 0, 12, flags, payload) == EINVAL


def test_a_payload_filter_is_an_effect_length_and_ids() -> None:
    assert block_status_filter(filter_of(1 << 40, 7, 9)) == (1 << 40, [7, 9])
    assert block_status_filter(memoryview(filter_of(5))) == (5, [])
    assert block_status_filter(b"1234567") is None
    assert block_status_filter(b"123456789") is None


def test_a_fleecing_export_refuses_fua_and_write_zeroes_but_not_write() -> None:
    fleecing = rules(FLEECING)
    assert ask(fleecing, wire.WRITE_ZEROES) == EINVAL
    assert ask(fleecing, wire.WRITE, flags=wire.FUA) == EINVAL
    assert ask(fleecing, wire.TRIM, flags=wire.FUA) == EINVAL
    assert ask(fleecing, wire.WRITE) == 0


def test_a_refusal_names_the_command_and_the_numbers() -> None:
    refusal = rules().check((0, wire.WRITE, 1, SIZE, 512, b""))
    assert refusal == (ENOSPC, f"WRITE of 512 bytes at {SIZE}: the export ends at {SIZE}")
    assert [COMMAND_NAMES[wire.DISC], COMMAND_NAMES[wire.WRITE_ZEROES]] == ["DISC", "WRITE_ZEROES"]


@settings(max_examples=500, deadline=None)
@given(
    flags=st.integers(0, 0xFFFF),
    command=st.integers(0, 9),
    offset=st.sampled_from([0, 1, 512, 4095, 4096, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    length=st.sampled_from([0, 1, 512, 4096, 65 * MIB]) | st.integers(0, 2**64 - 1),
    export=st.sampled_from([EVERYTHING, EVERYTHING | READ_ONLY, FLEECING, HAS_FLAGS]),
    size=st.sampled_from([0, 4096, SIZE]),
    mode=st.sampled_from([wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED]),
    contexts=st.sampled_from([(), (1,), (1, 2)]),
    block_minimum=st.sampled_from([1, 512]),
    payload=st.none() | st.binary(max_size=20) | st.just(filter_of(512, 1)),
)
def test_the_short_cut_decides_as_the_long_way(
    flags: int,
    command: int,
    offset: int,
    length: int,
    export: int,
    size: int,
    mode: str,
    contexts: tuple[int, ...],
    block_minimum: int,
    payload: bytes | None,
) -> None:
    checker = rules(export, size=size, mode=mode, contexts=contexts, block_minimum=block_minimum)
    request: Request = (flags, command, 1, offset, length, payload)
    refusal = checker.check(request)
    assert refusal == checker._look(request)
    if refusal is not None:
        assert refusal[0] in (EPERM, EINVAL, ENOSPC, EOVERFLOW)


@pytest.mark.parametrize(
    ("command", "length", "flags"),
    [
        (wire.READ, 4096, 0),
        (wire.READ, 64 * MIB, 0),
        (wire.WRITE, 4096, wire.FUA),
        (wire.TRIM, 1 << 31, 0),
        (wire.WRITE_ZEROES, 4096, wire.NO_HOLE),
        (wire.BLOCK_STATUS, 4096, wire.REQ_ONE),
    ],
)
def test_a_good_request_takes_the_short_cut(
    command: int, length: int, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_rules: RequestRules, request: Request) -> tuple[int, str]:
        raise AssertionError(f"{request} took the long way")

    monkeypatch.setattr(RequestRules, "_look", look)
    assert ask(rules(), command, 0, length, flags) == 0


@pytest.mark.parametrize("mode", [wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED])
def test_a_write_that_is_never_served_is_eperm_whatever_else_is_wrong_with_it(mode: str) -> None:
    never = RequestRules(
        flags=FLEECING,
        size=SIZE,
        extended=mode == wire.EXTENDED,
        structured=mode != wire.SIMPLE,
        contexts=False,
        can_write=False,
    )
    for offset, length in ((0, 512), (SIZE, 512), (0, 0)):
        refused = never.check((0, wire.WRITE, 1, offset, length, b""))
        assert refused is not None
        assert refused[0] == EPERM
    assert never.check((0, wire.READ, 1, 0, 512, None)) is None
    assert never.check((0, wire.TRIM, 1, 0, 512, None)) is None
