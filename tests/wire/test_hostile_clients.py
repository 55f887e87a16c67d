"""Clients that mean no good, at a server that serves a guest all the while.

The server is one for the whole module, in a process of its own, and so is the limit of what all
of it together may cost: 32 MiB above the start, at any moment.
"""

from __future__ import annotations

import itertools
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from struct import pack

import pytest

from tests.nbd import wire
from tests.wire.client import GO, Client, Raw
from tests.wire.conftest import Served
from tests.wire.witness import MIB, Guest, Memory

MEMORY_MAX = 32 * MIB
SLOWEST_S = 3.0
"""A guest's slowest request: far above what is usual, for machines that are busy besides."""
HALF_OPEN = 200
IN_A_ROW = 10_000
HANDSHAKE_TIMEOUT_S = 10.0
STUCK_S = 0.3
"""Seconds without room in a socket, after which its reader has stopped."""

HELLO = wire.client_flags()
GO_GUEST = wire.option(GO, wire.info_data("vm"))
BEGINNINGS = (
    b"",
    HELLO[:3],
    HELLO,
    HELLO + b"IHAVE",
    HELLO + GO_GUEST[:-1],
    HELLO + b"IHAVEOPT" + pack(">II", 6, 64 << 10) + bytes(1000),
)
"""What half-open connections have said."""


@dataclass(frozen=True)
class House:
    path: Path
    memory: Memory

    def within_limits(self, guest: Guest) -> None:
        """The guest was served all the while, and the server is as small as it may be."""
        guest.finish()
        print(
            f"\n{len(guest.latencies_s)} requests of the guest, slowest "
            f"{guest.slowest_s * 1000:.0f} ms; memory + {self.memory.grown / MIB:.1f} MiB at most, "
            f"+ {self.memory.grown_now / MIB:.1f} MiB now"
        )
        assert guest.slowest_s < SLOWEST_S
        assert self.memory.grown <= MEMORY_MAX


@pytest.fixture(scope="module")
def house(writable: Served) -> House:
    """The server, after a guest and a backup have been there: the memory that they took stays."""
    for mode in (wire.SIMPLE, wire.EXTENDED):
        with Client(writable.path, "vm", mode) as guest:
            guest.ask(wire.WRITE, 16 * MIB, MIB, payload=bytes(range(256)) * 4096)
            guest.ask(wire.FLUSH)
        with Client(writable.path, "vm@n", mode) as backup:
            backup.ask(wire.READ, 0, MIB)
    return House(writable.path, Memory(writable.server.pid))


@pytest.fixture
def guest(house: House) -> Iterator[Guest]:
    with Guest(house.path) as guest:
        yield guest


def _send_what_is_taken(sock: socket.socket, data: bytes) -> int:
    """Send until the other end has stopped reading, or has closed; the number of bytes."""
    sock.setblocking(False)
    sent = 0
    view = memoryview(data)
    while sent < len(data):
        _, writable, _ = select.select([], [sock], [], STUCK_S)
        if not writable:
            break
        try:
            sent += sock.send(view[sent : sent + (1 << 20)])
        except (BrokenPipeError, ConnectionResetError):
            break
    sock.setblocking(True)
    return sent


def test_an_option_of_1_gib_is_not_waited_for(house: House, guest: Guest) -> None:
    for number in (1, 3, 7, 10, 99):
        with Raw(house.path) as client:
            client.send(HELLO + b"IHAVEOPT" + pack(">II", number, 1 << 30))
            assert client.until_closed() == b""
            assert _send_what_is_taken(client.socket, bytes(1 << 20)) == 0
    house.within_limits(guest)


def test_options_that_are_never_finished_cost_little_each(house: House, guest: Guest) -> None:
    with ExitStack() as stack:
        for _ in range(90):
            client = stack.enter_context(Raw(house.path))
            client.send(HELLO + b"IHAVEOPT" + pack(">II", 6, 64 << 10) + bytes((64 << 10) - 1))
        house.within_limits(guest)


@pytest.mark.parametrize("beginning", BEGINNINGS, ids=range(len(BEGINNINGS)))
def test_while_200_half_open_connections_are_held_a_guest_reconnects_and_is_served(
    house: House, beginning: bytes
) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(Raw(house.path)) for _ in range(HALF_OPEN)]
        for client in held:
            try:
                client.send(beginning)
            except BrokenPipeError:
                continue  # its place was needed for a later one
        for _ in range(20):
            begin = time.monotonic()
            with Client(house.path, "vm", wire.STRUCTURED) as guest:
                assert guest.ask(wire.READ, 16 * MIB, 4096).error == 0
            assert time.monotonic() - begin < SLOWEST_S
        with Guest(house.path) as served:
            pass
        house.within_limits(served)
        # They were held by this end, and the server has let the oldest go.
        readable, _, _ = select.select([client.socket for client in held], [], [], 0)
        assert len(readable) >= HALF_OPEN - 100


def test_whoever_takes_back_each_place_that_is_lost_does_not_keep_a_guest_out(
    house: House,
) -> None:
    stop, every_place_taken = threading.Event(), threading.Event()
    opened = 0

    def reopen() -> None:
        nonlocal opened
        held: list[Raw] = []
        while not stop.is_set():
            held.append(Raw(house.path))
            opened += 1
            if len(held) > HALF_OPEN:
                every_place_taken.set()
                held.pop(0).close()
        for client in held:
            client.close()

    attacker = threading.Thread(target=reopen)
    attacker.start()
    try:
        assert every_place_taken.wait(30)
        for _ in range(20):
            begin = time.monotonic()
            with Client(house.path, "vm", wire.STRUCTURED) as guest:
                assert guest.ask(wire.READ, 16 * MIB, 4096).error == 0
            assert time.monotonic() - begin < SLOWEST_S
        with Guest(house.path) as served:
            pass
    finally:
        stop.set()
        attacker.join()
    house.within_limits(served)
    print(f"{opened} connections were opened meanwhile")
    assert opened > HALF_OPEN + 1, "nothing was taken back"


NEVER_READ = {
    "reads": (wire.READ, 0, MIB, 0),
    "long reads": (wire.READ, 0, 8 * MIB, 0),
    "status": (wire.BLOCK_STATUS, 0, 64 * MIB, 0),
    "flushes": (wire.FLUSH, 0, 0, 0),
    "errors with a text": (wire.READ, 1 << 50, 1, 0),
    "trims": (wire.TRIM, 1, 1, 0),
}


@pytest.mark.parametrize("export", ["vm", "vm@n"])
@pytest.mark.parametrize("kind", NEVER_READ)
def test_a_client_that_never_reads_its_replies_is_not_read_either(
    house: House, kind: str, export: str
) -> None:
    command, offset, length, flags = NEVER_READ[kind]
    contexts = ("base:allocation",) if command == wire.BLOCK_STATUS else ()
    mode = wire.STRUCTURED if contexts or length <= 1 else wire.SIMPLE
    request = wire.request(command, 1, offset, length, flags=flags)
    asked = request * ((16 << 20) // len(request))
    with Client(house.path, export, mode, contexts=contexts) as client:
        taken = _send_what_is_taken(client.socket, asked)
        assert taken < len(asked), "all of it was read"
        if export == "vm":
            # It is the guest itself: nobody else is to be served in its place.
            assert house.memory.grown <= MEMORY_MAX
        else:
            with Guest(house.path) as guest:
                pass
            house.within_limits(guest)


@pytest.mark.parametrize("mode", [wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED])
def test_garbage_after_the_handshake_ends_that_connection_only(
    house: House, guest: Guest, mode: str
) -> None:
    for seed in range(100):
        dice = random.Random(seed)
        with Client(house.path, "vm@n", mode) as client:
            client.send(b"\xff" + dice.randbytes(dice.randint(32, 5000)))
            assert client.until_closed() == b""
    house.within_limits(guest)


@pytest.mark.parametrize("mode", [wire.SIMPLE, wire.EXTENDED])
def test_a_payload_that_a_read_only_disk_would_refuse_is_not_kept(
    read_only: Served, mode: str
) -> None:
    with Client(read_only.path, "vm", mode) as client:
        memory = Memory(read_only.server.pid)
        header = wire.request(wire.WRITE, 1, 0, 64 * MIB, extended=client.extended)
        client.asked(wire.WRITE, 1, 0, 64 * MIB, 0)
        for _ in range(64):
            client.send(header + bytes(MIB))
            header = b""
        assert client.reply().error == 1
        assert memory.grown < 8 * MIB


@pytest.mark.parametrize("mode", [wire.SIMPLE, wire.EXTENDED])
def test_payloads_that_are_never_finished_and_would_be_refused_are_not_kept(
    house: House, guest: Guest, mode: str
) -> None:
    extended = mode == wire.EXTENDED
    kinds = (wire.WRITE, wire.READ, wire.BLOCK_STATUS) if extended else (wire.WRITE,)
    with ExitStack() as stack:
        for _, kind in zip(range(6), itertools.cycle(kinds), strict=False):
            client = stack.enter_context(Client(house.path, "vm@n", mode))
            length = 64 * MIB
            flags = wire.PAYLOAD_LEN if extended else 0
            header = wire.request(kind, 1, 0, length, flags=flags, extended=extended)
            client.send(header + bytes(48 * MIB))
        house.within_limits(guest)


class Trickle:
    """Sends bytes, one a second, in a thread; how long until it was cut off, or had sent them."""

    def __init__(self, client: Raw, data: bytes) -> None:
        self.client = client
        self.cut_off_after_s: float | None = None
        self._data = data
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for position in range(len(self._data)):
            try:
                self.client.send(self._data[position : position + 1])
            except (BrokenPipeError, ConnectionResetError):
                return
            readable, _, _ = select.select([self.client.socket], [], [], 1.0)
            if self._stop.is_set():
                return
            if readable and not self.client.socket.recv(1, socket.MSG_PEEK):
                self.cut_off_after_s = time.monotonic() - self._begin
                return

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _come_and_go(path: Path, dice: random.Random, half_open: list[socket.socket]) -> None:
    """One connection of ten thousand."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    kind = dice.randrange(4)
    if kind == 0:
        half_open.append(sock)
        sock.send(dice.choice(BEGINNINGS) or b"\0")
        if len(half_open) > 50:
            half_open.pop(0).close()
        return
    said = HELLO + wire.option(8) + wire.option(GO, wire.info_data("vm@n"))
    said += wire.request(wire.READ, 1, 0, 4096) * 3
    if kind == 1:
        said = dice.randbytes(dice.randint(1, 200))
    elif kind == 2:
        said = said[: dice.randint(0, len(said))]
    try:
        sock.send(said)
        if dice.randrange(2):
            sock.recv(dice.randint(1, 300))
    except (BrokenPipeError, ConnectionResetError):
        pass
    sock.close()


def test_10000_connections_in_a_row_and_clients_that_send_a_byte_a_second(
    house: House, guest: Guest
) -> None:
    begin = time.monotonic()
    handshake = Trickle(Raw(house.path), HELLO + GO_GUEST)
    with Client(house.path, "vm@n", wire.SIMPLE) as backup:
        backup.asked(wire.READ, 1, MIB, 512, 0)
        slow = Trickle(backup, wire.request(wire.READ, 1, MIB, 512))
        half_open: list[socket.socket] = []
        dice = random.Random(1)
        for _ in range(IN_A_ROW):
            _come_and_go(house.path, dice, half_open)
        took_s = time.monotonic() - begin
        for sock in half_open:
            sock.close()
        handshake.join(HANDSHAKE_TIMEOUT_S + SLOWEST_S)
        slow.stop()
        house.within_limits(guest)
        print(f"{IN_A_ROW} connections in {took_s:.1f} s")
        # In its handshake nobody may dawdle, later everybody may.
        cut_off_s = handshake.cut_off_after_s
        assert cut_off_s is not None, "it may still go on"
        assert HANDSHAKE_TIMEOUT_S - 1 < cut_off_s < HANDSHAKE_TIMEOUT_S + SLOWEST_S
        assert slow.cut_off_after_s is None
    handshake.client.close()
