"""Disks and sessions as tables for a terminal; plain columns where nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
PLAIN_WIDTH = 10_000
"""Columns where the output is no terminal: lines are not to be cut."""
WHOLE = ("DISK", "SESSION", "EXPORT", "BITMAP", "JOB", "ID")
"""What names things, and is typed or copied: never cut, however narrow the terminal."""
BRIEF_BELOW = 132
"""Columns of a terminal below which what is shown again and again leaves columns out."""


def console() -> Console:
    """For standard output."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def show(*parts: RenderableType) -> None:
    """Print, to be cut by nobody but the terminal's width."""
    for part in parts:
        if isinstance(part, Table):
            _keep_names(part)
    # Not cropped: a terminal that is narrower than the names wraps the line.
    console().print(Group(*parts), crop=False)


def _keep_names(table: Table) -> None:
    for column in table.columns:
        if column.header in WHOLE:
            column.min_width = max((cell_len(str(cell)) for cell in column.cells), default=0)


def size(count: int | None) -> str:
    """``4096`` as 4.0 KiB; None, no limit, as a dash."""
    if count is None:
        return "-"
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit has returned")


def moment(seconds: float) -> str:
    """As in the log."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """Short: 1.2 ms, 3.4 s, 5:07:00."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def disk_table(disks: Iterable[Mapping[str, Any]], *, brief: bool = False) -> Table:
    """A line for each disk; ``brief``: clients are counted, and no images."""
    table = columns("DISK", "SIZE", "CLIENTS", "SESSIONS", "GUEST WRITES")
    if not brief:
        table.add_column("IMAGE", no_wrap=True)
    for disk in disks:
        clients = str(len(disk["clients"])) if brief else ", ".join(disk["clients"]) or "-"
        sessions = ", ".join(disk["sessions"]) or "-"
        length = size(disk["size"])
        if disk["image_size"] != disk["size"]:
            length += f", image {size(disk['image_size'])}"
        if disk["lost"] is not None:
            length += ", lost"
        if disk.get("away"):
            length += ", away"
        row = (disk["name"], length, clients, sessions, str(disk["guest_writes"]))
        table.add_row(*map(Text, row if brief else (*row, disk["image"])))
    return table


def session_table(sessions: Iterable[Mapping[str, Any]], *, brief: bool = False) -> Table:
    """A line for each session; ``brief``: without its id."""
    table = columns("SESSION", "STATE", "BEGUN", "DISKS", "PAUSE", "TEMP")
    if not brief:
        table.add_column("ID", no_wrap=True)
    for session in sessions:
        disks = session["disks"]
        held = sum(disk["temp"]["now"] for disk in disks)
        row = (
            session["name"],
            _state(session),
            moment(session["armed_at"]),
            ", ".join(disk["disk"] for disk in disks),
            f"{session['pause_ms']:.1f} ms",
            size(None if session["state"] == "finished" else held),
        )
        table.add_row(*map(Text, row if brief else (*row, session["id"])))
    return table


def bitmap_table(bitmaps: Mapping[str, Iterable[Mapping[str, Any]]]) -> Table:
    """A line for each bitmap; ``bitmaps``: those of each disk."""
    table = columns("DISK", "BITMAP", "STATE", "DIRTY", "GRANULARITY", "SINCE", "USED BY", "ID")
    for disk, found in bitmaps.items():
        for bitmap in found:
            since = bitmap["since"]
            shown = f"{since['session']} {moment(since['armed_at'])}" if since else "-"
            row = (
                *(disk, bitmap["name"], bitmap["state"]),
                *(size(bitmap["dirty"]), size(bitmap["granularity"]), shown),
                *(bitmap["used_by"] or "-", bitmap["id"]),
            )
            table.add_row(*map(Text, row))
    return table


def fleece_table(sessions: Iterable[Mapping[str, Any]], *, brief: bool = False) -> Table:
    """A bar for each fleece: how much of it the backup has released; ``brief``: less beside it.

    One that broke has none: all of it was given up, but that is no backup that is done.
    """
    table = columns("EXPORT", "RELEASED", "", "LEFT", "TEMP", "GUEST P99")
    if not brief:
        for column in ("PEAK", "LIMIT", "CLIENTS"):
            table.add_column(column, no_wrap=True)
    for session in sessions:
        for disk in session["disks"]:
            done, whole, temp = disk["released"], max(disk["size"], 1), disk["temp"]
            if disk["broken"] is None:
                bar: RenderableType = ProgressBar(total=whole, completed=done, width=20)
                row = [f"{100 * done / whole:3.0f} %", size(disk["accessible"])]
            else:
                bar, row = Text("broken"), ["-", "-"]
            row += [size(temp["now"]), duration(disk["guest_wait"]["p99"])]
            if not brief:
                row += [size(temp["peak"]), size(temp["limit"]), str(len(disk["clients"]))]
            table.add_row(Text(disk["export"]), bar, *map(Text, row))
    return table


def session_details(session: Mapping[str, Any]) -> Sequence[RenderableType]:
    """Everything about one session."""
    facts = Table.grid(padding=(0, 2))
    for name in ("name", "id", "owner", "reason", "on_cbw_error"):
        if session[name] is not None:
            facts.add_row(Text(name.replace("_", " ")), Text(str(session[name])))
    facts.add_row("state", Text(_state(session)))
    facts.add_row("begun", moment(session["armed_at"]))
    if session["finished_at"] is not None:
        facts.add_row("finished", moment(session["finished_at"]))
    facts.add_row("pause", f"{session['pause_ms']:.1f} ms")
    if session["read_once"]:
        facts.add_row("read once", "what was read is released")
    facts.add_row("cbw timeout", f"{session['cbw_timeout']:g} s")
    for name in ("ttl", "idle_ttl"):
        if session[name] is not None:
            left = session[f"{name}_left"]
            shown = "" if left is None else f", {duration(left)} left"
            facts.add_row(name.replace("_", " "), f"{session[name]:g} s{shown}")
    parts: list[RenderableType] = [facts]
    for disk in session["disks"]:
        parts += [Text(""), _fleece_facts(disk)]
    return parts


def _fleece_facts(disk: Mapping[str, Any]) -> Table:
    copies, wait, temp = disk["copies"], disk["guest_wait"], disk["temp"]
    facts = Table.grid(padding=(0, 2))
    own = disk["bitmap"]
    rows = [
        ("export", disk["export"]),
        *(("uri", uri) for uri in disk["uris"]),
        ("broken", disk["broken"]),
        ("size", f"{size(disk['size'])}, clusters of {size(disk['cluster_size'])}"),
        ("accessible", size(disk["accessible"])),
        ("released", size(disk["released"])),
        ("copied", size(disk["copied"])),
        ("temp", _held(temp)),
        ("temp image", temp["image"]),
        ("copies", ", ".join(f"{copies[key]} {key.replace('_', ' ')}" for key in copies)),
        (
            "guest waits",
            f"{wait['count']}, mean {duration(wait['mean'])}, p99 {duration(wait['p99'])}, "
            f"max {duration(wait['max'])}"
            + (f", {wait['throttled']} throttled" if wait["throttled"] else ""),
        ),
        ("clients", ", ".join(disk["clients"]) or "-"),
        ("bitmap", None if own is None else _own_bitmap(own)),
    ]
    for name, value in rows:
        if value is not None:
            facts.add_row(Text(name), Text(str(value)))
    return facts


def _held(temp: Mapping[str, Any]) -> str:
    text = f"{size(temp['now'])}, peak {size(temp['peak'])}, limit {size(temp['limit'])}"
    return text if temp["room"] is None else f"{text}, room for {size(temp['room'])}"


def _own_bitmap(own: Mapping[str, Any]) -> str:
    since = own["since"]
    text = f"{own['name']}, {own['mode']}, {size(own['dirty'])} dirty"
    if since is not None:
        text += f" since {since['session']} {moment(since['armed_at'])}"
    return text if own["reason"] is None else f"{text}: {own['reason']}"


def status_parts(status: Mapping[str, Any], *, brief: bool = False) -> Sequence[RenderableType]:
    """What ``fleecenbd status`` shows; ``brief``: what fits into 80 columns, nothing finished."""
    active = [session for session in status["sessions"] if session["state"] != "finished"]
    parts: list[RenderableType] = [
        Text(f"fleecenbd {status['version']}, pid {status['pid']}"),
        Text(""),
        disk_table(status["disks"], brief=brief),
    ]
    if sessions := active if brief else status["sessions"]:
        parts += [Text(""), session_table(sessions, brief=brief)]
    if active:
        parts += [Text(""), fleece_table(active, brief=brief), *_broken(active)]
    jobs = status.get("jobs", [])
    if jobs := [job for job in jobs if job["ended_at"] is None] if brief else jobs:
        # Only here: its module needs this one.
        from fleecenbd.cli.job_tables import job_table

        parts += [Text(""), job_table(jobs, brief=brief)]
    if active and not brief:
        uris = Table.grid(padding=(0, 2))
        for session in active:
            for disk in session["disks"]:
                for uri in disk["uris"]:
                    uris.add_row(Text(disk["export"]), Text(uri))
        parts += [Text(""), uris]
    return parts


def _broken(sessions: Iterable[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Why each fleece broke that did; long lines are wrapped, not cut."""
    disks = [disk for session in sessions for disk in session["disks"] if disk["broken"]]
    if disks:
        yield Text("")
        for disk in disks:
            yield Text(f"{disk['export']} is broken: {disk['broken']}")


def _state(session: Mapping[str, Any]) -> str:
    if session["state"] == "finished":
        return f"finished ({session['result']})"
    return str(session["state"])


def columns(*names: str) -> Table:
    """A table of these columns, whose values stay on one line."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
