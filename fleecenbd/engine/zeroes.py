"""Is this all zero? And how far does that go?"""

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


def alike(data: Buffer, base: int, first: int, end: int, shift: int) -> tuple[int, bool]:
    """(end of the run at ``first`` of clusters that are all zero or all not, zero or not).

    ``data`` begins at cluster ``base``; a cluster has ``1 << shift`` bytes.
    """
    kind: bool | None = None
    while first < end:
        start = (first - base) << shift
        length = min(1 << shift, len(data) - start)
        zero = not data[start] and is_zero(data, start, length)
        if kind is None:
            kind = zero
        elif kind != zero:
            break
        first += 1
    return first, bool(kind)
