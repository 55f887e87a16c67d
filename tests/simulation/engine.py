"""The engine under test: the real one, or a copy of it with a planted bug (mutations.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Engine:
    """What the simulation calls by name; everything else it reaches through these."""

    disk: Callable[..., Any]
    arm: Callable[..., Any]
    session_options: Callable[..., Any]
    constants: dict[str, int]
    """Limits that the checkers must know: COPIES_MAX."""


def from_modules(find: Callable[[str], Any]) -> Engine:
    """Put an engine together from its modules; ``find`` maps a dotted name to a module."""
    session = find("fleecenbd.engine.session")
    return Engine(
        disk=find("fleecenbd.engine.disk").Disk,
        arm=session.arm,
        session_options=session.SessionOptions,
        constants={"COPIES_MAX": find("fleecenbd.engine.block_copy").COPIES_MAX},
    )


def real() -> Engine:
    """The engine as it is in the tree."""
    return from_modules(importlib.import_module)
