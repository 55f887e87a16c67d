"""A guest that writes at random and remembers all of it: any moment of its disk can be told.

One request at a time, so that the disk's content at a moment is that after so many of them. Each
guest has a range of its own; several may share a disk.
"""

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.disks import KIB
from tests.serving import START_TIMEOUT_S, connected

SECTOR = 512
WINDOW = 256 * KIB  # a guest works in one place for a while
WINDOW_WRITES = 20


class RememberingGuest(threading.Thread):
    """Writes, zeroes and discards in [start, end) of an export, until it is told to end."""

    def __init__(
        self, uri: str, first: bytes, *, start: int = 0, end: int | None = None, pause_s: float = 0
    ) -> None:
        super().__init__(name="guest")
        self.start_of_range = start
        self.end_of_range = len(first) if end is None else end
        self.writes: list[tuple[int, bytes]] = []
        self.failure: BaseException | None = None
        self.kinds = {"write": 0, "zero": 0, "discard": 0}
        self._uri = uri
        self._pause_s = pause_s
        self._dice = random.Random(f"guest {start}")
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._model = bytearray(first[start : self.end_of_range])
        self._applied = 0

    def run(self) -> None:
        """The thread. What fails is kept for wait()."""
        try:
            with connected(self._uri) as client:
                while not self._ended.wait(self._pause_s):
                    if len(self.writes) % WINDOW_WRITES == 0:
                        room = max(1, self.end_of_range - self.start_of_range - WINDOW)
                        window = self.start_of_range + self._dice.randrange(0, room, SECTOR)
                        window_end = min(window + WINDOW, self.end_of_range)
                    length = self._dice.choice([512, 1024, 4 * KIB, 10240, 64 * KIB, 100 * KIB])
                    offset = self._dice.randrange(window, window_end, SECTOR)
                    length = min(length, window_end - offset)
                    kind = self._dice.choice(["write", "write", "write", "zero", "discard"])
                    data = bytes(length)
                    if kind == "write":
                        data = self._dice.randbytes(length)
                        client.pwrite(data, offset)
                    elif kind == "zero":
                        client.zero(length, offset)
                    else:
                        client.trim(length, offset)
                        # A discard is a hint: what it has left alone is still there.
                        data = bytes(client.pread(length, offset))
                    with self._changed:
                        self.kinds[kind] += 1
                        self.writes.append((offset, data))
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self.failure = error
                self._changed.notify_all()

    def wait(self, more: int) -> None:
        """Wait until it has written so many times more."""
        with self._changed:
            goal = len(self.writes) + more
            self._changed.wait_for(
                lambda: len(self.writes) >= goal or self.failure is not None, START_TIMEOUT_S
            )
            assert self.failure is None, self.failure
            assert len(self.writes) >= goal, "the guest does not get to write"

    def moment(self, image: bytes, first: int, last: int) -> int | None:
        """After how many writes the disk was what an image says, no fewer than first and no more
        than last; None: never. Moments are asked for in their order."""
        found = image[self.start_of_range : self.end_of_range]
        while self._applied < first:
            self._apply(self._model, self._applied)
            self._applied += 1
        model = bytearray(self._model)
        for count in range(first, last + 1):
            if model == found:
                return count
            if count < last:
                self._apply(model, count)
        return None

    def _apply(self, model: bytearray, index: int) -> None:
        offset, data = self.writes[index]
        offset -= self.start_of_range
        model[offset : offset + len(data)] = data

    def end(self) -> None:
        """Let it end after the write that it is at."""
        self._ended.set()
        self.join()


def granules(extents: Sequence[tuple[int, bytes]], granularity: int) -> set[int]:
    """Those that extents of (offset, data) touch."""
    return {
        granule
        for offset, data in extents
        for granule in range(offset // granularity, -(-(offset + len(data)) // granularity))
    }


class Moment:
    """When a session began, as far as it can be seen from outside, in each guest's count."""

    def __init__(self, guests: Sequence[RememberingGuest]) -> None:
        self._guests = guests
        self._first = [len(guest.writes) for guest in guests]
        self._last: list[int] = []

    def is_over(self) -> None:
        """The session has begun: what guests begin from now on is not in it."""
        for guest in self._guests:
            if guest.is_alive():
                guest.wait(1)  # the write that it was at
        self._last = [len(guest.writes) for guest in self._guests]

    def is_shown_by(self, image: bytes) -> bool:
        """Is an image the disk at that moment?"""
        return all(
            guest.moment(image, first, last) is not None
            for guest, first, last in zip(self._guests, self._first, self._last, strict=True)
        )

    def granules_written_since(self, earlier: "Moment", granularity: int) -> set[int]:
        """Which granules guests wrote to after an earlier moment and before this one was over."""
        return {
            granule
            for guest, first, last in zip(self._guests, earlier._first, self._last, strict=True)
            for granule in granules(guest.writes[first:last], granularity)
        }


@contextmanager
def remembering(*guests: RememberingGuest) -> Iterator[None]:
    """Guests that have begun to write; each ends with the block, and none may have failed."""
    for guest in guests:
        guest.start()
    try:
        for guest in guests:
            guest.wait(10)
        yield
    finally:
        for guest in guests:
            guest.end()
    for guest in guests:
        assert guest.failure is None, guest.failure
        assert all(guest.kinds.values()), guest.kinds
