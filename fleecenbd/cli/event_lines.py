"""Events of a server as lines for people: when, what, and what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fleecenbd.cli import tables
from fleecenbd.cli.errors import one_line
from fleecenbd.server import events

Event: TypeAlias = Mapping[str, Any]

_KIND_WIDTH = max(map(len, events.KINDS))


def line(event: Event) -> str:
    """One line, without its end; of a kind that a newer server may have, too."""
    kind = event["event"]
    about = _TEXTS.get(kind, _fields)(event)
    text = f"{tables.moment(event['time'])} {kind:<{_KIND_WIDTH}} {one_line(about)}"
    # A hook's last words may be anything, and this goes to terminals.
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _fields(event: Event) -> str:
    return ", ".join(f"{key} {event[key]}" for key in event if key not in ("event", "time"))


def _fleece(event: Event) -> str:
    return f"{event['disk']}@{event['session']}"


def _session_begun(event: Event) -> str:
    return f"{event['session']} over {', '.join(event['disks'])}, {event['id']}"


def _session_finished(event: Event) -> str:
    return f"{event['session']}: {event['result']}, {event['id']}"


def _session_broken(event: Event) -> str:
    return f"{_fleece(event)}: {event['reason']}"


def _client(event: Event) -> str:
    return f"{event['export']}: {event['client']}"


def _disk_added(event: Event) -> str:
    return f"{event['disk']}: {event['image']}"


def _disk_removed(event: Event) -> str:
    return str(event["disk"])


def _disk_resized(event: Event) -> str:
    served, now = event["size"], event["image_size"]
    return f"{event['disk']}: served as {served} bytes, its image has {now} now"


def _temp(event: Event) -> str:
    used, limit = tables.size(event["used"]), tables.size(event["limit"])
    return f"{_fleece(event)}: {used} of {limit} in use"


def _temp_throttled(event: Event) -> str:
    if event["delay"] <= 0:
        return f"{_temp(event)}; guest writes do not wait any more"
    return f"{_temp(event)}; guest writes that copy wait {tables.duration(event['delay'])}"


def _hook_failed(event: Event) -> str:
    return f"{event['session']}: {event['hook']}: {event['reason']}"


def _bitmap_lost(event: Event) -> str:
    return f"{event['bitmap']} of {event['disk']}: {event['reason']}"


def _job(event: Event) -> str:
    return f"{event['job']}: {_fleece(event)} to {event['target']}"


def _job_ended(event: Event) -> str:
    text = f"{_job(event)}: {event['state']}"
    return text if event["error"] in (None, event["state"]) else f"{text}: {event['error']}"


def _events_lost(event: Event) -> str:
    return f"{event['count']}: they came faster than they were read here"


_TEXTS: Mapping[str, Callable[[Event], str]] = {
    events.SESSION_BEGUN: _session_begun,
    events.SESSION_FINISHED: _session_finished,
    events.SESSION_BROKEN: _session_broken,
    events.CLIENT_CAME: _client,
    events.CLIENT_WENT: _client,
    events.DISK_ADDED: _disk_added,
    events.DISK_REMOVED: _disk_removed,
    events.DISK_RESIZED: _disk_resized,
    events.TEMP_LOW: _temp,
    events.TEMP_FULL: _temp,
    events.TEMP_THROTTLED: _temp_throttled,
    events.HOOK_FAILED: _hook_failed,
    events.BITMAP_LOST: _bitmap_lost,
    events.JOB_STARTED: _job,
    events.JOB_PAUSED: _job,
    events.JOB_RESUMED: _job,
    events.JOB_ENDED: _job_ended,
    events.EVENTS_LOST: _events_lost,
}
