"""Events as people read them."""

from typing import Any

import pytest

from fleecenbd.cli import event_lines
from fleecenbd.server import events

TEMP = {"session": "n", "disk": "vda", "used": 4 << 20, "limit": 5 << 20}
JOB = {"job": "3f9a01c2", "session": "n", "disk": "vda", "target": "/backup/vda.raw"}

SHOWN: list[tuple[str, dict[str, Any], str]] = [
    (
        events.SESSION_BEGUN,
        {"session": "n", "id": "6f1c", "disks": ["a", "b"]},
        "n over a, b, 6f1c",
    ),
    (
        events.SESSION_FINISHED,
        {"session": "n", "id": "6f1c", "result": "failed"},
        "n: failed, 6f1c",
    ),
    (
        events.SESSION_BROKEN,
        {"session": "n", "disk": "vda", "reason": "copying\nfailed"},
        "vda@n: copying failed",
    ),
    (events.CLIENT_CAME, {"export": "vda@n+once", "client": "pid 7"}, "vda@n+once: pid 7"),
    (events.CLIENT_WENT, {"export": "vda", "client": "pid 7"}, "vda: pid 7"),
    (events.DISK_ADDED, {"disk": "vda", "image": "/vm.raw"}, "vda: /vm.raw"),
    (events.DISK_REMOVED, {"disk": "vda"}, "vda"),
    (
        events.DISK_RESIZED,
        {"disk": "vda", "size": 1024, "image_size": 513},
        "vda: served as 1024 bytes, its image has 513 now",
    ),
    (
        events.DISK_RESIZED,
        {"disk": "vda", "size": 1024, "image_size": 1024},
        "vda: its image has 1024 bytes again, as it is served",
    ),
    (
        events.DISK_LOST,
        {"disk": "vda", "reason": "its child has ended"},
        "vda: its child has ended",
    ),
    (events.DISK_AWAY, {"disk": "vda", "image": "nbd://store/vm"}, "vda: nbd://store/vm"),
    (events.DISK_BACK, {"disk": "vda", "image": "nbd://store/vm"}, "vda: nbd://store/vm"),
    (events.TEMP_LOW, TEMP, "vda@n: 4.0 MiB of 5.0 MiB in use"),
    (events.TEMP_FULL, TEMP, "vda@n: 4.0 MiB of 5.0 MiB in use"),
    (
        events.TEMP_THROTTLED,
        {**TEMP, "delay": 0.012},
        "vda@n: 4.0 MiB of 5.0 MiB in use; guest writes that copy wait 12.0 ms",
    ),
    (
        events.TEMP_THROTTLED,
        {**TEMP, "delay": 0.0},
        "vda@n: 4.0 MiB of 5.0 MiB in use; guest writes do not wait any more",
    ),
    (
        events.HOOK_FAILED,
        {"session": "n", "hook": "thaw", "reason": "exit status 1:\n\x1b[1mno agent"},
        "n: thaw: exit status 1: ?[1mno agent",
    ),
    (
        events.BITMAP_LOST,
        {"disk": "vda", "bitmap": "chain", "reason": "no clean mark"},
        "chain of vda: no clean mark",
    ),
    (events.JOB_STARTED, JOB, "3f9a01c2: vda@n to /backup/vda.raw"),
    (events.JOB_PAUSED, JOB, "3f9a01c2: vda@n to /backup/vda.raw"),
    (events.JOB_RESUMED, JOB, "3f9a01c2: vda@n to /backup/vda.raw"),
    (
        events.JOB_ENDED,
        {**JOB, "state": "complete", "error": None},
        "3f9a01c2: vda@n to /backup/vda.raw: complete",
    ),
    (
        events.JOB_ENDED,
        {**JOB, "state": "failed", "error": "no space"},
        "3f9a01c2: vda@n to /backup/vda.raw: failed: no space",
    ),
    (
        events.JOB_ENDED,
        {**JOB, "state": "cancelled", "error": "cancelled"},
        "3f9a01c2: vda@n to /backup/vda.raw: cancelled",
    ),
    (events.EVENTS_LOST, {"count": 3}, "3: they came faster than they were read here"),
    ("of-a-newer-server", {"disk": "vda", "why": "so"}, "disk vda, why so"),
]


@pytest.mark.parametrize(("kind", "about", "shown"), SHOWN)
def test_a_line_says_when_what_and_about_what(kind: str, about: dict[str, Any], shown: str) -> None:
    line = event_lines.line({"event": kind, "time": 1795767323.59, **about})
    when, what, rest = line.split(maxsplit=2)
    assert (when, what, rest) == ("2026-11-27T08:15:23Z", kind, shown)


def test_every_kind_has_its_line() -> None:
    assert {kind for kind, _, _ in SHOWN} >= set(events.KINDS)
