"""fdatasync of one descriptor: one at a time, no more than needed, and never a lie.

Once it has failed, it fails for good: the kernel reports a lost write once per open file, then
forgets it, and the next fdatasync would say that all is well. So would one that is in flight
beside the one that fails: there is one at a time, and those who ask meanwhile share the next.

A guest flushes more often than it writes. ``_changed`` is set when a change has ended (in whatever
thread), and cleared right before an fdatasync: while it is clear, and no fdatasync is on its way
or has failed, everything is durable, and nothing need be waited for.
"""

from __future__ import annotations

import os
import threading


class Sync:
    """What of a file is known to be durable."""

    def __init__(self, name: str) -> None:
        """``name``: the file's, for messages."""
        self._name = name
        self._lock = threading.Lock()
        # Under the lock (the count may be read without it):
        self._count = 0  # calls of fdatasync that have begun
        self._error: tuple[int | None, str | None] | None = None
        # Single stores, without the lock; ``is_done`` looks in the order in which ``run`` writes.
        # Set at first: an earlier process may have written what its guest has yet to flush.
        self._changed = True
        self._running = False

    def changed(self) -> None:
        """A change of the file has ended, well or not. For any thread."""
        self._changed = True

    def is_done(self) -> bool:
        """Whether every change that has ended is durable."""
        return not self._changed and not self._running and self._error is None

    def run(self, descriptor: int) -> None:
        """fdatasync, for a thread that may wait. Raises OSError."""
        count = self._count
        with self._lock:
            if self._error is None:
                if self._count > count:
                    return  # one that began after this was asked for has ended well
                self._count += 1
                self._running = True
                self._changed = False
                try:
                    os.fdatasync(descriptor)
                    return
                except OSError as error:
                    self._error = (error.errno, error.strerror)
                finally:
                    self._running = False
            number, text = self._error
        raise OSError(
            number,
            f"{text}: data was lost on its way to the disk; check the disk, and the image, "
            "before they are used again",
            self._name,
        )
