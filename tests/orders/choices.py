"""The list of choices that makes a run: what is given is replayed, what comes after is recorded.

A run asks ``choose(count)`` wherever the world could go on in more than one way. It is a pure
function of the answers, so a list of them is a run, and the lists in order are all runs.
"""

from __future__ import annotations

from collections.abc import Sequence


class NotReplayable(Exception):
    """A list of choices that does not fit the run: another scenario's, or another engine's."""


class Choices:
    """Answers the choices of one run: first those given, then always the first way."""

    def __init__(self, given: Sequence[int] = (), counts: Sequence[int] = ()) -> None:
        """``counts``, where known, are the numbers of ways that the given choices had."""
        self._given = given
        self._known = counts
        self.taken: list[int] = []
        self.counts: list[int] = []

    @property
    def replaying(self) -> bool:
        """Choices that were given are still to come."""
        return len(self.taken) < len(self._given)

    def choose(self, count: int) -> int:
        """Which of ``count`` ways to go. One way is no choice and is not recorded."""
        if count < 2:
            return 0
        position = len(self.taken)
        index = self._given[position] if position < len(self._given) else 0
        if index >= count or (position < len(self._known) and self._known[position] != count):
            raise NotReplayable(f"choice {position} is {index} and has {count} ways here")
        self.taken.append(index)
        self.counts.append(count)
        return index


def following(taken: Sequence[int], counts: Sequence[int]) -> list[int] | None:
    """The next list of choices, depth first; None after the last one."""
    for position in range(len(taken) - 1, -1, -1):
        if taken[position] + 1 < counts[position]:
            return [*taken[:position], taken[position] + 1]
    return None


def written(choices: Sequence[int]) -> str:
    """A list of choices as one word, runs of one answer abbreviated: ``0*12.3.1``."""
    words = []
    position = 0
    while position < len(choices):
        end = position
        while end < len(choices) and choices[end] == choices[position]:
            end += 1
        words.append(f"{choices[position]}*{end - position}" if end - position > 2 else "")
        if not words[-1]:
            words[-1] = ".".join(map(str, choices[position:end]))
        position = end
    return ".".join(words) or "-"


def parsed(text: str) -> list[int]:
    """What ``written`` wrote. Raises ValueError."""
    choices: list[int] = []
    for word in text.split("."):
        if word in ("", "-"):
            continue
        answer, _, times = word.partition("*")
        choices += [int(answer)] * int(times or 1)
    return choices
