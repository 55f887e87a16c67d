"""The witnesses notice what they are there to notice."""

import mmap
import os
import signal
import threading
from pathlib import Path

import pytest

from tests.wire.conftest import Served
from tests.wire.witness import MIB, Guest, Memory

STOPPED_S = 0.3


def test_memory_that_was_taken_for_a_moment_is_noticed() -> None:
    memory = Memory(os.getpid())
    # Not a bytearray: that may come out of what the allocator has kept from earlier tests.
    with mmap.mmap(-1, 64 * MIB) as taken:
        for _ in range(64):
            taken.write(b"x" * MIB)
    assert memory.grown > 48 * MIB
    assert Memory(os.getpid()).grown < 48 * MIB, "the peak begins anew"


def test_a_server_that_stands_still_is_a_slow_guest(writable: Served) -> None:
    with Guest(writable.path) as guest:
        os.kill(writable.server.pid, signal.SIGSTOP)
        threading.Event().wait(STOPPED_S)  # the stall is what is measured: there is no event
        os.kill(writable.server.pid, signal.SIGCONT)
    assert guest.slowest_s > STOPPED_S / 2


def test_a_guest_that_nobody_serves_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not served"), Guest(tmp_path / "nobody.sock"):
        pass
