"""The scenarios: those of the design's model that concern the engine, and more of its own.

Names as in the model where one is from there. Each is as small as the race that it is there for:
one to three clusters, two to four actors.
"""

from __future__ import annotations

from .scenario import (
    ALWAYS,
    BACKUP_FIRST,
    CLUSTER,
    EITHER,
    Scenario,
    Session,
    arm,
    cancel,
    discard,
    finish,
    look,
    read,
    release,
    status,
    write,
    zero,
)  # fmt: skip

TEMP = "temp vda@s"
TEMP_HANGS = ((TEMP, "write"),)
GUESTS_FIRST = (Session(),)
BACKUPS_FIRST = (Session(policy=BACKUP_FIRST),)
TIMED = (Session(timeout_s=1.0),)
TIMED_BACKUPS_FIRST = (Session(policy=BACKUP_FIRST, timeout_s=1.0),)

COPYING = (
    Scenario(
        "write_read_trim",
        "a guest write over two clusters, a read of both, a TRIM of one: of part of the copy",
        {"g1": (write(0, 2),), "r1": (read(0, 2),), "t1": (release(0),)},
        clusters=2,
        every_step=True,
    ),
    Scenario(
        "two_writes_trim_fail",
        "two guest writes that overlap, a failing temp write, a TRIM of the copy's middle",
        {"g1": (write(0, 3),), "g2": (write(1),), "t1": (release(1),)},
        clusters=3,
        sessions=BACKUPS_FIRST,
        failures=1,
        quick=False,
    ),
    Scenario(
        "two_writes_trim_fail_snap",
        "the same with the guest first, and a read",
        {"g1": (write(0, 3),), "g2": (write(1),), "t1": (release(1),), "r1": (read(0),)},
        clusters=3,
        failures=1,
        quick=False,
    ),
    Scenario(
        "copy_reads_fail",
        "the active image fails under a copy and under a backup's read",
        {"g1": (write(0, 2),), "r1": (read(0, 2),), "t1": (release(0),)},
        clusters=2,
        sessions=BACKUPS_FIRST,
        failures=2,
        fails=(("vda", "read"),),
    ),
    Scenario(
        "copies_queue",
        "one copy at a time: a TRIM and a finish while others are queued",
        {"g1": (write(0, 2),), "t1": (release(1),), "e": (finish(),)},
        clusters=2,
        limits={"COPY_LENGTH_MAX": CLUSTER, "COPIES_MAX": 1},
        every_step=True,
    ),
    Scenario(
        "copies_split",
        "a guest write of two clusters in two copies, one of which fails",
        {"g1": (write(0, 2),), "g2": (write(0),), "t1": (release(0),)},
        clusters=2,
        sessions=BACKUPS_FIRST,
        limits={"COPY_LENGTH_MAX": CLUSTER},
        failures=1,
    ),
    Scenario(
        "zeroes_again",
        "a copy fails between data and zeroes; the next one must leave no garbage",
        {"g1": (write(0, 3), write(0, 3)), "r1": (read(0, 3),)},
        clusters=3,
        zeroes=(1,),
        sessions=BACKUPS_FIRST,
        failures=1,
        fails=((TEMP, "write"), (TEMP, "zero")),
    ),
    Scenario(
        "two_sessions",
        "two sessions on a disk; one cluster has been released in the second; TRIM in the first",
        {"g1": (write(0, 2),), "r1": (read(1, of="b"),), "t1": (release(1, of="a"),)},
        clusters=2,
        sessions=(Session("a", BACKUP_FIRST), Session("b")),
        prepare=(release(0, of="b"),),
        failures=1,
        fails=(("temp vda@a", "write"),),
    ),
    Scenario(
        "now_or_later",
        "each call at once or not: copies, reads and guest writes in one step among others",
        {"g1": (write(0, 2),), "r1": (read(0, 2),), "t1": (release(0),)},
        clusters=2,
        now=EITHER,
    ),
    Scenario(
        "now_and_frozen",
        "guest writes that could be made in one step, while a read of theirs is in flight",
        {"g1": (write(0),), "g2": (write(0),), "r1": (read(0),), "s1": (status(0),)},
        now=EITHER,
    ),
    Scenario(
        "now_two_sessions",
        "a guest write in one step, or two, through two sessions",
        {"g1": (write(0),), "r1": (read(0, of="b"),), "t1": (release(0, of="a"),)},
        sessions=(Session("a"), Session("b")),
        now=EITHER,
    ),
)

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
        "two clients that release what they have read, as READ_ONCE does",
        {"o1": (read(0, 2), release(0, 2)), "o2": (read(0), release(0)), "g1": (write(0, 2),)},
        clusters=2,
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
        zeroes=(1,),
        limits={"STATUS_WINDOW": CLUSTER},
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
        {"g1": (write(0),), "g2": (zero(0),), "l1": (look(0), look(0))},
        halves=True,
    ),
)

ARMING = (
    Scenario(
        "arming",
        "a session is armed among guest writes, and read",
        {"g1": (write(0, 2),), "g2": (write(1),), "a": (arm("b"),), "r1": (read(0, 2, of="b"),)},
        clusters=2,
        sessions=(Session("b", armed=False),),
    ),
    Scenario(
        "arming_now",
        "the same with guest writes in one step or more",
        {"g1": (write(0),), "g2": (write(0),), "a": (arm("b"),), "r1": (read(0, of="b"),)},
        sessions=(Session("b", armed=False),),
        now=EITHER,
    ),
    Scenario(
        "arm_parked",
        "a guest write waits in one session's copy while another session is armed",
        {"g1": (write(0),), "a": (arm("b"), read(0, of="b"), finish("b"))},
        sessions=(Session("a", BACKUP_FIRST), Session("b", armed=False)),
    ),
    Scenario(
        "arm_hung",
        "the same, and the first session's temp image hangs for ever",
        {"g1": (write(0),), "a": (arm("b"), read(0, of="b"))},
        sessions=(Session("a", BACKUP_FIRST), Session("b", armed=False)),
        hangs=(("temp vda@a", "write"),),
        every_step=True,
    ),
    Scenario(
        "arm_deadline",
        "an active write that outlasts arming's deadline: nothing is left behind",
        {"g1": (write(0),), "a": (arm("b"),), "g2": (write(0),)},
        sessions=(Session("b", armed=False),),
    ),
    Scenario(
        "arm_two",
        "two armings at a time, with a guest write",
        {"g1": (write(0),), "a": (arm("a"),), "b": (arm("b"),), "r1": (read(0, of="a"),)},
        sessions=(Session("a", armed=False), Session("b", armed=False)),
    ),
    Scenario(
        "arm_two_disks",
        "one session over two disks while guests write to both",
        {"g1": (write(0),), "g2": (write(0, disk="vdb"),), "a": (arm("b"),),
         "r1": (read(0, of="b"),)},
        disks=("vda", "vdb"),
        sessions=(Session("b", disks=("vda", "vdb"), armed=False),),
    ),
    Scenario(
        "finish_reuse",
        "a session is finished with a copy in flight, another one begun at once and read",
        {"g1": (write(0),), "c": (finish("a"), arm("b"), write(0), read(0, of="b"))},
        sessions=(Session("a"), Session("b", armed=False)),
    ),
    Scenario(
        "finish_reads",
        "a session is finished among reads and status requests",
        {"g1": (write(0),), "r1": (read(0),), "s1": (status(0),), "e": (finish(),)},
    ),
    Scenario(
        "now_always",
        "devices that always answer at once, but for what they cannot",
        {"g1": (write(0, 2), zero(0)), "r1": (read(0, 2),), "t1": (release(0),), "e": (finish(),)},
        clusters=2,
        now=ALWAYS,
    ),
)  # fmt: skip

SCENARIOS = (*COPYING, *WAITING, *RELEASING, *MAPPING, *ARMING)
