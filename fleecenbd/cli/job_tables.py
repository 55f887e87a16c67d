"""Jobs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fleecenbd.cli.tables import columns, duration, moment, size


def job_table(jobs: Iterable[Mapping[str, Any]], *, brief: bool = False) -> Table:
    """A line for each job; ``brief``: without its target."""
    table = columns("JOB", "STATE", "EXPORT", "DURABLE", "OF", "", "SPEED", "LEFT", "FINISH")
    if not brief:
        for column in ("TARGET", "ERROR"):
            table.add_column(column, no_wrap=True)
    for job in jobs:
        row = [job["id"], job["state"], f"{job['disk']}@{job['session']}", *_done(job)]
        row.append(job["result"] or ("yes" if job["finish"] else "-"))
        if not brief:
            row += [job["target"], job["error"] or "-"]
        table.add_row(*map(Text, row))
    return table


def _done(job: Mapping[str, Any]) -> list[str]:
    """Durable, of how much, in parts of a hundred, how fast, how long still."""
    progress = job["progress"]
    if progress is None:
        return ["-"] * 5
    percent = 100 * progress["durable"] // max(progress["to_copy"], 1)
    if job["state"] != "complete":
        percent = min(percent, 99)  # 100 is for what is complete
    speed, left = "-", "-"
    if job["ended_at"] is None:
        speed = f"{size(int(progress['speed']))}/s"
        left = "-" if progress["eta"] is None else duration(progress["eta"])
    return [size(progress["durable"]), size(progress["to_copy"]), f"{percent} %", speed, left]


def job_details(job: Mapping[str, Any]) -> RenderableType:
    """Everything about one."""
    facts = Table.grid(padding=(0, 2))
    progress, checksum = job["progress"], job["checksum"]
    rows: list[tuple[str, Any]] = [
        ("job", job["id"]),
        ("state", job["state"]),
        ("error", job["error"]),
        ("note", job["note"]),
        ("session", f"{job['session']} {job['session_id']}"),
        ("disk", job["disk"]),
        ("target", job["target"]),
        ("kept", job["kept"]),
        ("begun", moment(job["started_at"])),
        ("ended", None if job["ended_at"] is None else moment(job["ended_at"])),
        ("pid", job["pid"]),
        ("limit", None if job["rate"] is None else f"{size(job['rate'])}/s"),
    ]
    is_over = job["ended_at"] is not None
    if progress is not None:
        durable, whole, percent, speed, left = _done(job)
        resumed = f", {size(progress['resumed'])} resumed" if progress["resumed"] else ""
        rows += [
            ("durable", f"{durable} of {whole}, {percent}{resumed}"),
            ("read", size(progress["read"])),
            ("released", size(progress["released"])),
            ("temp", None if is_over or progress["temp"] is None else size(progress["temp"])),
            ("time", duration(progress["elapsed"]) + ("" if left == "-" else f", {left} left")),
            ("speed", None if speed == "-" else speed),
        ]
    if checksum is not None:
        rows.append((checksum["algorithm"], checksum["root"]))
    if job["verified"]:
        rows.append(("verified", "yes: read back and found right"))
    if job["finish"]:
        rows.append(("finish", job["result"] or "yes, when its session's jobs have ended"))
    for name, value in rows:
        if value is not None:
            facts.add_row(Text(name), Text(str(value)))
    return facts
