"""Is this all zero?"""

from __future__ import annotations

from fleecenbd.storage.device import Buffer

ZEROES = bytes(1 << 20)
_4K = ZEROES[:4096]


def is_zero(data: Buffer, start: int, length: int) -> bool:
    """Are these bytes all zero? Compares without copying ``data``."""
    while length > 0:
        step = min(length, len(ZEROES))
        zeroes = _4K if step == len(_4K) else ZEROES[:step]
        if not data.startswith(zeroes, start):
            return False
        start += step
        length -= step
    return True
