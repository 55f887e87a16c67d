"""Events of a server as lines for people: when, what, and what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fleecenbd.cli import tables
from fleecenbd.cli.errors import one_line
from fleecenbd.server import events

Event: TypeAlias = Mapping[str, Any]

_KIND_WIDTH = max(map(len, events.KINDS))
_JOB = "{job}: {disk}@{session} to {target}"
_CLIENT = "{export}: {client}"


def line(event: Event) -> str:
    """One line, without its end; of a kind that a newer server may have, too."""
    kind = event["event"]
    text = _TEXTS.get(kind, _fields)
    about = text.format_map(event) if isinstance(text, str) else text(event)
    whole = f"{tables.moment(event['time'])} {kind:<{_KIND_WIDTH}} {one_line(about)}"
    # A hook's last words may be anything, and this goes to terminals.
    return "".join(letter if letter.isprintable() else "?" for letter in whole)


def _fields(event: Event) -> str:
    return ", ".join(f"{key} {event[key]}" for key in event if key not in ("event", "time"))


def _session_begun(event: Event) -> str:
    return f"{event['session']} over {', '.join(event['disks'])}, {event['id']}"


def _temp(event: Event) -> str:
    used, limit = tables.size(event["used"]), tables.size(event["limit"])
    return f"{event['disk']}@{event['session']}: {used} of {limit} in use"


def _temp_throttled(event: Event) -> str:
    if event["delay"] <= 0:
        return f"{_temp(event)}; guest writes do not wait any more"
    return f"{_temp(event)}; guest writes that copy wait {tables.duration(event['delay'])}"


def _disk_resized(event: Event) -> str:
    if event["image_size"] == event["size"]:
        return f"{event['disk']}: its image has {event['size']} bytes again, as it is served"
    return (
        f"{event['disk']}: served as {event['size']} bytes, its image has {event['image_size']} now"
    )


def _job_ended(event: Event) -> str:
    text = f"{_JOB.format_map(event)}: {event['state']}"
    return text if event["error"] in (None, event["state"]) else f"{text}: {event['error']}"


_TEXTS: Mapping[str, str | Callable[[Event], str]] = {
    events.SESSION_BEGUN: _session_begun,
    events.SESSION_FINISHED: "{session}: {result}, {id}",
    events.SESSION_BROKEN: "{disk}@{session}: {reason}",
    events.CLIENT_CAME: _CLIENT,
    events.CLIENT_WENT: _CLIENT,
    events.DISK_ADDED: "{disk}: {image}",
    events.DISK_REMOVED: "{disk}",
    events.DISK_RESIZED: _disk_resized,
    events.DISK_LOST: "{disk}: {reason}",
    events.DISK_AWAY: "{disk}: {image}",
    events.DISK_BACK: "{disk}: {image}",
    events.TEMP_LOW: _temp,
    events.TEMP_FULL: _temp,
    events.TEMP_THROTTLED: _temp_throttled,
    events.HOOK_FAILED: "{session}: {hook}: {reason}",
    events.BITMAP_LOST: "{bitmap} of {disk}: {reason}",
    events.JOB_STARTED: _JOB,
    events.JOB_PAUSED: _JOB,
    events.JOB_RESUMED: _JOB,
    events.JOB_ENDED: _job_ended,
    events.EVENTS_LOST: "{count}: they came faster than they were read here",
}
"""What is said of each kind: a format of its fields, or what makes it."""
