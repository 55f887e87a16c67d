"""Bugs planted into the copying, each of which the simulation must catch (hunt_pull.py)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class PullBug:
    """A text that a module of ``fleecenbd.client`` has exactly once, and what replaces it."""

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]


def _bug(name: str, module: str, *edits: tuple[str, str]) -> PullBug:
    return PullBug(name, module, edits)


_ADD = "        await self._journal.add(joined(data), joined(zeroes), digests)\n"
_RELEASE = "        self._releasing.add((*data, *zeroes))\n"
_FLUSH = """\
        try:
            await self._target.flush()
        except TargetLost as error:
            self._take_back(batch, error)
            return
        self._lost_in_a_row = 0
"""

PULL_BUGS = (
    _bug(
        "a TRIM is sent before the flush", "copy_loop", (_FLUSH, ""), (_RELEASE, _RELEASE + _FLUSH)
    ),
    _bug(
        "the journal is written before the flush", "copy_loop", (_FLUSH, ""), (_ADD, _ADD + _FLUSH)
    ),
    _bug(
        "a TRIM is sent before the journal is written",
        "copy_loop",
        (_RELEASE, ""),
        (_ADD, _RELEASE + "        await asyncio.sleep(0)\n" + _ADD),
    ),
    _bug(
        "what is written during a flush counts as flushed",
        "copy_loop",
        ("        batch, self._written = self._written, []\n", "        batch = self._written\n"),
        (
            "        self._lost_in_a_row = 0\n        data",
            "        self._lost_in_a_row = 0\n        self._written = []\n        data",
        ),
    ),
    _bug(
        "a lost target is taken for a flushed one",
        "copy_loop",
        ("            self._take_back(batch, error)\n            return\n", "            pass\n"),
    ),
    _bug(
        "after a loss the batch is copied again, and not what was written meanwhile",
        "copy_loop",
        ("sorted(batch + self._written, key", "sorted(batch, key"),
        ("        self._written, self._written_length, self._flushing_length = [], 0, 0\n", ""),
    ),
    _bug(
        "a block that was being written when the target was lost is not written again",
        "copy_loop",
        ("            if epoch == self._epoch:\n                break\n", "            break\n"),
    ),
    _bug(
        "what is to be copied again is forgotten",
        "copy_loop",
        ("        self._again.extendleft(written.item for written in reversed(lost))\n", ""),
    ),
    _bug(
        "a part of a cluster is released",
        "releasing",
        ("        if per > 1:\n", "        if False:\n"),
    ),
    _bug(
        "a cluster is released when its first block is durable",
        "releasing",
        ("self._settled[at : at + per].all() and", "self._settled[at] and"),
    ),
    _bug(
        "what an earlier pull has released is read again",
        "plan",
        ("first = bits.find(0, self._block, blocks)", "first = self._block"),
        ("            if bits[first]:\n", "            if False:\n"),
    ),
    _bug(
        "zeroes are left out where the target holds something",
        "block_io",
        (
            "        if isinstance(piece, int):\n            if not self._target.is_zero:",
            "        if isinstance(piece, int):\n            if False:",
        ),
    ),
    _bug(
        "a digest leaves out the zeroes of its block",
        "copy_loop",
        (
            "[piece for _, piece in parts]",
            "[piece for _, piece in parts if piece.__class__ is not int]",
        ),
    ),
    _bug(
        "nobody is woken when a block is written",
        "copy_loop",
        (
            "        self._busy_length -= item.data_length\n        self._ring()\n",
            "        self._busy_length -= item.data_length\n",
        ),
    ),
    _bug(
        "a spoilt line of the journal is believed",
        "journal",
        ("!= zlib.crc32(body)", "== -1"),
    ),
    _bug(
        "a journal made anew forgets its zeroes",
        "journal",
        ("_runs(held & durable), _runs(durable & ~held)", "_runs(held & durable), []"),
    ),
)


@contextmanager
def planted(bug: PullBug) -> Iterator[None]:
    """The classes of the module have the bug's methods meanwhile."""
    name = f"fleecenbd.client.{bug.module}"
    real = importlib.import_module(name)
    assert real.__file__ is not None
    with open(real.__file__) as file:
        source = file.read()
    for old, new in bug.edits:
        assert source.count(old) == 1, f"{bug.name}: {source.count(old)} times, not once:\n{old}"
        source = source.replace(old, new)
    mutant = ModuleType(name)
    sys.modules[name] = mutant  # where dataclasses look for annotations
    try:
        exec(compile(source, f"{name} with a bug", "exec", dont_inherit=True), mutant.__dict__)
    finally:
        sys.modules[name] = real
    saved: list[tuple[Any, str, Any]] = []
    for key, thing in vars(mutant).items():
        if getattr(thing, "__module__", None) != name:
            continue
        owner = getattr(real, key)
        if isinstance(thing, type):
            for attribute, value in vars(thing).items():
                if callable(value) or isinstance(value, property | classmethod):
                    saved.append((owner, attribute, vars(owner)[attribute]))
                    setattr(owner, attribute, value)
    try:
        yield
    finally:
        for owner, attribute, value in reversed(saved):
            setattr(owner, attribute, value)
