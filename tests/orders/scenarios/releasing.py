"""TRIMs on the fleecing export: overlapping, overtaken, in parts, at the limit."""

from __future__ import annotations

from ..scenario import BACKUP_FIRST, Scenario, Session, cancel, finish, read, release, sent, write
from .sessions import TEMP

RELEASING = (
    Scenario(
        "two_trims",
        "two TRIMs that overlap, a guest write, a read",
        {"g1": (write(0, 2),), "t1": (release(0, 2),), "t2": (release(1),), "r1": (read(1),)},
        clusters=2,
    ),
    Scenario(
        "two_trims_steps",
        "two TRIMs of one cluster that a copy is writing",
        {"g1": (write(0),), "t1": (release(0),), "t2": (release(0),)},
        every_step=True,
    ),
    Scenario(
        "once_overlap",
        "two clients whose READs release, over one range",
        {"o1": (read(0, 2), sent(0, 2)), "o2": (read(0), sent(0)), "g1": (write(0, 2),)},
        clusters=2,
    ),
    Scenario(
        "once_then_trim",
        "a READ that releases, a TRIM of the same, a copy that writes there",
        {"o1": (read(0), sent(0)), "t1": (release(0),), "g1": (write(0),)},
        every_step=True,
    ),
    Scenario(
        "once_parts",
        "two READs of half a cluster release nothing, nor with a TRIM of the other half",
        {"o1": (read(0, 0.5), sent(0, 0.5)), "o2": (read(0.5, 0.5), sent(0.5, 0.5)),
         "t1": (release(0.5, 0.5),), "r1": (read(0),)},
    ),
    Scenario(
        "once_tail",
        "a READ up to the end releases the last, partial cluster; one of its end alone does not",
        {"o1": (read(1.25, 0.25), sent(1.25, 0.25)), "o2": (read(0.5, 1), sent(0.5, 1)),
         "g1": (write(1, 0.5),)},
        clusters=1.5,
        halves=True,
    ),
    Scenario(
        "once_finish",
        "a reply leaves as the session is finished, or breaks",
        {"o1": (read(0), sent(0)), "g1": (write(0),), "e": (finish(),)},
        failures=1,
        every_step=True,
    ),
    Scenario(
        "once_punch",
        "the space of what was read once is freed behind a copy and another client's read",
        {"o1": (read(0, 2), sent(0, 2)), "r1": (read(0),), "g1": (write(1),)},
        clusters=2,
        prepare=(write(0),),
    ),
    Scenario(
        "read_runs",
        "a read of two runs, one from the temp image, one not, with a TRIM and a guest write",
        {"r1": (read(0, 2),), "t1": (release(1),), "g1": (write(1),)},
        clusters=2,
        prepare=(write(0),),
    ),
    Scenario(
        "release_during_punch",
        "a TRIM's punch is in flight: another TRIM, a guest write, a read of the neighbour",
        {"t1": (release(0, 2),), "t2": (release(0),), "g1": (write(0, 2),), "r1": (read(1),)},
        clusters=2,
        prepare=(write(0, 2),),
    ),
    Scenario(
        "punch_fails",
        "a punch fails; the next TRIM of the range tries again",
        {"t1": (release(0), release(0)), "t2": (release(0),), "g1": (write(0),)},
        prepare=(write(0),),
        failures=1,
        fails=((TEMP, "trim"),),
    ),
    Scenario(
        "break_during_trim",
        "a TRIM waits or punches while another cluster's failing copy breaks the session",
        {"g1": (write(0, 2),), "g2": (write(2),), "t1": (release(0),)},
        clusters=3,
        prepare=(write(0),),
        failures=1,
        quick=False,
    ),
    Scenario(
        "finish_during_trim",
        "a TRIM waits or punches while the session is finished",
        {"g1": (write(1),), "t1": (release(0, 2),), "e": (finish(),)},
        clusters=2,
        prepare=(write(0),),
    ),
    Scenario(
        "cancelled_trim",
        "the client of a TRIM goes away: the space is freed all the same",
        {"g1": (write(0),), "t1": (release(0),), "c": (cancel("t1"),)},
        every_step=True,
    ),
    Scenario(
        "parts",
        "half a cluster released twice leaves the other half readable",
        {"t1": (release(0, 0.5), release(0, 0.5)), "t2": (release(0, 0.5),), "g1": (write(0),),
         "r1": (read(0.5, 0.5),)},
    ),
    Scenario(
        "parts2",
        "two halves released by two clients make a whole",
        {"t1": (release(0, 0.5),), "t2": (release(0.5, 0.5),), "g1": (write(0),),
         "r1": (read(0.5, 0.5),)},
    ),
    Scenario(
        "tail",
        "the last, partial cluster: its end alone releases nothing, all of it does",
        {"t1": (release(1.25, 0.25),), "t2": (release(1, 0.5),), "g1": (write(1, 0.5),)},
        clusters=1.5,
        halves=True,
    ),
    Scenario(
        "limit",
        "temp_limit of two clusters for three; a TRIM gives back; a temp write may fail",
        {"g1": (write(0, 2),), "g2": (write(2),), "t1": (release(0),)},
        clusters=3,
        sessions=(Session(policy=BACKUP_FIRST, limit=2),),
        failures=1,
    ),
    Scenario(
        "limit_punch",
        "temp_limit of one cluster that is held: another copy while it is being freed",
        {"t1": (release(0),), "g1": (write(1), write(1))},
        clusters=2,
        sessions=(Session(policy=BACKUP_FIRST, limit=1),),
        prepare=(write(0),),
        every_step=True,
    ),
)  # fmt: skip
