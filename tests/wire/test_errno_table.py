"""Every row of the errno table, asked of a running server: each mode, each kind of export."""

from pathlib import Path

import pytest

from tests.nbd import wire
from tests.wire.client import CONTEXTS, Client
from tests.wire.conftest import Served
from tests.wire.errno_table import ALL, MIB, RELEASED, ROWS, SIZE, Row

PROBE = 2 * MIB + 5
"""Where is read after each row: no row touches it."""
EXPORTS = {
    "guest": ("vm", "guest", False),
    "read-only guest": ("vm", "read-only", True),
    "fleecing": ("vm@n", "fleecing", False),
    "fleecing of a read-only disk": ("vm@n", "fleecing", True),
}
CASES = [
    pytest.param(row, mode, export, id=f"{row.name}-{mode}-{export}")
    for row in ROWS
    for mode in row.modes
    for export in EXPORTS
]


def _content(path: Path, row: Row) -> bytes:
    with path.open("rb") as image:
        image.seek(min(row.offset, SIZE))
        return image.read(min(row.length, 64 << 10))


@pytest.mark.parametrize(("row", "mode", "export"), CASES)
def test_a_row_is_answered_as_it_says_and_the_next_request_is_served(
    row: Row, mode: str, export: str, writable: Served, read_only: Served
) -> None:
    name, kind, disk_is_read_only = EXPORTS[export]
    served = read_only if disk_is_read_only else writable
    held = _content(served.disk, row)
    contexts = CONTEXTS if row.contexts else ()
    with Client(served.path, name, mode, contexts=contexts) as client:
        length = 4096 if row.filtered else row.length
        client.asked(row.command, 7, row.offset, length, row.flags, filtered=row.filtered)
        client.asked(wire.READ, 8, PROBE, 600, 0)
        # In one go: what is wrongly taken for a payload, or for a header, is seen at once.
        client.send(
            row.sent(7, mode) + wire.request(*(wire.READ, 8, PROBE, 600), extended=client.extended)
        )
        replies = {reply.cookie: reply for reply in (client.reply(), client.reply())}
    asked = replies[7]
    assert asked.error in row.allowed(kind)
    if asked.error and mode != wire.SIMPLE:
        assert asked.text
    with served.before.open("rb") as before:
        before.seek(PROBE)
        assert replies[8].data == before.read(600)
    if asked.error or name == "vm@n":
        assert _content(served.disk, row) == held, "what was refused has changed the disk"


@pytest.mark.parametrize("mode", ALL)
def test_a_read_of_what_was_released_is_einval_and_its_status_is_not(
    mode: str, writable: Served
) -> None:
    with Client(writable.path, "vm@n", mode) as client:
        assert client.ask(wire.TRIM, RELEASED, 64 << 10).error == 0
        refused = client.ask(wire.READ, RELEASED + (64 << 10) - 1, 2)
        assert refused.error == 22
        assert mode == wire.SIMPLE or "released" in refused.text
        assert client.ask(wire.READ, RELEASED + (64 << 10), 2).error == 0
    if mode != wire.SIMPLE:
        with Client(writable.path, "vm@n", mode, contexts=CONTEXTS) as client:
            assert client.ask(wire.BLOCK_STATUS, RELEASED, 64 << 10).error == 0


def _magic_of(mode: str, *, right: bool) -> bytes:
    return wire.request(wire.READ, 1, 0, 512, extended=(mode == wire.EXTENDED) == right).ljust(32)


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("export", ["vm", "vm@n"])
@pytest.mark.parametrize(
    "broken",
    ["a payload of 64 MiB and a byte", "the other kind of header", "zeroes", "an option again"],
)
def test_a_broken_protocol_drops_the_connection_after_what_came_before_was_answered(
    broken: str, export: str, mode: str, writable: Served
) -> None:
    extended = mode == wire.EXTENDED
    sent = {
        "a payload of 64 MiB and a byte": wire.request(
            wire.WRITE,
            2,
            0,
            (64 << 20) + 1,
            flags=wire.PAYLOAD_LEN if extended else 0,
            extended=extended,
        ),
        "the other kind of header": _magic_of(mode, right=False),
        "zeroes": bytes(64),
        "an option again": wire.option(7, wire.info_data("vm")).ljust(64),
    }[broken]
    with Client(writable.path, export, mode) as client:
        client.asked(wire.READ, 1, PROBE, 512, 0)
        client.send(wire.request(wire.READ, 1, PROBE, 512, extended=extended) + sent)
        replies = client.reader.feed(client.until_closed())
        assert [(reply.cookie, reply.error) for reply in replies] == [(1, 0)]
        assert client.reader.pending == 0
    with Client(writable.path, export, mode) as client:
        assert client.ask(wire.READ, PROBE, 512).error == 0


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("flags", [0, 0xFFFF])
def test_disc_is_answered_by_the_close_after_what_came_before_it(
    flags: int, mode: str, writable: Served
) -> None:
    with Client(writable.path, "vm", mode) as client:
        asked = (wire.FLUSH, wire.READ, wire.TRIM)
        data = b""
        for cookie, command in enumerate(asked):
            client.asked(command, cookie, 0, 512, 0)
            data += wire.request(command, cookie, 0, 512, extended=client.extended)
        client.send(
            data + wire.request(wire.DISC, 9, 1, 1 << 20, flags=flags, extended=client.extended)
        )
        replies = client.reader.feed(client.until_closed())
        assert sorted(reply.cookie for reply in replies) == [0, 1, 2]
        assert not any(reply.error for reply in replies)
