"""Everything that a client could ask too much of, with its limit; and the budgets they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Counts, bytes and seconds; see docs/protocol.md for those of the wire."""

    clients_max: int = 100
    """Connections; past it the oldest that is still in its handshake is dropped for a new one."""
    guest_places: int = 10
    """Of these, places that fleecing exports cannot take."""
    handshake_timeout_s: float = 10.0
    requests_max: int = 64
    """Requests of one client that wait for something."""
    bytes_max: int = 16 << 20
    """Payload bytes of one client's requests that waited, until their replies have left; one
    request is always let in, however long."""
    bytes_max_all: int = 256 << 20
    """The same over all clients of guest exports, and again over all of fleecing exports. Asks
    nothing of a client that has less than ``bytes_sure``: others cannot stop it, by not reading
    what they asked for or by a disk that hangs."""
    bytes_sure: int = 1 << 20
    """Bytes of requests in flight that every client may have."""
    status_bytes: int = 512 << 10
    """What a BLOCK_STATUS counts as: its reply may become as long."""
    write_bytes_min: int = 64 << 10
    """What a WRITE counts as in a pass, at least: it may have to copy a cluster first."""
    pass_bytes_max: int = 1 << 20
    """Payload bytes served to one guest before others get their turn,"""
    backup_pass_bytes_max: int = 256 << 10
    """and to one client of a fleecing export: a guest's request waits that long for each."""
    pass_requests_max: int = 1024
    """Requests of one client served before others get their turn, however small."""
    unix_send_buffer: int = 512 << 10
    """Bytes asked for as a Unix socket's send buffer (the kernel doubles it)."""
    send_high_water: int = 256 << 10
    """Bytes handed to the socket's transport before the connection pauses."""
    poll_s: float = 100e-6
    """Seconds that a client's next request is looked for before the loop sleeps; 0 for never."""
    linger_s: float = 10.0
    """Seconds that the last replies to a client have to leave, before it is dropped."""
    keepalive_idle_s: int = 60
    keepalive_interval_s: int = 15
    keepalive_count: int = 4


class Budget:
    """Bytes that connections of one kind share; who finds it empty waits for a call."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def taken(self) -> int:
        """Bytes taken now."""
        return self._bytes

    def has_room(self) -> bool:
        """May a request be let in? (The last one may overdraw, by its own length.)"""
        return self._bytes < self._bytes_max

    def take(self, length: int) -> None:
        self._bytes += length

    def give(self, length: int) -> None:
        """Give back; the longest-waiting are called while there is room."""
        self._bytes -= length
        while self._waiting and self.has_room():
            callback = next(iter(self._waiting))
            del self._waiting[callback]
            callback()

    def call_when_room(self, callback: Callable[[], None]) -> None:
        """Call once, when there is room again. The same callback waits once."""
        self._waiting[callback] = None

    def forget(self, callback: Callable[[], None]) -> None:
        """The callback's owner has gone."""
        self._waiting.pop(callback, None)
