"""Sessions begin and end among guest writes."""

from __future__ import annotations

from ..scenario import (
    ALWAYS,
    BACKUP_FIRST,
    EITHER,
    Scenario,
    Session,
    arm,
    finish,
    read,
    release,
    status,
    write,
    zero,
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
        "arm_crossed",
        "two armings of one disk, one of which still waits for another disk's active write",
        {
            "g1": (write(0),),
            "g2": (write(0, disk="vdb"),),
            "a": (arm("a"),),
            "b": (arm("b"),),
        },
        disks=("vda", "vdb"),
        sessions=(
            Session("a", armed=False),
            Session("b", disks=("vda", "vdb"), armed=False),
        ),
    ),
    Scenario(
        "finish_reuse",
        "a session is finished with a copy in flight, another one begun at once and read",
        {"g1": (write(0),), "c": (finish("a"), arm("b"), write(0), read(0, of="b"))},
        sessions=(Session("a"), Session("b", armed=False)),
    ),
    Scenario(
        "finish_status",
        "a session is finished while a status request of its waits for its next turn",
        {"s1": (status(0),), "e": (finish(),)},
        every_step=True,
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
