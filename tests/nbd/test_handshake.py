"""The handshake, as conversations."""

from collections.abc import Sequence
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleecenbd.nbd.errors import NegotiationError, ProtocolError
from fleecenbd.nbd.handshake import (
    ExportInfo,
    Handshake,
    HandshakeLimits,
    Negotiated,
    ReplyMode,
)
from fleecenbd.nbd.transmission import RequestDecoder
from tests.nbd import wire

(
    EXPORT_NAME,
    ABORT,
    LIST,
    PEEK_EXPORT,
    STARTTLS,
    INFO,
    GO,
    STRUCTURED_REPLY,
    LIST_META_CONTEXT,
    SET_META_CONTEXT,
    EXTENDED_HEADERS,
) = range(1, 12)
SEND_DF, BLOCK_STATUS_PAYLOAD = 1 << 7, 1 << 12
FLAGS = 0b1_0010_1101
ALLOCATION, ACCESS = "base:allocation", "x-fleecenbd:access"
BITMAP = "qemu:dirty-bitmap:daily"

DISK = ExportInfo("vda", "the disk of a guest", 5 << 30, FLAGS, 1, 65536, 32 << 20, (ALLOCATION,))
FLEECE = ExportInfo(
    "vda@nightly", "", 5 << 30, FLAGS, 1, 65536, 32 << 20, (ALLOCATION, BITMAP, ACCESS)
)
BARE = ExportInfo("bare", "", 512, FLAGS, 1, 65536, 32 << 20)


class Exports:
    """A catalog of three; ``vda`` is the default, ``busy`` takes nobody."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.exports = {"": DISK, "vda": DISK, "vda@nightly": FLEECE, "bare": BARE}

    def list(self) -> Sequence[tuple[str, str]]:
        return [("vda", "the disk of a guest"), ("vda@nightly", "")]

    def info(self, name: str) -> ExportInfo:
        if name == "busy":
            raise NegotiationError(wire.ERR_POLICY, "no place is free")
        if name not in self.exports:
            raise NegotiationError(wire.ERR_UNKNOWN, f"no export {name!r}")
        return self.exports[name]

    def open(self, name: str) -> tuple[ExportInfo, object]:
        info = self.info(name)
        self.opened.append(name)
        return info, f"opened {name}"


class Client:
    """One connection's client: says options, returns the replies to them."""

    def __init__(
        self, *, fixed: bool = True, no_zeroes: bool = True, limits: HandshakeLimits | None = None
    ) -> None:
        self.catalog = Exports()
        self.handshake = Handshake(self.catalog, limits=limits)
        assert wire.parse_greeting(self.handshake.greeting()) == 3
        said = wire.client_flags(fixed=fixed, no_zeroes=no_zeroes)
        assert self.handshake.receive_data(said) == b""

    def say(self, number: int, data: bytes = b"") -> list[wire.OptionReply]:
        replies = wire.parse_option_replies(self.raw(wire.option(number, data)))
        assert replies, "an option without a reply"
        assert all(reply.option == number for reply in replies)
        assert not any(reply.kind == wire.ACK or reply.is_error for reply in replies[:-1])
        assert replies[-1].kind == wire.ACK or replies[-1].is_error
        return replies

    def raw(self, data: bytes) -> bytes:
        return self.handshake.receive_data(data)

    def outcome(self, number: int, data: bytes = b"") -> int:
        """The type of the final reply."""
        return self.say(number, data)[-1].kind

    def info(self, number: int, name: str, *types: int) -> wire.ExportSeen:
        return wire.parse_infos(self.say(number, wire.info_data(name, *types)))

    def select(self, name: str, *queries: str) -> list[tuple[int, str]]:
        return wire.parse_contexts(self.say(SET_META_CONTEXT, wire.meta_data(name, *queries)))

    def listed(self, name: str, *queries: str) -> list[str]:
        replies = self.say(LIST_META_CONTEXT, wire.meta_data(name, *queries))
        contexts = wire.parse_contexts(replies)
        assert all(context_id == 0 for context_id, _ in contexts)
        return [context for _, context in contexts]

    @property
    def negotiated(self) -> Negotiated:
        assert self.handshake.negotiated is not None
        return self.handshake.negotiated


# Greeting and client flags


@pytest.mark.parametrize("flags", [4, 1 << 16, 1 << 31, 7, 0xFFFFFFFF])
def test_a_client_flag_that_was_not_offered_drops_the_connection(flags: int) -> None:
    handshake = Handshake(Exports())
    with pytest.raises(ProtocolError, match="not offered"):
        handshake.receive_data(pack(">I", flags))


@pytest.mark.parametrize("number", [ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, 99])
def test_without_fixed_newstyle_every_option_but_export_name_drops(number: int) -> None:
    client = Client(fixed=False)
    with pytest.raises(ProtocolError, match="FIXED_NEWSTYLE"):
        client.raw(wire.option(number))


def test_without_fixed_newstyle_export_name_works() -> None:
    client = Client(fixed=False, no_zeroes=False)
    assert len(client.raw(wire.option(EXPORT_NAME, b"vda"))) == 134
    assert client.negotiated.info == DISK


def test_an_option_with_a_bad_magic_drops_the_connection() -> None:
    client = Client()
    with pytest.raises(ProtocolError, match="IHAVEOPT"):
        client.raw(b"IHAVEOPS" + pack(">II", LIST, 0))


# NBD_OPT_EXPORT_NAME


@pytest.mark.parametrize("no_zeroes", [True, False])
@pytest.mark.parametrize("name", ["", "vda"])
def test_export_name_answers_size_flags_and_zeroes_unless_refused(
    no_zeroes: bool, name: str
) -> None:
    client = Client(no_zeroes=no_zeroes)
    answer = client.raw(wire.option(EXPORT_NAME, name.encode()))
    assert answer == pack(">QH", DISK.size, FLAGS) + (b"" if no_zeroes else bytes(124))
    assert client.negotiated == Negotiated(f"opened {name}", DISK, ReplyMode.SIMPLE, ())


def test_export_name_after_structured_replies_has_df_and_contexts() -> None:
    client = Client()
    client.say(STRUCTURED_REPLY)
    client.select("vda", ALLOCATION)
    answer = client.raw(wire.option(EXPORT_NAME, b"vda"))
    assert answer == pack(">QH", DISK.size, FLAGS | SEND_DF)
    assert client.negotiated.reply_mode is ReplyMode.STRUCTURED
    assert client.negotiated.contexts == ((1, ALLOCATION),)


@pytest.mark.parametrize("name", [b"nosuch", b"busy", b"\xff", b"v\0a", b"x" * 4097, b"x" * 70000])
def test_export_name_that_fails_drops_without_a_reply(name: bytes) -> None:
    client = Client()
    with pytest.raises(ProtocolError, match="EXPORT_NAME"):
        client.raw(wire.option(EXPORT_NAME, name))
    assert client.handshake.negotiated is None
    assert client.catalog.opened == []


def test_export_name_after_extended_headers_drops() -> None:
    client = Client()
    client.say(EXTENDED_HEADERS)
    with pytest.raises(ProtocolError, match="EXTENDED_HEADERS"):
        client.raw(wire.option(EXPORT_NAME, b"vda"))


# NBD_OPT_ABORT


@pytest.mark.parametrize("data", [b"", b"whatever", b"x" * 70000])
def test_abort_is_acknowledged_whatever_its_data(data: bytes) -> None:
    client = Client()
    assert client.outcome(ABORT, data) == wire.ACK
    assert client.handshake.ended
    assert client.handshake.negotiated is None
    assert client.raw(wire.option(LIST)) == b"", "nothing is answered after it"


# NBD_OPT_LIST


def test_list_names_every_export_with_its_description() -> None:
    replies = Client().say(LIST)
    assert [reply.kind for reply in replies] == [wire.SERVER, wire.SERVER, wire.ACK]
    assert replies[0].data == pack(">I", 3) + b"vdathe disk of a guest"
    assert replies[1].data == pack(">I", 11) + b"vda@nightly"


def test_list_may_be_refused_by_the_catalog() -> None:
    client = Client()

    def refuse() -> Sequence[tuple[str, str]]:
        raise NegotiationError(wire.ERR_POLICY, "not here")

    client.catalog.list = refuse  # type: ignore[method-assign]
    (reply,) = client.say(LIST)
    assert (reply.kind, reply.text) == (wire.ERR_POLICY, "not here")


# Options without data


@pytest.mark.parametrize("number", [LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS])
def test_data_with_an_option_that_has_none_is_invalid_and_changes_nothing(number: int) -> None:
    client = Client()
    assert client.outcome(number, b"x") == wire.ERR_INVALID
    client.info(GO, "vda")
    assert client.negotiated.reply_mode is ReplyMode.SIMPLE


def test_starttls_is_unsupported() -> None:
    client = Client()
    assert client.outcome(STARTTLS) == wire.ERR_UNSUP
    assert client.outcome(LIST) == wire.ACK


@pytest.mark.parametrize("number", [0, PEEK_EXPORT, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"IHAVEOPT" * 5, b"x" * 70000])
def test_an_unknown_option_is_unsupported_and_the_next_one_is_found(
    number: int, data: bytes
) -> None:
    client = Client()
    assert client.outcome(number, data) == wire.ERR_UNSUP
    assert client.outcome(LIST) == wire.ACK


# NBD_OPT_INFO and NBD_OPT_GO


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_always_say_size_and_flags(number: int) -> None:
    seen = Client().info(number, "vda")
    assert seen == wire.ExportSeen(size=DISK.size, flags=FLAGS)


def test_the_shortest_data_that_options_may_have() -> None:
    client = structured_client()
    assert client.info(INFO, "").size == DISK.size
    assert client.listed("") == [ALLOCATION]
    assert client.select("") == []
    assert client.info(GO, "").size == DISK.size


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_say_what_was_asked_for(number: int) -> None:
    seen = Client().info(number, "", 3, 2, 1, 0, 77)
    assert seen == wire.ExportSeen(
        DISK.size, FLAGS, "vda", "the disk of a guest", (1, 65536, 32 << 20)
    )


def test_an_empty_description_is_left_out() -> None:
    assert Client().info(INFO, "vda@nightly", 2).description is None


def test_go_says_what_info_said() -> None:
    for options in ([], [STRUCTURED_REPLY], [EXTENDED_HEADERS]):
        client = Client()
        for number in options:
            client.say(number)
        first = client.info(INFO, "vda", 0, 1, 2, 3)
        assert client.info(GO, "vda", 0, 1, 2, 3) == first


def test_info_opens_nothing_and_go_does() -> None:
    client = Client()
    client.info(INFO, "vda")
    assert client.catalog.opened == []
    assert client.handshake.negotiated is None
    client.info(GO, "vda@nightly")
    assert client.catalog.opened == ["vda@nightly"]
    assert client.negotiated == Negotiated("opened vda@nightly", FLEECE, ReplyMode.SIMPLE, ())


def test_go_is_never_followed_by_zeroes() -> None:
    client = Client(no_zeroes=False)
    client.info(GO, "vda")
    assert client.raw(b"") == b""


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    ("name", "error"), [("nosuch", wire.ERR_UNKNOWN), ("busy", wire.ERR_POLICY)]
)
def test_after_a_refused_name_another_one_may_be_tried(number: int, name: str, error: int) -> None:
    client = Client()
    (reply,) = client.say(number, wire.info_data(name))
    assert reply.kind == error
    assert reply.text
    client.info(GO, "vda")
    assert client.negotiated.info == DISK


INFO_DATA = wire.info_data("vda", 3)


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        INFO_DATA[:5],
        INFO_DATA[:-1],
        INFO_DATA + b"\0",
        pack(">I", 4) + INFO_DATA[4:],
        pack(">I", 0xFFFFFFFF) + INFO_DATA[4:],
        pack(">I", 0) + b"\xff\xff",
        pack(">I", 1) + b"vd",
        pack(">I", 2) + b"vd",
        pack(">I3sH", 3, b"v\0a", 0),
        pack(">I3sH", 3, b"v\xffa", 0),
        wire.info_data("x" * 4097),
    ],
)
def test_lengths_that_do_not_fit_and_bad_names_are_invalid(number: int, data: bytes) -> None:
    client = Client()
    assert client.outcome(number, data) == wire.ERR_INVALID
    assert client.catalog.opened == []
    client.info(GO, "vda")


def test_a_name_of_4096_bytes_is_a_name() -> None:
    assert Client().outcome(INFO, wire.info_data("x" * 4096)) == wire.ERR_UNKNOWN


def test_a_long_error_text_and_description_are_cut() -> None:
    client = Client()
    (reply,) = client.say(INFO, wire.info_data("€" * 1300))
    assert len(reply.data) <= 900
    long = ExportInfo("vda", "d" * 5000, 512, FLAGS, 1, 512, 512)
    client.catalog.exports["vda"] = long
    assert client.info(INFO, "vda", 2).description == "d" * 4096


# Reply modes


def test_structured_replies_add_df() -> None:
    client = Client()
    assert client.outcome(STRUCTURED_REPLY) == wire.ACK
    assert client.info(GO, "vda").flags == FLAGS | SEND_DF
    assert client.negotiated.reply_mode is ReplyMode.STRUCTURED
    assert client.negotiated.info.flags == FLAGS | SEND_DF


def test_structured_replies_twice_are_invalid_and_stay() -> None:
    client = Client()
    assert client.outcome(STRUCTURED_REPLY) == wire.ACK
    assert client.outcome(STRUCTURED_REPLY) == wire.ERR_INVALID
    client.info(GO, "vda")
    assert client.negotiated.reply_mode is ReplyMode.STRUCTURED


@pytest.mark.parametrize("before", [[], [STRUCTURED_REPLY]])
def test_extended_headers_imply_structured_replies(before: list[int]) -> None:
    client = Client()
    for number in before:
        client.say(number)
    assert client.outcome(EXTENDED_HEADERS) == wire.ACK
    assert client.outcome(EXTENDED_HEADERS) == wire.ERR_INVALID
    assert client.outcome(STRUCTURED_REPLY) == wire.ERR_EXT_HEADER_REQD
    assert client.select("vda", ALLOCATION) == [(1, ALLOCATION)]
    assert client.info(GO, "vda").flags == FLAGS | SEND_DF | BLOCK_STATUS_PAYLOAD
    assert client.negotiated.reply_mode is ReplyMode.EXTENDED


def test_the_payload_filter_is_offered_only_where_there_are_contexts() -> None:
    client = Client()
    client.say(EXTENDED_HEADERS)
    assert client.info(INFO, "bare").flags == FLAGS | SEND_DF


# Meta contexts


def test_no_query_lists_all_contexts() -> None:
    client = Client()
    client.say(STRUCTURED_REPLY)
    assert client.listed("vda@nightly") == [ALLOCATION, BITMAP, ACCESS]
    assert client.listed("bare") == []


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        (["base:"], [ALLOCATION]),
        (["x-fleecenbd:"], [ACCESS]),
        (["qemu:"], [BITMAP]),
        (["qemu:dirty-bitmap:"], [BITMAP]),
        ([ACCESS, "base:", ALLOCATION], [ALLOCATION, ACCESS]),
        (["base:nosuch", "nosuch:", "base", ":", "", "base:alloc"], []),
    ],
)
def test_a_query_that_ends_in_a_colon_lists_what_it_begins(
    queries: list[str], found: list[str]
) -> None:
    client = Client()
    client.say(STRUCTURED_REPLY)
    assert client.listed("vda@nightly", *queries) == found


def test_contexts_may_be_listed_before_structured_replies() -> None:
    assert Client().listed("vda") == [ALLOCATION]


def test_contexts_may_not_be_set_before_structured_replies() -> None:
    data = wire.meta_data("vda", ALLOCATION)
    assert Client().outcome(SET_META_CONTEXT, data) == wire.ERR_INVALID


def structured_client() -> Client:
    client = Client()
    client.say(STRUCTURED_REPLY)
    return client


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        (["base:"], []),
        (["x-fleecenbd:", "qemu:dirty-bitmap:"], []),
        (["nosuch:thing", "base:nosuch", "base", ""], []),
        ([ALLOCATION], [ALLOCATION]),
        ([ALLOCATION, ALLOCATION], [ALLOCATION]),
        ([ACCESS, "base:", ALLOCATION], [ALLOCATION, ACCESS]),
    ],
)
def test_only_whole_names_select(queries: list[str], selected: list[str]) -> None:
    client = structured_client()
    contexts = client.select("vda@nightly", *queries)
    assert [context for _, context in contexts] == selected
    assert len({context_id for context_id, _ in contexts}) == len(contexts)
    client.info(GO, "vda@nightly")
    assert client.negotiated.contexts == tuple(contexts)


def test_a_second_set_replaces_the_first() -> None:
    client = structured_client()
    client.select("vda@nightly", ALLOCATION)
    contexts = client.select("vda@nightly", ACCESS)
    client.info(GO, "vda@nightly")
    assert client.negotiated.contexts == tuple(contexts)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        wire.meta_data("nosuch", ALLOCATION),
        wire.meta_data("vda", ALLOCATION)[:-1],
        wire.meta_data("vda", *["x:"] * 300),
        b"x" * 70000,
    ],
)
def test_a_set_that_fails_forgets_what_was_selected(data: bytes) -> None:
    client = structured_client()
    client.select("vda", ALLOCATION)
    assert client.outcome(SET_META_CONTEXT, data) >= wire.ERR_UNSUP
    client.info(GO, "vda")
    assert client.negotiated.contexts == ()


def test_contexts_count_only_for_the_name_they_were_set_for() -> None:
    client = structured_client()
    client.select("vda@nightly", ALLOCATION)
    client.info(GO, "vda")
    assert client.negotiated.contexts == ()


def test_contexts_that_the_export_lost_meanwhile_do_not_count() -> None:
    client = structured_client()
    client.select("vda@nightly", ALLOCATION, ACCESS)
    client.catalog.exports["vda@nightly"] = DISK
    client.info(GO, "vda@nightly")
    assert client.negotiated.contexts == ((1, ALLOCATION),)


def test_listing_changes_no_selection() -> None:
    client = structured_client()
    client.select("vda", ALLOCATION)
    client.listed("vda@nightly", "base:")
    client.info(GO, "vda")
    assert client.negotiated.contexts == ((1, ALLOCATION),)


META_DATA = wire.meta_data("vda", ALLOCATION)


@pytest.mark.parametrize("number", [LIST_META_CONTEXT, SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", wire.ERR_INVALID),
        (META_DATA[:7], wire.ERR_INVALID),
        (META_DATA[:-1], wire.ERR_INVALID),
        (META_DATA + b"\0", wire.ERR_INVALID),
        (pack(">I", 0xFFFFFFFF) + META_DATA[4:], wire.ERR_INVALID),
        (pack(">I", 1) + b"vdax", wire.ERR_INVALID),
        (pack(">I", 4) + b"vdax", wire.ERR_INVALID),
        (pack(">II", 0, 2) + pack(">I", 0), wire.ERR_INVALID),
        (pack(">II", 0, 1) + pack(">I", 0xFFFFFFFF), wire.ERR_INVALID),
        (pack(">III2s", 0, 1, 2, b"\xff:"), wire.ERR_INVALID),
        (wire.meta_data("vda", "x:" + "y" * 4095), wire.ERR_INVALID),
        (pack(">I3sI", 3, b"v\0a", 0), wire.ERR_INVALID),
        (wire.meta_data("nosuch"), wire.ERR_UNKNOWN),
        (wire.meta_data("vda", *["x:"] * 257), wire.ERR_TOO_BIG),
        (pack(">II", 0, 0xFFFFFFFF), wire.ERR_TOO_BIG),
    ],
)
def test_bad_meta_context_data_is_refused(number: int, data: bytes, error: int) -> None:
    client = structured_client()
    assert client.outcome(number, data) == error
    assert client.outcome(LIST) == wire.ACK


# Limits and the end


def test_option_data_above_64_kib_is_too_big_and_above_1_mib_drops() -> None:
    client = Client()
    assert client.outcome(INFO, b"x" * (64 * 1024)) == wire.ERR_INVALID
    assert client.outcome(INFO, b"x" * (64 * 1024 + 1)) == wire.ERR_TOO_BIG
    assert client.outcome(INFO, b"x" * (1 << 20)) == wire.ERR_TOO_BIG
    with pytest.raises(ProtocolError, match="1048577"):
        client.raw(b"IHAVEOPT" + pack(">II", INFO, (1 << 20) + 1))


def test_data_that_is_too_big_is_not_kept() -> None:
    client = Client()
    client.raw(b"IHAVEOPT" + pack(">II", INFO, 1 << 20))
    for _ in range(15):
        assert client.raw(b"x" * 65536) == b""
        assert len(client.handshake._buffer) <= 65536
    assert client.raw(b"x" * 65536) != b""


def test_a_33rd_option_drops_the_connection() -> None:
    client = Client()
    for _ in range(32):
        client.say(STARTTLS)
    with pytest.raises(ProtocolError, match="too many options"):
        client.raw(wire.option(STARTTLS))


def test_every_listed_export_allows_32_options_more_but_only_once() -> None:
    client = Client()
    for _ in range(3):
        client.say(LIST)
    for _ in range(32 + 2 * 32 - 3):
        client.say(STARTTLS)
    with pytest.raises(ProtocolError, match="too many options"):
        client.raw(wire.option(STARTTLS))


def test_limits_can_be_set() -> None:
    client = Client(limits=HandshakeLimits(options_max=1))
    client.say(STARTTLS)
    with pytest.raises(ProtocolError):
        client.raw(wire.option(STARTTLS))


@pytest.mark.parametrize("number", [LIST, STARTTLS, INFO, GO, SET_META_CONTEXT, 99])
def test_while_shutting_down_every_option_but_abort_says_so(number: int) -> None:
    client = Client()
    client.handshake.shutting_down = True
    assert client.outcome(number, b"any data") == wire.ERR_SHUTDOWN
    assert client.outcome(ABORT) == wire.ACK
    assert client.handshake.ended


def test_while_shutting_down_export_name_drops() -> None:
    client = Client()
    client.handshake.shutting_down = True
    with pytest.raises(ProtocolError, match="shutting down"):
        client.raw(wire.option(EXPORT_NAME, b"vda"))
    assert client.catalog.opened == []


@pytest.mark.parametrize("number", [EXPORT_NAME, GO])
def test_what_follows_the_last_option_is_left_for_the_decoder(number: int) -> None:
    client = Client()
    data = b"vda" if number == EXPORT_NAME else wire.info_data("vda")
    first = wire.request(wire.READ, 7, 0, 512)
    assert client.handshake.leftover == b""
    client.raw(wire.option(number, data) + first[:10])
    assert client.raw(first[10:]) == b""
    decoder = RequestDecoder()
    decoder.feed(client.handshake.leftover)
    assert decoder.next_request() == (0, wire.READ, 7, 0, 512, None)


def test_request_rules_follow_from_what_was_negotiated() -> None:
    client = Client()
    client.say(EXTENDED_HEADERS)
    client.select("vda", ALLOCATION)
    client.info(GO, "vda")
    rules = client.negotiated.request_rules()
    status = pack(">QI", 512, 1)
    assert rules.check((0, wire.READ, 1, DISK.size - 512, 512, None)) is None
    assert rules.check((wire.DF, wire.READ, 1, 0, 512, None)) is None
    assert rules.check((wire.PAYLOAD_LEN, wire.BLOCK_STATUS, 1, 0, 12, status)) is None
    assert rules.check((0, wire.TRIM, 1, DISK.size, 512, None)) is not None
    assert rules.check((0, wire.READ, 1, DISK.size, 512, None)) is not None
    structured = structured_client()
    structured.info(GO, "vda")
    rules = structured.negotiated.request_rules()
    assert rules.check((wire.DF, wire.READ, 1, 0, 512, None)) is None
    assert rules.check((0, wire.BLOCK_STATUS, 1, 0, 512, None)) is not None
    plain = Client()
    plain.info(GO, "vda")
    rules = plain.negotiated.request_rules()
    assert rules.check((0, wire.WRITE, 1, 0, 512, b"")) is None
    assert rules.check((wire.DF, wire.READ, 1, 0, 512, None)) is not None
    assert rules.check((0, wire.BLOCK_STATUS, 1, 0, 512, None)) is not None


def test_the_minimum_block_size_is_among_the_request_rules() -> None:
    info = ExportInfo("vda", "", 1 << 20, FLAGS, 512, 65536, 32 << 20)
    rules = Negotiated(None, info, ReplyMode.SIMPLE, ()).request_rules()
    assert rules.check((0, wire.READ, 1, 512, 512, None)) is None
    assert rules.check((0, wire.READ, 1, 511, 512, None)) is not None


# What real clients say


def test_libnbd_and_qemu_with_extended_headers_first() -> None:
    client = Client()
    assert client.outcome(EXTENDED_HEADERS) == wire.ACK
    contexts = client.select("vda@nightly", ALLOCATION)
    seen = client.info(GO, "vda@nightly", 3)
    assert seen.block_size == (1, 65536, 32 << 20)
    assert client.negotiated.contexts == tuple(contexts)


def test_libnbd_and_qemu_with_structured_replies_first() -> None:
    client = Client()
    assert client.outcome(STARTTLS) == wire.ERR_UNSUP
    assert client.outcome(STRUCTURED_REPLY) == wire.ACK
    assert len(client.select("vda", ALLOCATION)) == 1
    assert client.info(GO, "vda", 3).block_size is not None


def test_nbdinfo_list_asks_for_each_export_on_one_connection() -> None:
    client = structured_client()
    names = [reply.data[4:] for reply in client.say(LIST)[:-1]]
    assert len(names) == 2
    for name in ("vda", "vda@nightly"):
        assert ALLOCATION in client.listed(name)
        client.info(INFO, name, 1, 2, 3)
    assert client.outcome(ABORT) == wire.ACK


# Any bytes, any split

OPTION = st.tuples(
    st.integers(0, 12) | st.integers(0, 2**32 - 1),
    st.one_of(
        st.just(b""),
        st.binary(max_size=40),
        st.builds(wire.info_data, st.sampled_from(["", "vda", "nosuch", "busy"])),
        st.builds(wire.meta_data, st.sampled_from(["", "vda", "x"]), st.just(ALLOCATION)),
        st.sampled_from([b"vda", b"nosuch"]),
    ),
)


def converse(data: bytes, steps: list[int], shutting_down: bool) -> tuple[bytes, object, bytes]:
    """(bytes replied, negotiated or what ended it, leftover)."""
    handshake = Handshake(Exports())
    handshake.shutting_down = shutting_down
    replied = b""
    position = 0
    try:
        for step in [*steps, len(data)]:
            replied += handshake.receive_data(data[position : position + step])
            position = min(position + step, len(data))
    except ProtocolError as error:
        return b"", str(error), b""
    return replied, handshake.negotiated or handshake.ended, handshake.leftover


@settings(deadline=None)
@given(
    st.sampled_from([0, 1, 2, 3, 3, 3, 3, 4]),
    st.lists(OPTION, max_size=8),
    st.binary(max_size=30),
    st.lists(st.integers(0, 50)),
    st.booleans(),
)
def test_any_split_of_a_conversation_gives_the_same_answers(
    flags: int,
    options: list[tuple[int, bytes]],
    tail: bytes,
    steps: list[int],
    shutting_down: bool,
) -> None:
    data = pack(">I", flags) + b"".join(wire.option(*option) for option in options) + tail
    whole = converse(data, [], shutting_down)
    assert converse(data, steps, shutting_down) == whole
    replied, end, _ = whole
    chose_by_name = any(number == EXPORT_NAME for number, _ in options)
    if not isinstance(end, str) and not chose_by_name:
        finals = [r for r in wire.parse_option_replies(replied) if r.kind == 1 or r.is_error]
        assert len(finals) == len(options) or end


@given(st.binary(max_size=200), st.booleans())
def test_garbage_ends_in_a_protocol_error_or_waits_for_more(data: bytes, fixed: bool) -> None:
    handshake = Handshake(Exports())
    data = b"\xff" + data
    refused = False
    try:
        assert handshake.receive_data(wire.client_flags(fixed=fixed) + data) == b""
    except ProtocolError:
        refused = True
    assert refused == (len(data) >= 16)
    assert handshake.negotiated is None
