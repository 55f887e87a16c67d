"""The data of options and of their replies: layouts, lengths, strings.

Every length that the peer sends is checked against what is there before it is used
(CVE-2022-26495, CVE-2022-26496). What does not fit is NBD_REP_ERR_INVALID, as a
NegotiationError; nothing here raises anything else. (Specification, "Option types" and
"Option reply types".)
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack_from

from fleecenbd.nbd.constants import (
    ERROR_TEXT_MAX,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    NBD_STRING_MAX,
)
from fleecenbd.nbd.errors import NegotiationError, cut_text

Reply = tuple[int, bytes]
"""(reply type, data) of one reply to an option."""


def invalid(text: str) -> NegotiationError:
    """The option breaks a rule: NBD_REP_ERR_INVALID."""
    return NegotiationError(NBD_REP_ERR_INVALID, text)


def parse_string(data: bytes, what: str) -> str:
    """A string of the peer's: UTF-8, at most NBD_STRING_MAX bytes, no NUL."""
    if len(data) > NBD_STRING_MAX:
        raise invalid(f"the {what} has {len(data)} bytes; at most {NBD_STRING_MAX} are allowed")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid(f"the {what} is not UTF-8") from None
    if "\0" in text:
        raise invalid(f"the {what} contains a NUL")
    return text


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """(export name, information types asked for) of NBD_OPT_INFO and NBD_OPT_GO.

    Layout: u32 name length, name, u16 n, n * u16 information type.
    """
    if len(data) < 6:
        raise invalid(f"{len(data)} bytes are too few: a name and a count of requests are due")
    (name_length,) = unpack_from(">I", data)
    if name_length > len(data) - 6:
        raise invalid("the name is longer than the option")
    (count,) = unpack_from(">H", data, 4 + name_length)
    if len(data) != 6 + name_length + 2 * count:
        raise invalid(f"the option's length does not fit {count} information requests")
    name = parse_string(data[4 : 4 + name_length], "export name")
    return name, frozenset(unpack_from(f">{count}H", data, 6 + name_length))


def parse_meta_context(data: bytes, queries_max: int) -> tuple[str, list[str]]:
    """(export name, queries) of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.

    Layout: u32 name length, name, u32 n, n * (u32 length, query). More than ``queries_max``
    are NBD_REP_ERR_TOO_BIG.
    """
    if len(data) < 8:
        raise invalid(f"{len(data)} bytes are too few: a name and a count of queries are due")
    (name_length,) = unpack_from(">I", data)
    if name_length > len(data) - 8:
        raise invalid("the name is longer than the option")
    position = 4 + name_length
    name = parse_string(data[4:position], "export name")
    (count,) = unpack_from(">I", data, position)
    position += 4
    if count > queries_max:
        raise NegotiationError(NBD_REP_ERR_TOO_BIG, f"{count} queries; at most {queries_max}")
    queries = []
    for _ in range(count):
        if position + 4 > len(data):
            raise invalid(f"the option ends before its {count} queries do")
        (length,) = unpack_from(">I", data, position)
        position += 4
        if length > len(data) - position:
            raise invalid("a query is longer than the option")
        queries.append(parse_string(data[position : position + length], "query"))
        position += length
    if position != len(data):
        raise invalid(f"{len(data) - position} bytes follow the last query")
    return name, queries


def list_contexts(offered: Sequence[str], queries: Sequence[str]) -> list[str]:
    """What NBD_OPT_LIST_META_CONTEXT returns, in the order of ``offered``, each once.

    No query: all. A query that ends in a colon is a wildcard for what follows it: ``base:``,
    ``qemu:dirty-bitmap:``. A query that nothing matches is ignored, whatever it looks like.
    """
    if not queries:
        return list(offered)
    prefixes = tuple(query for query in queries if query.find(":") > 0 and query.endswith(":"))
    return [name for name in offered if name in queries or name.startswith(prefixes)]


def select_contexts(offered: Sequence[str], queries: Sequence[str]) -> list[str]:
    """What NBD_OPT_SET_META_CONTEXT selects: exact names only, so no query selects nothing."""
    return [name for name in offered if name in queries]


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One reply. Layout: u64 magic, u32 option, u32 reply type, u32 length, data."""
    return pack(">QIII", NBD_REP_MAGIC, option, kind, len(data)) + data


def error_reply(option: int, error: NegotiationError) -> bytes:
    """The final reply to an option that is refused; its data is the text."""
    return option_reply(option, error.code, cut_text(error.text, ERROR_TEXT_MAX))


def server_reply(name: str, description: str) -> Reply:
    """One export of NBD_OPT_LIST. Layout: u32 name length, name, description."""
    name_data = name.encode("utf-8")
    return NBD_REP_SERVER, (
        pack(">I", len(name_data)) + name_data + cut_text(description, NBD_STRING_MAX)
    )


def meta_context_reply(context_id: int, name: str) -> Reply:
    """One meta context. Layout: u32 id, name."""
    return NBD_REP_META_CONTEXT, pack(">I", context_id) + name.encode("utf-8")


def info_export(size: int, flags: int) -> Reply:
    """Size and transmission flags."""
    return NBD_REP_INFO, pack(">HQH", NBD_INFO_EXPORT, size, flags)


def info_name(name: str) -> Reply:
    """The export's canonical name."""
    return NBD_REP_INFO, pack(">H", NBD_INFO_NAME) + name.encode("utf-8")


def info_description(description: str) -> Reply:
    """The export's description."""
    return NBD_REP_INFO, (pack(">H", NBD_INFO_DESCRIPTION) + cut_text(description, NBD_STRING_MAX))


def info_block_size(minimum: int, preferred: int, maximum: int) -> Reply:
    """Minimum and preferred block size, maximum payload: bytes."""
    return NBD_REP_INFO, pack(">HIII", NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum)
