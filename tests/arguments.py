"""Numbers on the command lines of the nets: refused where they mean that nothing would run."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A number from 1 up. ValueError, ArgumentTypeError: argparse makes an error of them."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A number from 0 up; errors as ``positive``."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise ArgumentTypeError(f"{number} is too small: give {least} or more")
    return number
