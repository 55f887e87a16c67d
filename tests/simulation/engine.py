"""The engine under test: the real one, or a copy of it with a planted bug (mutations.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

LIMITS = {
    "COPY_LENGTH_MAX": "block_copy",
    "COPIES_MAX": "block_copy",
    "HOLE_LENGTH_MIN": "copy_reads",
    "CLONE_LENGTH_MIN": "copy_reads",
    "READ_NOW_LENGTH_MAX": "snapshot_access",
    "RANGES_MAX": "parts",
    "WRITE_NOW_LENGTH_MAX": "disk",
    "PIECE_LENGTH_MAX": "disk",
    "TRIM_PART_MIN": "disk",
    "LOW": "room",
    "STATUS_WINDOW": "extents",
    "STATUS_EXTENTS_MAX": "extents",
}
"""Limits of the engine that a plan may lower, so that small disks meet them, and their modules."""


OTHERS = ("bitmap", "recording", "resume")
"""Modules besides that the simulation of chains needs."""


@dataclass(frozen=True)
class Engine:
    """What the simulation calls by name; everything else it reaches through these."""

    disk: Callable[..., Any]
    arm: Callable[..., Any]
    session_options: Callable[..., Any]
    modules: Mapping[str, ModuleType]
    """The modules of LIMITS, and OTHERS."""

    def limit(self, name: str) -> float:
        """The value of a limit now."""
        value: float = getattr(self.modules[LIMITS[name]], name)
        return value

    @contextmanager
    def with_limits(self, limits: Mapping[str, float]) -> Iterator[None]:
        """The engine with other limits, for as long as a run lasts."""
        saved = {name: self.limit(name) for name in limits}
        try:
            for name, value in limits.items():
                setattr(self.modules[LIMITS[name]], name, value)
            yield
        finally:
            for name, value in saved.items():
                setattr(self.modules[LIMITS[name]], name, value)


def from_modules(find: Callable[[str], Any]) -> Engine:
    """Put an engine together from its modules; ``find`` maps a dotted name to a module."""
    session = find("fleecenbd.engine.session")
    return Engine(
        disk=find("fleecenbd.engine.disk").Disk,
        arm=session.arm,
        session_options=session.SessionOptions,
        modules={name: find(f"fleecenbd.engine.{name}") for name in {*LIMITS.values(), *OTHERS}},
    )


def real() -> Engine:
    """The engine as it is in the tree."""
    return from_modules(importlib.import_module)
