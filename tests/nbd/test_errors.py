"""The errno table, and the words that are echoed."""

import errno

import pytest

from fleecenbd.nbd.errors import NegotiationError, cut_text, nbd_errno, shown_name

ON_THE_WIRE = {1, 5, 12, 22, 28, 75, 95, 108}


@pytest.mark.parametrize(
    ("host", "wire"),
    [
        (errno.EPERM, 1),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ETIMEDOUT, 5),
        (errno.EREMOTEIO, 5),
        (None, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOENT, 22),
        (errno.EBUSY, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.ENOTSUP, 95),
        (errno.EOPNOTSUPP, 95),
        (errno.ESHUTDOWN, 108),
    ],
)
def test_an_errno_becomes_its_nbd_error(host: int | None, wire: int) -> None:
    assert nbd_errno(host) == wire


def test_no_errno_whatever_leaves_the_allowed_values() -> None:
    assert {nbd_errno(number) for number in range(-1, 600)} == ON_THE_WIRE


def test_enotsup_answers_fast_zero_only() -> None:
    assert nbd_errno(errno.ENOTSUP, fast_zero=True) == 95
    assert nbd_errno(errno.ENOTSUP, fast_zero=False) == 22
    assert nbd_errno(errno.ENOSPC, fast_zero=False) == 28


def test_a_negotiation_error_carries_code_and_text() -> None:
    error = NegotiationError(0x80000006, "no such export")
    assert (error.code, error.text, str(error)) == (0x80000006, "no such export", "no such export")


def test_a_negotiation_error_that_says_ack_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        NegotiationError(1, "fine")


def test_a_shown_name_is_short_and_printable() -> None:
    assert shown_name("vda") == "'vda'"
    assert shown_name("x" * 80) == f"'{'x' * 80}'"
    assert shown_name("a\x1b[31m\nb") == "'a?[31m?b'"
    assert len(shown_name("x" * 4096)) == 82
    assert shown_name("x" * 4096).endswith("x…'")


@pytest.mark.parametrize(
    ("text", "length_max", "cut"),
    [
        ("short", 900, b"short"),
        ("€" * 3, 8, "€€".encode()),
        ("€" * 3, 9, "€€€".encode()),
        ("a\0b", 900, b"a?b"),
        ("path\udcff", 900, b"path?"),
        ("", 0, b""),
    ],
)
def test_text_is_cut_between_characters(text: str, length_max: int, cut: bytes) -> None:
    assert cut_text(text, length_max) == cut
