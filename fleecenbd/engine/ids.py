"""Ids of sessions and bitmaps."""

from __future__ import annotations

import os


def random_uuid() -> str:
    """A UUID of version 4 (RFC 9562); the module that makes them too takes long to import."""
    number = int.from_bytes(os.urandom(16))
    number = number & ~(0xF << 76) | 4 << 76  # the version
    number = number & ~(0x3 << 62) | 2 << 62  # the variant
    digits = f"{number:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
