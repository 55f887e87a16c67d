"""Poll: when a client's next request is looked for, and when that is given up."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from fleecenbd.server.limits import ServerLimits
from fleecenbd.server.polling import AT_ONCE_S, SKIPPED_MAX, Poll, Turns, polling_pays
from tests.nbd import wire
from tests.server.room import SIZE, Client, pattern, room

POLL_S = 100e-6


class Clock:
    """Time that goes on by a microsecond each time somebody gives way."""

    def __init__(self) -> None:
        self.now = 5.0
        self.given_way = 0
        self.comes_at = float("inf")
        """When the client sends."""
        self.comes: Callable[[], object] = lambda: None

    def time(self) -> float:
        return self.now

    def give_way(self) -> None:
        self.given_way += 1
        self.now += 1e-6
        if self.now >= self.comes_at:
            self.comes_at = float("inf")
            self.comes()


class Line:
    """A poll over one end of a socket pair."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.clock = Clock()
        self.turns = Turns()
        self.poll = self.another()

    def another(self) -> Poll:
        return Poll(
            self.ours,
            self.turns,
            POLL_S,
            clock=self.clock.time,
            give_way=self.clock.give_way,
        )

    def ready(self) -> None:
        """As many passes as it takes to a look."""
        while not self.poll.pass_ended(1):
            pass

    def look(self, *, next_after_s: float) -> bytes:
        """A look, with the client's next request so many seconds later."""
        self.clock.comes_at = self.clock.now + next_after_s
        self.clock.comes = lambda: self.theirs.send(b"next")
        return self.poll.look()

    def passes_until_ready(self) -> int:
        """Passes without a look before the one that a look follows."""
        count = 0
        while not self.poll.pass_ended(1):
            count += 1
        return count


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.ours.close()
    line.theirs.close()


def test_a_pass_is_followed_by_a_look(line: Line) -> None:
    assert not line.poll.pass_ended(1), "nobody knows yet whether it is alone"
    assert [line.poll.pass_ended(count) for count in (1, 16, 1)] == [True] * 3


def test_a_pass_without_a_request_is_no_reason_to_look(line: Line) -> None:
    line.ready()
    assert not line.poll.pass_ended(0)


def test_what_has_come_is_returned_at_once(line: Line) -> None:
    line.ready()
    line.theirs.sendall(b"next")
    assert line.poll.look() == b"next"
    assert line.clock.given_way == 0


def test_a_look_ends_when_its_time_is_up_and_gives_way_meanwhile(line: Line) -> None:
    line.ready()
    began = line.clock.now
    assert line.poll.look() == b""
    assert line.clock.now - began == pytest.approx(POLL_S, abs=2e-6)
    assert line.clock.given_way >= 99


def test_looks_that_find_nothing_become_rare(line: Line) -> None:
    skipped = []
    for _ in range(9):
        line.ready()
        line.poll.look()
        skipped.append(line.passes_until_ready())
    assert skipped == [1, 2, 4, 8, 16, 32, SKIPPED_MAX, SKIPPED_MAX, SKIPPED_MAX]


def test_what_comes_when_the_loop_would_have_slept_makes_looks_frequent_again(line: Line) -> None:
    for _ in range(5):
        line.ready()
        line.poll.look()
    line.ready()
    assert line.look(next_after_s=4 * AT_ONCE_S) == b"next"
    assert line.passes_until_ready() == 0
    line.poll.look()
    assert line.passes_until_ready() == 1


def test_what_comes_at_once_makes_looks_rare(line: Line) -> None:
    skipped = []
    for _ in range(4):
        line.ready()
        assert line.look(next_after_s=AT_ONCE_S / 2) == b"next"
        skipped.append(line.passes_until_ready())
    assert skipped == [1, 2, 4, 8]


def test_who_is_not_alone_does_not_look(line: Line) -> None:
    other = line.another()
    line.ready()
    for _ in range(9):
        assert not other.pass_ended(1)
        assert not line.poll.pass_ended(1)


def test_a_client_served_before_the_look_has_begun_prevents_it(line: Line) -> None:
    other = line.another()
    line.ready()
    other.pass_ended(1)
    line.theirs.sendall(b"next")
    assert line.poll.look() == b""
    assert line.ours.recv(16) == b"next"


def test_the_end_of_the_connection_is_left_to_the_transport(line: Line) -> None:
    line.ready()
    line.theirs.close()
    assert line.poll.look() == b""
    assert line.ours.recv(16) == b""


def test_a_socket_that_was_closed_ends_the_look(line: Line) -> None:
    line.ready()
    line.ours.close()
    assert line.poll.look() == b""


def test_on_one_processor_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert not polling_pays()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert polling_pays()


# -- on a server


class Looks:
    """A poll; the client's next request comes right before the first look, and not earlier."""

    def __init__(self, poll: Poll, client: Client, request: bytes) -> None:
        self._poll = poll
        self._client = client
        self._request = request
        self.pass_ended = poll.pass_ended
        self.found: list[bytes] = []

    def look(self) -> bytes:
        if not self.found:
            self._client.socket.sendall(self._request)
        self.found.append(self._poll.look())
        return self.found[-1]


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleecenbd.server.server.polling_pays", lambda: True)


async def test_a_request_that_a_look_finds_is_served_like_any_other(two_processors: None) -> None:
    async with room() as served:
        client = await served.client("vda")
        connection = served.connection("vda")
        assert connection.poll is not None
        _, extra = client.prepare(wire.READ, 1024, 512)
        looks = connection.poll = Looks(connection.poll, client, extra)  # type: ignore[assignment]
        assert await client.read(512, 512) == pattern(SIZE)[512:1024]
        _, last = client.prepare(wire.READ, 512, 512)
        await client.send(last)
        data = [(await client.reply()).data for _ in range(2)]
        assert data == [pattern(SIZE)[512:1024], pattern(SIZE)[1024:1536]]
        assert looks.found[0] == extra


async def test_polling_can_be_left_out(two_processors: None) -> None:
    async with room(limits=ServerLimits(poll_s=0)) as served:
        await served.client("vda")
        assert served.connection("vda").poll is None
