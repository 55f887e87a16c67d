"""Bugs planted into the backup command, each of which the simulation must catch (sim_backup.py)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class BackupBug:
    """Texts that a module has exactly once, and what replaces them."""

    name: str
    whole_module: str
    edits: tuple[tuple[str, str], ...]

    @property
    def module(self) -> str:
        """For the table."""
        return self.whole_module.rpartition(".")[2]


def _bug(name: str, module: str, *edits: tuple[str, str]) -> BackupBug:
    return BackupBug(name, f"fleecenbd.{module}", edits)


BACKUP_BUGS = (
    _bug(
        "what an increment builds on need not be what it is counted from",
        "client.records",
        ("return found.record.id == since or (", "return True or ("),
    ),
    _bug(
        "the session is a success before the backup is written down",
        "cli.backing_up",
        (
            "        return self._write_down(session, works)\n",
            '        await self._session.finish(session["id"], SUCCESS)\n'
            "        return self._write_down(session, works)\n",
        ),
    ),
    _bug(
        "a session that a killed run has left counts as a success",
        "cli.backing_up",
        (
            "finish(session_id, FAILED)\n            self._places.clean_after(",
            "finish(session_id, SUCCESS)\n            self._places.clean_after(",
        ),
    ),
    _bug(
        "a session of another moment is found whole by its disk",
        "cli.backup_pairs",
        ("if found is None or found.record.id != session_id:", "if found is None:"),
    ),
    _bug(
        "whoever is interrupted while it begins forgets its session",
        "cli.backup_sessions",
        ("            await undo(result)\n", ""),
    ),
    _bug(
        "what was half made stays",
        "cli.backing_up",
        (
            "        self._places.clean()\n        self._session.renew()",
            "        self._session.renew()",
        ),
    ),
    _bug(
        "zeroes that have changed are not put into the full backup",
        "client.in_place",
        ("            space.zero(offset, data - offset, may_trim=True, fast=False)\n", ""),
    ),
    _bug(
        "the changes go before the record says that they are in place",
        "client.in_place",
        (
            '    step("write the record")\n',
            '    step("write the record")\n    staged_path(target).unlink()\n',
        ),
    ),
    _bug(
        "the full backup is a mix of two moments under its own name",
        "client.in_place",
        (
            '    step("rename back")\n    os.rename(rolling, target)\n',
            '    step("rename back")\n',
        ),
        (
            '            step("make durable")\n',
            '            os.rename(rolling, target)\n            step("make durable")\n',
        ),
        (
            "    (disk,) = mark.record.disks\n",
            "    (disk,) = mark.record.disks\n    rolling = target\n",
        ),
    ),
)


@contextmanager
def planted(bug: BackupBug) -> Iterator[None]:
    """The functions of the module, and the methods of its classes, are the bug's meanwhile."""
    real = importlib.import_module(bug.whole_module)
    assert real.__file__ is not None
    with open(real.__file__) as file:
        source = file.read()
    for old, new in bug.edits:
        assert source.count(old) == 1, f"{bug.name}: {source.count(old)} times, not once:\n{old}"
        source = source.replace(old, new)
    mutant = ModuleType(bug.whole_module)
    sys.modules[bug.whole_module] = mutant  # where dataclasses look for annotations
    try:
        exec(compile(source, f"{bug.module} with a bug", "exec", dont_inherit=True), vars(mutant))
    finally:
        sys.modules[bug.whole_module] = real
    # What it makes and catches are the real module's classes.
    saved: list[tuple[Any, str, Any]] = []
    for key, thing in list(vars(mutant).items()):
        if getattr(thing, "__module__", None) != bug.whole_module:
            continue
        owner = getattr(real, key)
        if isinstance(thing, FunctionType):
            saved.append((owner, "__code__", owner.__code__))
            owner.__code__ = thing.__code__
        elif isinstance(thing, type):
            for attribute, value in vars(thing).items():
                if isinstance(value, FunctionType):
                    method = vars(owner)[attribute]
                    saved.append((method, "__code__", method.__code__))
                    method.__code__ = value.__code__
    try:
        yield
    finally:
        for owner, attribute, value in saved:
            setattr(owner, attribute, value)
