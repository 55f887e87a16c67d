"""What a pull tells while it works: for a bar, for machines (as JSON lines), for a caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec


class Start(msgspec.Struct, tag_field="event", tag="start", frozen=True):
    """Everything is open; nothing was copied yet. Sizes in bytes."""

    source: str
    target: str
    session_id: str | None
    size: int
    to_copy: int
    """What has to become durable in all, zeroes included: the disk, or what is dirty of it."""
    resumed: int
    """Of that, what an earlier pull has made durable."""


class Progress(msgspec.Struct, tag_field="event", tag="progress", frozen=True):
    """Some times a second."""

    durable: int
    """Bytes of ``to_copy`` that are durable in the target, ``resumed`` among them."""
    read: int
    """Bytes that this pull has read: no zeroes that the map tells of."""
    to_copy: int
    released: int
    """Bytes that this pull has released, by TRIM or (``read_once``) by reading."""
    rate: float
    """Bytes read per second, of the last few seconds."""
    eta_s: float | None
    """None while nobody can know."""
    temp_bytes: int | None
    """Held in the server's temp image when it was looked at last; None where it does not tell."""
    elapsed_s: float
    paused: bool


class Note(msgspec.Struct, tag_field="event", tag="note", frozen=True):
    """Something that a user should know, and that ends nothing: one line."""

    text: str


class Checksum(msgspec.Struct, frozen=True):
    """See ``checksums``."""

    algorithm: str
    root: str
    """In hexadecimal."""


class Done(msgspec.Struct, tag_field="event", tag="done", frozen=True):
    """All is durable, and the target has its name."""

    durable: int
    released: int
    read: int
    elapsed_s: float
    checksum: Checksum | None
    verified: bool
    temp_peak: int | None = None
    """The most that any look at the server's temp image has found."""


class Failed(msgspec.Struct, tag_field="event", tag="failed", frozen=True):
    """The pull has ended, and the target is not complete."""

    error: str
    kept: str | None
    """What is there for ``--resume``; None: nothing."""


Event: TypeAlias = Start | Progress | Note | Done | Failed
OnEvent: TypeAlias = Callable[[Event], None]
