"""Asks folders that are not ours, and may hang: a server must start whatever they do.

What has not answered in ``ANSWER_S`` is given up, and its folder is not asked again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
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
            answers: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()
            lock = threading.Lock()
            is_given_up = False

            def run() -> None:
                result, error = None, None
                try:
                    result = call()
                except BaseException as caught:
                    error = caught
                with lock:
                    if not is_given_up:
                        answers.put((result, error))
                        return
                if result is not None:
                    drop(result)

            # A daemon, since a hung call must not keep the process from ending.
            threading.Thread(target=run, name=f"ask {folder}", daemon=True).start()
            try:
                result, error = answers.get(timeout=ANSWER_S)
            except Empty:
                with lock:
                    is_given_up = answers.empty()
                if is_given_up:
                    self._hung.add(folder)
                else:
                    result, error = answers.get()
            if not is_given_up:
                if error is not None:
                    raise error
                return result  # type: ignore[return-value]
        raise OSError(errno.ETIMEDOUT, f"its folder has not answered in {ANSWER_S:g} s", path)
