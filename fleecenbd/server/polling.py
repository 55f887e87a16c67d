"""Adaptive polling: a look for a client's next request before the loop goes to sleep.

A guest with one request in flight sends the next one a few microseconds after it has its reply.
To sleep in between, and to be woken by it, takes several times as long as the request: two thirds
of the time of a 4 KiB read. So after a pass the socket is looked at again and again, for
``poll_s`` at most, as QEMU's iothreads do (their ``poll-max-ns``).

It is given up as soon as it does not pay or could be in somebody's way:
    * a look that found nothing is followed by 1, 2, 4 ... ``SKIPPED_MAX`` passes without one,
      and so is one that found something at once: the loop would not have slept, and a client
      with many requests in flight is served better by the many that come meanwhile;
    * whoever finds that another client was served since its own last pass does not look: then
      the loop has work, and nothing is to be gained. A client that was quiet waits for the one
      look that is under way, no longer;
    * each round gives the processor to whoever else may run there (sched_yield);
    * on one processor it would only keep the client from sending: there is none.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

SKIPPED_MAX = 64
"""Passes without a look, at most, after looks that found nothing."""
AT_ONCE_S = 8e-6
"""Seconds: less than it takes to fall asleep and to be woken."""
RECEIVE_LENGTH = 256 << 10
"""Bytes taken at once, as by uvloop's own transport."""


class Turns:
    """Passes that were served, over all clients."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Poll:
    """The looks at one client's socket."""

    __slots__ = (
        "_clock",
        "_my_turn",
        "_next_skip",
        "_poll_s",
        "_skip",
        "_sock",
        "_turns",
        "_yield",
    )

    def __init__(
        self,
        sock: socket.socket,
        turns: Turns,
        poll_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        """``sock`` does not block; what is received here, its transport does not see."""
        self._sock = sock
        self._turns = turns
        self._poll_s = poll_s
        self._clock = clock
        self._yield = give_way
        self._my_turn = -1
        self._skip = 0
        self._next_skip = 1

    def pass_ended(self, requests: int) -> bool:
        """A pass of so many requests was served. True: ``look`` before the loop sleeps."""
        turns = self._turns
        alone = turns.count == self._my_turn
        turns.count = self._my_turn = turns.count + 1
        if not alone or not requests:
            return False
        if self._skip:
            self._skip -= 1
            return False
        return True

    def look(self) -> bytes:
        """What the client has sent, as soon as it has; b"" where it is not worth waiting for.

        Also b"" at the end of the connection and where it is broken: the transport finds that.
        """
        if self._turns.count != self._my_turn:
            return b""
        receive = self._sock.recv
        clock = self._clock
        began = clock()
        end = began + self._poll_s
        while True:
            try:
                data = receive(RECEIVE_LENGTH)
            except BlockingIOError:
                if clock() < end:
                    self._yield()
                    continue
                self._be_rarer()
                return b""
            except OSError:
                return b""
            if clock() - began < AT_ONCE_S:
                self._be_rarer()
            else:
                self._next_skip = 1
            return data

    def _be_rarer(self) -> None:
        self._skip = self._next_skip
        self._next_skip = min(2 * self._next_skip, SKIPPED_MAX)


def polling_pays() -> bool:
    """Whether a client can run while its server looks: there is another processor."""
    return len(os.sched_getaffinity(0)) > 1
