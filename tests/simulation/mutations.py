"""Planted bugs: each is a small patch to the engine's own lines, and must be caught.

A checker counts once a planted bug has shown that it catches. ``load`` imports a copy of
``fleecenbd.engine`` in which one module's source is patched; the real one stays as it is. A patch
whose text is not found exactly once is an error: then the engine has moved on, and the planted
bug has to follow.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import fleecenbd

from . import engine, world
from .planted import PLANTED, PlantedBug

PACKAGE = "fleecenbd.engine"
SEEDS_MAX = 400


class PlantingFailed(Exception):
    """The text to replace is not in the module exactly once."""


@dataclass(frozen=True)
class Catch:
    """How a planted bug fared."""

    bug: PlantedBug
    seeds: int
    """Runs until it was caught, or all of them."""
    violation: str | None


class _PatchingLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, bug: PlantedBug) -> None:
        super().__init__(name, path)
        self._bug = bug

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        source = self.get_data(path).decode()
        return compile(patched(self._bug, source), path, "exec", dont_inherit=True)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    def __init__(self, bug: PlantedBug) -> None:
        self._bug = bug
        self.found = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"{PACKAGE}.{self._bug.module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _PatchingLoader(fullname, spec.origin, self._bug)
        self.found = True
        return spec


def patched(bug: PlantedBug, source: str) -> str:
    """The module's source with the bug in it."""
    for old, new in bug.edits:
        if source.count(old) != 1:
            raise PlantingFailed(
                f"{bug.name}: found {source.count(old)} times in {bug.module}.py, not once:\n{old}"
            )
        source = source.replace(old, new)
    return source


def load(bug: PlantedBug) -> engine.Engine:
    """A copy of the engine with the bug in it."""
    saved = {name: module for name, module in sys.modules.items() if _is_engine(name)}
    package = sys.modules.get(PACKAGE)
    finder = _PatchingFinder(bug)
    for name in saved:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        mutant = engine.from_modules(importlib.import_module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_engine(name)]:
            del sys.modules[name]
        sys.modules.update(saved)
        if package is not None:
            fleecenbd.engine = package  # type: ignore[attr-defined]
    if not finder.found:
        raise PlantingFailed(f"{bug.name}: the engine does not import {bug.module}")
    return mutant


def plant_for_good(bug: PlantedBug) -> None:
    """Plant the bug into every later import of this process: for plant.py, and nobody else."""
    for name in [name for name in sys.modules if _is_engine(name)]:
        del sys.modules[name]
    sys.meta_path.insert(0, _PatchingFinder(bug))


def _is_engine(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def hunt(
    bug: PlantedBug,
    *,
    seeds_max: int = SEEDS_MAX,
    start: int = 0,
    of: Callable[[int, engine.Engine], Any] = world.run,
) -> Catch:
    """Run seeds (of what ``of`` runs) against the bug until a checker catches it."""
    mutant = load(bug)
    for count, seed in enumerate(range(start, start + seeds_max), 1):
        outcome = of(seed, mutant)
        if outcome.violation is not None:
            return Catch(bug, count, outcome.violation)
    return Catch(bug, seeds_max, None)


def caught_by_a_directed_race(bug: PlantedBug) -> bool:
    """Whether the directed races alone catch it; in a process of its own."""
    command = [sys.executable, "-m", "tests.simulation.plant", bug.name]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 1


def main() -> int:
    """Hunt every planted bug; print the table of docs/testing.md."""
    logging.disable(logging.CRITICAL)
    missed = 0
    print("| planted bug | in | checker | after seeds | directed race |")
    print("| --- | --- | --- | --- | --- |")
    for bug in PLANTED:
        catch = hunt(bug)
        missed += catch.violation is None
        by = catch.violation.split(":")[0] if catch.violation else "**nothing**"
        directed = "yes" if caught_by_a_directed_race(bug) else "-"
        print(f"| {bug.name} | {bug.module} | {by} | {catch.seeds} | {directed} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
