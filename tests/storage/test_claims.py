"""Claims: who waits for whom, and in which order they go on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fleecenbd.storage.claims import Claims, Range

WAIT_S = 10.0


class Writer:
    """A thread that claims, stays inside until it is let go, and says where it is."""

    def __init__(self, claims: Claims, whole: Range, *parts: Range) -> None:
        self.waits = threading.Event()
        self.inside = threading.Event()
        self.go = threading.Event()
        self._call: Callable[[], None] = lambda: self._write(claims, whole, parts)
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _write(self, claims: Claims, whole: Range, parts: tuple[Range, ...]) -> None:
        with claims.of(whole, parts):
            self.inside.set()
            assert self.go.wait(WAIT_S)

    def end(self) -> None:
        self.go.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


class Watched(Claims):
    """Says when a claim has begun to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def _must_wait(self, claim: object) -> bool:
        waits = super()._must_wait(claim)  # type: ignore[arg-type]
        if waits:
            self.waiting.release()
        return waits

    def wait_for_one(self) -> None:
        assert self.waiting.acquire(timeout=WAIT_S)


@pytest.fixture
def claims() -> Watched:
    return Watched()


def test_writes_of_whole_blocks_never_wait_for_each_other(claims: Watched) -> None:
    writers = [Writer(claims, (0, 4096)), Writer(claims, (0, 4096)), Writer(claims, (512, 1024))]
    for writer in writers:
        assert writer.inside.wait(WAIT_S)
        writer.end()


def test_writes_of_parts_of_different_blocks_never_wait_for_each_other(claims: Watched) -> None:
    one = Writer(claims, (0, 1024), (512, 1024))
    other = Writer(claims, (1024, 2048), (1024, 1536))
    assert one.inside.wait(WAIT_S)
    assert other.inside.wait(WAIT_S)
    one.end()
    other.end()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((0, 512), (0, 512)), ((0, 512), (0, 512))),
        (((0, 512), (0, 512)), ((0, 4096),)),
        (((0, 4096),), ((512, 1024), (512, 1024))),
    ],
)
def test_in_a_block_that_is_written_in_part_there_is_one_writer(
    claims: Watched, first: tuple[Range, ...], second: tuple[Range, ...]
) -> None:
    one = Writer(claims, *first)
    assert one.inside.wait(WAIT_S)
    other = Writer(claims, *second)
    claims.wait_for_one()
    assert not other.inside.is_set()
    one.end()
    assert other.inside.wait(WAIT_S)
    other.end()


def test_who_came_first_goes_first(claims: Watched) -> None:
    first = Writer(claims, (0, 4096))
    assert first.inside.wait(WAIT_S)
    part = Writer(claims, (0, 512), (0, 512))
    claims.wait_for_one()
    # It would not have to wait for the first, but the part was here before it.
    late = Writer(claims, (0, 512))
    claims.wait_for_one()
    first.end()
    assert part.inside.wait(WAIT_S)
    assert not late.inside.is_set()
    part.end()
    assert late.inside.wait(WAIT_S)
    late.end()


def test_a_write_that_fails_lets_the_next_one_go_on(claims: Watched) -> None:
    with pytest.raises(OSError, match="torn"), claims.of((0, 512), ((0, 512),)):
        raise OSError("torn")
    with claims.of((0, 512), ((0, 512),)):
        pass
