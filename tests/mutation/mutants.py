"""What mutmut made of a module: each mutant's lines before and after, and how it ended."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

EQUIVALENT = Path(__file__).with_name("equivalent.toml")

SURVIVED = {0}
NO_TEST = {5, 33}
TIMED_OUT = {36, 24, 152, 255, -24}
"""Exit statuses of mutmut's own (36), and of a process over its share of time (SIGXCPU)."""


@dataclass(frozen=True)
class Mutant:
    """One change to one function."""

    name: str
    """mutmut's, for ``mutmut show`` and ``mutmut run``; numbers move when the function does."""
    module: str
    """``engine.state``"""
    where: str
    """``engine.state.FleeceState.release``"""
    old: str
    new: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is in every version of the code that has these lines in this function."""
        return self.where, self.old, self.new

    @property
    def is_wording(self) -> bool:
        """Does it change nothing but the words of a message or a name of a task?

        mutmut puts ``XX`` around a text, and changes its case.
        """
        old, new = (text.replace("XX", "").casefold() for text in (self.old, self.new))
        return old == new


def read_mutants(mutated: Path, package: str) -> list[Mutant]:
    """All mutants of ``package`` ("engine") in ``mutated``, the folder that mutmut writes."""
    found = []
    for spans in sorted((mutated / "fleecenbd" / package).glob("*.py.spans")):
        module = spans.name.removesuffix(".py.spans")
        lines = spans.with_suffix("").read_text().splitlines()
        functions = json.loads(spans.read_text())["spans"]
        for mangled, (first, last) in functions.items():
            base, number = mangled.rsplit("__mutmut_", 1)
            if number == "orig":
                continue
            first_old, last_old = functions[f"{base}__mutmut_orig"]
            before = _without_name(lines[first_old - 1 : last_old], base)
            after = _without_name(lines[first - 1 : last], base)
            old, new = _difference(before, after)
            found.append(
                Mutant(
                    f"fleecenbd.{package}.{module}.{mangled}",
                    f"{package}.{module}",
                    f"{package}.{module}.{_readable(base)}",
                    old,
                    new,
                )
            )
    return found


def read_ends(mutated: Path, package: str) -> dict[str, int]:
    """Exit status of the tests by mutant, as far as they have run."""
    ends: dict[str, int] = {}
    for meta in (mutated / "fleecenbd" / package).glob("*.py.meta"):
        known = json.loads(meta.read_text())["exit_code_by_key"]
        ends.update({name: code for name, code in known.items() if code is not None})
    return ends


def read_equivalent(path: Path = EQUIVALENT) -> dict[tuple[str, str, str], str]:
    """Why a mutant is no fault, by what it is. The file says how it is written."""
    entries = tomllib.loads(path.read_text()).get("mutant", [])
    return {(e["where"], e["old"], e["new"]): e["why"] for e in entries}


def _readable(mangled: str) -> str:
    """``xǁFleeceǁread`` is Fleece.read, ``x_arm`` is arm."""
    if mangled.startswith("x\u01c1"):
        return mangled[2:].replace("\u01c1", ".")
    return mangled.removeprefix("x_")


def _without_name(lines: list[str], base: str) -> list[str]:
    return [re.sub(re.escape(base) + r"__mutmut_\w+", "it", line) for line in lines]


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    changed = list(difflib.ndiff(before, after))
    old = " ".join(line[2:].strip() for line in changed if line.startswith("- "))
    new = " ".join(line[2:].strip() for line in changed if line.startswith("+ "))
    return old, new
