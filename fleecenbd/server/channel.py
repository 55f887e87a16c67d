"""The transport of one client, with back-pressure both ways, and its end.

    send      replies of a pass, which cost nothing any more; only while not ``send_paused``
    answer    the reply of a request that was charged: sent, or kept while ``send_paused``
    left      a call to be made once the kernel has all of a reply: READ_ONCE
    close     once everything has left, or ``linger_s`` later, whatever is left by then

A charge is given back when its reply has left. A reply in a transport that is paused has not:
else a client that never reads would hold a long reply there that nobody counts.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable

from fleecenbd.nbd.replies import Buffer


class Channel:
    """What a connection sends through; and whether it is read."""

    def __init__(
        self, transport: asyncio.Transport, *, send_high_water: int, linger_s: float
    ) -> None:
        """``send_high_water``: bytes that the transport holds before it pauses."""
        self.send_paused = False
        """The client does not take what it is sent: nothing more may be sent."""
        self.read_paused = False
        """The client asked for more than it may have at once: it is not read."""
        self.give: Callable[[int], None] = lambda cost: None
        """Takes back the bytes that a reply was charged."""
        self._transport = transport
        self._linger_s = linger_s
        self._linger_timer: asyncio.TimerHandle | None = None
        self._discarded = False
        self._unsent: deque[tuple[list[Buffer], int, Callable[[], None] | None]] = deque()
        self._is_exact = False
        self._leaving_calls: list[Callable[[], None]] = []
        """To be made when these replies have left."""
        self._leaving = 0
        """Bytes charged for replies in a transport that is paused."""
        transport.set_write_buffer_limits(high=send_high_water)

    # -- sending ---------------------------------------------------------------------------

    def send(self, buffers: list[Buffer]) -> None:
        """Hand buffers, at least one, to the transport."""
        if len(buffers) == 1:
            self._transport.write(buffers[0])
        else:
            self._transport.writelines(buffers)

    def answer(
        self, reply: list[Buffer], cost: int, left: Callable[[], None] | None = None
    ) -> None:
        """Send a reply, now or when the transport takes more; ``give(cost)`` when it has left.

        ``left``: called once the kernel's socket has taken the whole of the reply, and never if
        it did not. From the first such reply on the transport tells of every byte that it keeps:
        it pauses whenever it holds any, and resumes when it holds none.
        """
        if left is not None and not self._is_exact:
            self._is_exact = True
            self._transport.set_write_buffer_limits(high=0)
        if self.send_paused:
            self._unsent.append((reply, cost, left))
            return
        self.send(reply)
        if left is not None and not self.send_paused:
            # Not every asyncio (3.12 to 3.12.8, 3.13.0, 3.13.1) looks at its limits in writelines.
            self._transport.set_write_buffer_limits(high=0)
        if self.send_paused:
            self._leaving += cost
            if left is not None:
                self._leaving_calls.append(left)
        else:
            self.give(cost)
            # A write that failed has left nothing in the transport either.
            if left is not None and not self._transport.is_closing():
                left()

    def resume_sending(self) -> None:
        """The transport takes more."""
        self.send_paused = False
        leaving, self._leaving = self._leaving, 0
        self.give(leaving)
        calls, self._leaving_calls = self._leaving_calls, []
        for left in calls:
            left()
        while self._unsent and not self.send_paused:
            self.answer(*self._unsent.popleft())

    @property
    def sending_bytes(self) -> int:
        """Bytes that the transport holds, because the client did not take them yet."""
        return self._transport.get_write_buffer_size()

    # -- reading ---------------------------------------------------------------------------

    def pause_reading(self) -> None:
        if not self.read_paused and not self._transport.is_closing():
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self.read_paused and not self._transport.is_closing():
            self.read_paused = False
            self._transport.resume_reading()

    def peer_has_gone(self) -> bool:
        """Has the client closed its end? While it is not read, the transport does not tell."""
        if self._transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    # -- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """Close when everything has left: now, or at a call after ``resume_sending``.

        Not for ever: whoever does not take the last replies is cut off.
        """
        if self._discarded:
            return
        if self._linger_timer is None:
            loop = asyncio.get_running_loop()
            self._linger_timer = loop.call_later(self._linger_s, self._transport.abort)
        if not self._unsent:
            self._transport.close()

    def discard(self) -> None:
        """Nobody takes anything any more: give back what was charged."""
        self._discarded = True
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        leaving, self._leaving = self._leaving, 0
        self.give(leaving + sum(cost for _, cost, _ in self._unsent))
        self._unsent.clear()
        self._leaving_calls.clear()
