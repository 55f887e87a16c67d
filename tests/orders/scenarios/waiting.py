"""Guests that wait: timers, hung devices, frozen reads, clients that go away."""

from __future__ import annotations

from ..scenario import Scenario, Session, arm, cancel, finish, pause, read, release, write
from .sessions import BACKUPS_FIRST, TEMP_HANGS, TIMED, TIMED_BACKUPS_FIRST

WAITING = (
    Scenario(
        "timeout_guest",
        "the copy outlasts its guest's timer; the guest writes again, a client reads",
        {"g1": (write(0), write(0)), "r1": (read(0),)},
        sessions=TIMED_BACKUPS_FIRST,
    ),
    Scenario(
        "timeout_guest_trim",
        "the same with a TRIM instead of the read: a late temp write must leave no space",
        {"g1": (write(0), write(0)), "t1": (release(0),)},
        sessions=TIMED_BACKUPS_FIRST,
    ),
    Scenario(
        "timeout_guest_fail",
        "the same, and a temp write fails, perhaps the late one",
        {"g1": (write(0), write(0)), "r1": (read(0),)},
        sessions=TIMED_BACKUPS_FIRST,
        failures=1,
    ),
    Scenario(
        "timeout_snap",
        "two guest writes of one cluster, a read, a timer that breaks the session",
        {"g1": (write(0),), "g2": (write(0),), "r1": (read(0),)},
        sessions=TIMED,
    ),
    Scenario(
        "timeout_chain",
        "three guest writes queue behind a hung copy: one timer each, not one after the other",
        {"g1": (write(0),), "g2": (write(0),), "g3": (write(0),)},
        sessions=TIMED_BACKUPS_FIRST,
        hangs=TEMP_HANGS,
    ),
    Scenario(
        "hung_temp_trim",
        "the temp image hangs: TRIMs release the guest at once, first a part, then the rest",
        {"g1": (write(0, 2),), "t1": (release(0),), "t2": (release(1),)},
        clusters=2,
        hangs=TEMP_HANGS,
        every_step=True,
    ),
    Scenario(
        "hung_temp_part",
        "a hung copy of two clusters, another guest waits for one, which is released",
        {"g1": (write(0, 2),), "g2": (write(0),), "t1": (release(0),)},
        clusters=2,
        sessions=BACKUPS_FIRST,
        hangs=TEMP_HANGS,
        every_step=True,
    ),
    Scenario(
        "hung_temp_break",
        "the session breaks by one guest's timer: the other's own hung copy holds it no more",
        {"g1": (write(0),), "g2": (write(1),)},
        clusters=2,
        sessions=TIMED,
        hangs=TEMP_HANGS,
    ),
    Scenario(
        "hung_temp_finish",
        "the temp image hangs, the session is finished",
        {"g1": (write(0, 2),), "e": (finish(),), "t1": (release(0),)},
        clusters=2,
        hangs=TEMP_HANGS,
        every_step=True,
    ),
    Scenario(
        "hung_frozen",
        "a client's read of the active image never ends: the guest's timer does",
        {"g1": (write(0),), "r1": (read(0),)},
        sessions=TIMED,
        hangs=(("vda", "read", "r1"),),
        every_step=True,
    ),
    Scenario(
        "hung_frozen_trim",
        "the same without a timer: the client has released the range",
        {"t1": (release(0), write(0)), "r1": (read(0),), "g1": (write(0),)},
        hangs=(("vda", "read", "r1"),),
    ),
    Scenario(
        "hung_frozen_wide",
        "a read of two clusters hangs; the release of one frees a guest write to the other",
        {"t1": (release(0),), "r1": (read(0, 2),), "g1": (write(1),)},
        clusters=2,
        hangs=(("vda", "read", "r1"),),
        every_step=True,
    ),
    Scenario(
        "frozen_timer",
        "two guest writes wait for a frozen read under a timer, with the backup first",
        {"g1": (write(0),), "g2": (write(0),), "r1": (read(0),)},
        sessions=TIMED_BACKUPS_FIRST,
    ),
    Scenario(
        "timer_once",
        "half of a guest's time goes by in the copy: the rest is all that a frozen read may take",
        {"g1": (write(0),), "r1": (read(0),), "p": (pause(0.5),)},
        sessions=TIMED_BACKUPS_FIRST,
        hangs=(("vda", "read", "r1"),),
    ),
    Scenario(
        "frozen_torn",
        "calls in halves: a write of half a cluster, one of all of it, two readers",
        {"g1": (write(0.5, 0.5),), "g2": (write(0),), "r1": (read(0),), "r2": (read(0.5, 0.5),)},
        halves=True,
    ),
    Scenario(
        "frozen_broken",
        "a frozen read is in flight when the session breaks: the read fails, the guest goes on",
        {"g1": (write(0),), "r1": (read(0),)},
        failures=1,
        every_step=True,
    ),
    Scenario(
        "cancelled_write",
        "a guest's client goes away at any moment, and a session is armed",
        {"g1": (write(0),), "c": (cancel("g1"),), "a": (arm("b"),), "r1": (read(0, of="b"),)},
        sessions=(Session("a"), Session("b", armed=False)),
    ),
    Scenario(
        "cancelled_waits",
        "one of two guests that wait for the same copy goes away",
        {"g1": (write(0),), "g2": (write(0),), "c": (cancel("g1"),), "t1": (release(0),)},
    ),
)
