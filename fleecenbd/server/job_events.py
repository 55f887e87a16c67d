"""What a job's child says on its standard output: JSON lines, as docs/pull.md has them.

Only what a job needs of them; fields that are not here are left out.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Start(msgspec.Struct, tag_field="event", tag="start", frozen=True):
    """Everything is open; nothing was copied yet. Sizes in bytes."""

    session_id: str | None
    size: int
    to_copy: int
    resumed: int


class Progress(msgspec.Struct, tag_field="event", tag="progress", frozen=True):
    """How far it is."""

    durable: int
    read: int
    to_copy: int
    released: int
    rate: float
    """Bytes per second, as measured."""
    eta_s: float | None
    temp_bytes: int | None
    elapsed_s: float


class Note(msgspec.Struct, tag_field="event", tag="note", frozen=True):
    """One line that a user should know."""

    text: str


class Checksum(msgspec.Struct, frozen=True):
    """Of the whole backup; ``root`` in hexadecimal."""

    algorithm: str
    root: str


class Done(msgspec.Struct, tag_field="event", tag="done", frozen=True):
    """All is durable, and the target has its name."""

    durable: int
    released: int
    read: int
    elapsed_s: float
    checksum: Checksum | None
    verified: bool


class Failed(msgspec.Struct, tag_field="event", tag="failed", frozen=True):
    """It has ended, and the target is not complete. ``kept``: what can be resumed, if anything."""

    error: str
    kept: str | None


JobEvent: TypeAlias = Start | Progress | Note | Done | Failed

_decoder: msgspec.json.Decoder[JobEvent] = msgspec.json.Decoder(JobEvent)


def decode(line: bytes) -> JobEvent:
    """The event of one line. Raises ValueError for what is none."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
