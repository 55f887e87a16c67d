"""Asks folders that are not ours, and may hang: a server must start whatever they do.

What has not answered in ``ANSWER_S`` is given up, and its folder is not asked again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

ANSWER_S = 5.0

Result = TypeVar("Result")


class Elsewhere:
    """Folders, and which of them do not answer."""

    def __init__(self) -> None:
        self._hung: set[str] = set()

    def ask(
        self, path: str, call: Callable[[], Result], drop: Callable[[Result], object]
    ) -> Result:
        """The result of a call that is about this file. Raises OSError: ETIMEDOUT after
        ``ANSWER_S``; what comes later is dropped. Blocks."""
        folder = os.path.dirname(path)
        if folder not in self._hung:
            answer: Future[Result] = Future()
            # A daemon, since a hung call must not keep the process from ending.
            threading.Thread(
                target=_answer, args=(answer, call, drop), name=f"ask {folder}", daemon=True
            ).start()
            wait((answer,), timeout=ANSWER_S)
            if not answer.cancel():
                return answer.result()
            self._hung.add(folder)
        raise OSError(errno.ETIMEDOUT, f"its folder has not answered in {ANSWER_S:g} s", path)


def _answer(
    answer: Future[Result], call: Callable[[], Result], drop: Callable[[Result], object]
) -> None:
    try:
        result = call()
    except BaseException as error:
        if answer.set_running_or_notify_cancel():
            answer.set_exception(error)
        return
    if answer.set_running_or_notify_cancel():
        answer.set_result(result)
    else:
        drop(result)
