"""What is asked of both servers: steps, their notation, and scripts drawn from a seed.

A line is `SIDE REQUEST OFFSET LENGTH FLAG...`, such as

    guest write 64k+1 5000 fua
    backup trim end-512 512

Numbers are sums and differences of bytes, `4k`, `1M` and `end` (the disk's size). `#` begins a
comment. What a write writes follows from its place in the script, so no two write the same.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.disks import KIB, MIB

CLUSTER = 64 * KIB

SIDES = ("guest", "backup")
REQUESTS = ("read", "write", "zero", "trim", "cache", "flush", "status")
FLAGS = ("fua", "no-hole", "fast", "df")

MISSING = ("", "", "", "")

UNITS = {"": 1, "k": KIB, "M": MIB}


@dataclass(frozen=True)
class Step:
    """One request on one export of the disk. `length` is 0 and `offset` too for a flush."""

    number: int
    side: str
    request: str
    offset: int = 0
    length: int = 0
    flags: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.length

    @property
    def clusters(self) -> range:
        """The clusters that the range touches."""
        return range(self.offset // CLUSTER, -(-self.end // CLUSTER))

    def payload(self) -> bytes:
        """What a write writes."""
        return random.Random(self.number).randbytes(self.length)

    def __str__(self) -> str:
        words = [self.side, self.request]
        if self.request != "flush":
            words += [str(self.offset), str(self.length)]
        return " ".join([*words, *self.flags])


def parse(lines: Iterable[str], size: int) -> list[Step]:
    """The steps of a script for a disk of `size` bytes; ValueError says which line is wrong."""
    steps: list[Step] = []
    for line_number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        side, request, offset, length, *flags = [*words, *MISSING][: max(len(words), 4)]
        known = side in SIDES and request in REQUESTS and set(flags) <= set(FLAGS)
        if not known or (MISSING[0] in (offset, length)) != (request == "flush"):
            raise ValueError(f"line {line_number} is no step: {line.strip()}")
        place = (0, 0)
        if request != "flush":
            place = (_number(offset, size), _number(length, size))
        steps.append(Step(len(steps), side, request, *place, tuple(flags)))
    return steps


def _number(text: str, size: int) -> int:
    if not re.fullmatch(r"(\d+[kM]?|end)([+-](\d+[kM]?|end))*", text):
        raise ValueError(f"{text} is no number")
    total = 0
    for sign, digits, unit, end in re.findall(r"([+-]?)(?:(\d+)([kM]?)|(end))", text):
        value = size if end else int(digits) * UNITS[unit]
        total += -value if sign == "-" else value
    return total


def draw(seed: int, count: int, size: int) -> list[Step]:
    """`count` steps drawn from a seed, and then the whole disk read from both sides."""
    dice = random.Random(seed)
    steps = [_draw_step(dice, number, size) for number in range(count)]
    steps += list(_last_look(count, size))
    return steps


def _draw_step(dice: random.Random, number: int, size: int) -> Step:
    if dice.random() < 0.55:
        side, requests, weights = "guest", REQUESTS, (25, 35, 20, 15, 1, 2, 10)
    else:
        # TRIMs are few, or soon nothing would be left to read.
        side, requests, weights = "backup", REQUESTS, (60, 2, 2, 12, 2, 2, 25)
    request = dice.choices(requests, weights)[0]
    if request == "flush":
        return Step(number, side, request)
    offset, length = _draw_range(dice, size)
    if request == "trim" and side == "backup":
        length = min(length, 3 * CLUSTER)
    return Step(number, side, request, offset, length, _draw_flags(dice, side, request))


def _draw_range(dice: random.Random, size: int) -> tuple[int, int]:
    """A range that begins and ends on, near or far from the bounds of clusters."""
    if dice.random() < 0.03:  # past the end, or empty
        return size - dice.choice([0, 1, 512]), dice.choice([0, 513, CLUSTER])
    first = _draw_place(dice, size)
    if dice.random() < 0.7:
        second = min(size, first + dice.choice([1, 511, 4 * KIB, 20_000, CLUSTER, 3 * CLUSTER]))
    else:
        second = _draw_place(dice, size)
    first, second = sorted([first, second])
    return (first, second - first) if first < second else (0, 1)


def _draw_place(dice: random.Random, size: int) -> int:
    place = dice.randrange(size // CLUSTER + 1) * CLUSTER
    place += dice.choice([0, 0, 0, 1, -1, 512, 4 * KIB, -4 * KIB, dice.randrange(CLUSTER)])
    return min(max(place, 0), size)


def _draw_flags(dice: random.Random, side: str, request: str) -> tuple[str, ...]:
    if request == "read":
        return ("df",) if dice.random() < 0.1 else ()
    if request == "zero":
        return tuple(flag for flag in ("no-hole", "fast", "fua") if dice.random() < 0.2)
    if request in ("write", "trim"):
        # A refused TRIM here would leave one side with less to read than the other.
        return ("fua",) if side == "guest" and dice.random() < 0.2 else ()
    return ()


def _last_look(number: int, size: int) -> Iterator[Step]:
    for offset in range(0, size, CLUSTER):
        for side in SIDES:
            for request in ("read", "status"):
                length = min(CLUSTER, size - offset)
                yield Step(number, side, request, offset, length)
                number += 1
