"""What disks, sessions and bitmaps may be called."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9._-]+")

NAME_LENGTH_MAX = 100
"""Characters of a disk's or a session's name: DISK@SESSION stays far below NBD's 256."""

WHAT_NAMES_ARE = f"1 to {NAME_LENGTH_MAX} letters, digits, '.', '_' and '-'"


def is_name(text: str) -> bool:
    """Whether the text can be a name."""
    return (
        _NAME.fullmatch(text) is not None
        and text not in (".", "..")
        and len(text) <= NAME_LENGTH_MAX
    )


def bad_name(text: str, whose: str) -> str:
    """Why the text cannot be the name of ``whose``: "a session". Of a long one, the beginning."""
    shown = text if len(text) <= NAME_LENGTH_MAX else f"{text[:40]}…"
    return f"{shown!r} cannot be {whose}'s name: {WHAT_NAMES_ARE}"
