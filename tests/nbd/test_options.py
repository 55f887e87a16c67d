"""The data of options: what is taken at its limits, and the words for what is not."""

from __future__ import annotations

from struct import pack

import pytest

from fleecenbd.nbd.constants import NBD_REP_ERR_INVALID, NBD_REP_ERR_TOO_BIG, NBD_STRING_MAX
from fleecenbd.nbd.errors import NegotiationError
from fleecenbd.nbd.options import (
    list_contexts,
    parse_info,
    parse_meta_context,
    parse_string,
    select_contexts,
)


def meta_context(
    name: bytes, *queries: bytes, count: int | None = None, more: bytes = b""
) -> bytes:
    data = pack(">I", len(name)) + name + pack(">I", len(queries) if count is None else count)
    return data + b"".join(pack(">I", len(query)) + query for query in queries) + more


def info(name: bytes, *kinds: int, count: int | None = None) -> bytes:
    data = pack(">I", len(name)) + name + pack(">H", len(kinds) if count is None else count)
    return data + b"".join(pack(">H", kind) for kind in kinds)


def test_a_string_may_have_4096_bytes() -> None:
    assert parse_string(b"x" * NBD_STRING_MAX, "name") == "x" * NBD_STRING_MAX
    assert parse_string("größe".encode(), "name") == "größe"
    assert parse_string(b"", "name") == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * (NBD_STRING_MAX + 1), "the query has 4097 bytes; at most 4096 are allowed"),
        (b"\xff", "the query is not UTF-8"),
        (b"a\0b", "the query contains a NUL"),
    ],
)
def test_a_string_that_is_none_says_which_and_why(data: bytes, text: str) -> None:
    with pytest.raises(NegotiationError) as caught:
        parse_string(data, "query")
    assert (caught.value.code, caught.value.text) == (NBD_REP_ERR_INVALID, text)


def test_information_requests_are_a_set() -> None:
    assert parse_info(info(b"")) == ("", frozenset())
    assert parse_info(info(b"vda", 3, 1, 3)) == ("vda", frozenset({1, 3}))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (bytes(5), "5 bytes are too few: a name and a count of requests are due"),
        (pack(">I", 1) + bytes(2), "the name is longer than the option"),
        (info(b"vda", 1, count=2), "the option's length does not fit 2 information requests"),
        (info(b"vda", 1, count=0), "the option's length does not fit 0 information requests"),
        (info(b"v\0a"), "the export name contains a NUL"),
    ],
)
def test_information_requests_that_do_not_fit_are_invalid(data: bytes, text: str) -> None:
    with pytest.raises(NegotiationError) as caught:
        parse_info(data)
    assert (caught.value.code, caught.value.text) == (NBD_REP_ERR_INVALID, text)


def test_as_many_queries_are_taken_as_are_allowed() -> None:
    assert parse_meta_context(meta_context(b""), 0) == ("", [])
    assert parse_meta_context(meta_context(b"vda", b"a:b", b"", b"c"), 3) == (
        "vda",
        ["a:b", "", "c"],
    )
    with pytest.raises(NegotiationError) as caught:
        parse_meta_context(meta_context(b"vda", b"a:b", b"", b"c"), 2)
    assert (caught.value.code, caught.value.text) == (NBD_REP_ERR_TOO_BIG, "3 queries; at most 2")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (bytes(7), "7 bytes are too few: a name and a count of queries are due"),
        (pack(">I", 1) + bytes(4), "the name is longer than the option"),
        (meta_context(b"vda", count=1), "the option ends before its 1 queries do"),
        (meta_context(b"vda", b"a", count=2), "the option ends before its 2 queries do"),
        (meta_context(b"", count=1, more=b"\0\0\0"), "the option ends before its 1 queries do"),
        (meta_context(b"", count=1, more=pack(">I", 1)), "a query is longer than the option"),
        (meta_context(b"vda", b"a", more=b"xyz"), "3 bytes follow the last query"),
        (meta_context(b"\xff"), "the export name is not UTF-8"),
        (meta_context(b"vda", b"\xff"), "the query is not UTF-8"),
    ],
)
def test_queries_that_do_not_fit_are_invalid(data: bytes, text: str) -> None:
    with pytest.raises(NegotiationError) as caught:
        parse_meta_context(data, 8)
    assert (caught.value.code, caught.value.text) == (NBD_REP_ERR_INVALID, text)


OFFERED = ("base:allocation", "x-fleecenbd:access")


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], [0, 1], []),
        (["base:"], [0], []),
        (["base:allocation"], [0], [0]),
        (["x-fleecenbd:access", "base:allocation", "base:"], [0, 1], [0, 1]),
        ([":"], [], []),
        (["", "base", "base:alloc", "b:"], [], []),
    ],
)
def test_wildcards_list_and_whole_names_select(
    queries: list[str], listed: list[int], selected: list[int]
) -> None:
    assert list_contexts(OFFERED, queries) == [OFFERED[index] for index in listed]
    assert select_contexts(OFFERED, queries) == [OFFERED[index] for index in selected]


def test_a_namespace_may_have_one_letter() -> None:
    assert list_contexts(("x:y", "xy:z"), ["x:"]) == ["x:y"]
