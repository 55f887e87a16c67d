"""Block status, and what guests do besides writing: zeroes, discards, reads."""

from __future__ import annotations

from ..scenario import (
    CLUSTER,
    Scenario,
    discard,
    look,
    read,
    release,
    status,
    survey,
    write,
    zero,
)
from .sessions import TIMED_BACKUPS_FIRST

MAPPING = (
    Scenario(
        "stat",
        "guests write zeroes and data, status is asked of a cluster of data and one of zeroes",
        {"g1": (zero(0),), "g2": (write(1),), "s0": (status(0),), "s1": (status(1),)},
        clusters=2,
        zeroes=(1,),
    ),
    Scenario(
        "stat_trim",
        "status, a TRIM and a guest's zeroes of one cluster",
        {"g1": (zero(0),), "s0": (status(0),), "t1": (release(0),)},
    ),
    Scenario(
        "stat_released",
        "status of a zero cluster that is released meanwhile",
        {"s0": (status(0, 2),), "t1": (release(0),), "g1": (write(0),)},
        clusters=2,
        zeroes=(0,),
    ),
    Scenario(
        "stat_windows",
        "status in windows of one cluster: TRIMs and guest zeroes between the windows",
        {"s0": (status(0, 2),), "g1": (zero(0, 2),), "t1": (release(0),), "t2": (release(1),)},
        clusters=2,
        zeroes=(0,),
        limits={"STATUS_WINDOW": CLUSTER},
    ),
    Scenario(
        "stat_part_released",
        "status of two clusters in one call: one is released, the guest zeroes both",
        {"s0": (status(0, 2),), "g1": (zero(0, 2),), "t1": (release(1),)},
        clusters=2,
    ),
    Scenario(
        "discards",
        "a guest's discard leaves alone what a session needs, while that is copied and released",
        {"g1": (discard(0, 2),), "g2": (write(0),), "r1": (read(0, 2),), "t1": (release(1),)},
        clusters=2,
        limits={"TRIM_PART_MIN": 1},
    ),
    Scenario(
        "zero_pieces",
        "a guest's WRITE_ZEROES made ready in pieces, each with its own timer",
        {"g1": (zero(0, 2),), "r1": (read(0, 2),), "t1": (release(1),)},
        clusters=2,
        sessions=TIMED_BACKUPS_FIRST,
        limits={"PIECE_LENGTH_MAX": CLUSTER},
    ),
    Scenario(
        "zero_fast",
        "fast zeroes are refused where old data must be copied first, with nothing changed",
        {"g1": (zero(0, fast=True),), "r1": (read(0),), "t1": (release(0),)},
    ),
    Scenario(
        "guest_reads",
        "a guest reads while others write: what it sees is of some write",
        {"g1": (write(0),), "g2": (zero(0.0625, 0.5),), "l1": (look(0), look(0))},
        halves=True,
    ),
    Scenario(
        "guest_status",
        "a guest asks for block status from the middle of a sector on, in windows, while others "
        "write: what it is told is zero is zero by some write, or was from the beginning",
        {"g1": (write(0),), "g2": (zero(1),), "m1": (survey(0.0625, 2),)},
        clusters=2,
        zeroes=(0,),
        limits={"STATUS_WINDOW": CLUSTER},
    ),
)
