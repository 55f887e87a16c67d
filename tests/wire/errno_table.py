"""The errno table (docs/protocol.md, "Errors"; fleecenbd/nbd/validation.py), a Row for each case.

Each row says what is sent, in which reply modes, and what a guest's disk, a read-only one and a
fleecing export answer. The numbers are the wire's, spelled out.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack

from tests.nbd import wire

KIB, MIB = 1 << 10, 1 << 20
SIZE = 66 * MIB + 512
"""Bytes of the disk: more than the longest READ that is answered."""
RELEASED = 65 * MIB
"""Where the TRIMs of fleecing exports are."""

OK, EPERM, EINVAL, ENOSPC, EOVERFLOW = 0, 1, 22, 28, 75
OK_OR_NOTSUP = (0, 95)
"""FAST_ZERO: whether zeroing is fast is the file system's business."""

ALL = (wire.SIMPLE, wire.STRUCTURED, wire.EXTENDED)
CHUNKED = (wire.STRUCTURED, wire.EXTENDED)
EXTENDED = (wire.EXTENDED,)
SIMPLE = (wire.SIMPLE,)

Errors = int | tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One request. ``bare``: an extended WRITE without PAYLOAD_LEN; ``payload``: else a WRITE's is
    ``length`` zeroes; ``filtered``: one context is asked for by a payload."""

    name: str
    command: int
    offset: int
    length: int
    guest: Errors
    read_only: Errors
    fleecing: Errors
    flags: int = 0
    modes: tuple[str, ...] = ALL
    contexts: bool = False
    payload: bytes | None = None
    bare: bool = False
    filtered: bool = False

    def sent(self, cookie: int, mode: str) -> bytes:
        """The request, with its payload."""
        payload = self.payload
        if payload is None:
            payload = b"\x5a" * self.length if self.command == wire.WRITE else b""
        flags = self.flags
        if self.command == wire.WRITE and mode == wire.EXTENDED and not self.bare:
            flags |= wire.PAYLOAD_LEN
        header = wire.request(
            self.command,
            cookie,
            self.offset,
            self.length,
            flags=flags,
            extended=mode == wire.EXTENDED,
        )
        return header + payload

    def allowed(self, kind: str) -> tuple[int, ...]:
        """The errors that an export of this kind may answer."""
        errors: Errors = {
            "guest": self.guest,
            "read-only": self.read_only,
            "fleecing": self.fleecing,
        }[kind]
        return errors if isinstance(errors, tuple) else (errors,)


def _same(error: int, name: str, command: int, offset: int, length: int, **more: object) -> Row:
    """A row that is the same for every kind of export."""
    return Row(name, command, offset, length, error, error, error, **more)  # type: ignore[arg-type]


READ, WRITE, FLUSH, TRIM, CACHE = wire.READ, wire.WRITE, wire.FLUSH, wire.TRIM, wire.CACHE
ZEROES, STATUS = wire.WRITE_ZEROES, wire.BLOCK_STATUS
NAMES = {
    READ: "READ",
    WRITE: "WRITE",
    TRIM: "TRIM",
    CACHE: "CACHE",
    ZEROES: "WRITE_ZEROES",
    STATUS: "BLOCK_STATUS",
}
FLAGS = {
    "FUA": wire.FUA,
    "NO_HOLE": wire.NO_HOLE,
    "DF": wire.DF,
    "REQ_ONE": wire.REQ_ONE,
    "FAST_ZERO": wire.FAST_ZERO,
    "bit 6": 1 << 6,
    "bit 15": 1 << 15,
}
OWN_FLAGS = {
    READ: ("DF",),
    ZEROES: ("NO_HOLE", "FAST_ZERO"),
    STATUS: ("REQ_ONE",),
}


def flagged(command: int) -> tuple[int, int, int]:
    """What a guest's disk, a read-only one and a fleecing export say to a flag that is not the
    command's: only that a disk is read-only goes before it."""
    return EINVAL, EPERM if command in (WRITE, ZEROES, TRIM) else EINVAL, EINVAL


def refusals(command: int) -> tuple[int, int, int]:
    """The same for a range that cannot be: a WRITE is EPERM where there is none."""
    guest, read_only, fleecing = flagged(command)
    return guest, read_only, EPERM if command == WRITE else fleecing


def served(command: int) -> tuple[int, int, int]:
    """The same of a command with nothing wrong with it."""
    read_only = EPERM if command in (WRITE, ZEROES, TRIM) else OK
    fleecing = {WRITE: EPERM, ZEROES: EINVAL, CACHE: EINVAL}.get(command, OK)
    return OK, read_only, fleecing


def past_end(command: int) -> tuple[int, int, int]:
    guest, read_only, fleecing = refusals(command)
    return ENOSPC if command in (WRITE, ZEROES) else guest, read_only, fleecing


def _rows() -> list[Row]:
    rows = []
    for command, name in NAMES.items():
        context = {"contexts": command == STATUS}
        modes = CHUNKED if command == STATUS else ALL
        more = {"modes": modes, **context}

        def row(
            text: str,
            offset: int,
            length: int,
            errors: tuple[Errors, Errors, Errors],
            *,
            command: int = command,
            name: str = name,
            more: dict[str, object] = more,
            **other: object,
        ) -> None:
            rows.append(
                Row(f"{name} {text}", command, offset, length, *errors, **{**more, **other})  # type: ignore[arg-type]
            )

        row("inside", RELEASED, 4 * KIB, served(command))
        row("of the last bytes", SIZE - 512, 512, served(command) if command != TRIM else (0, 1, 0))
        row("of length 0", 0, 0, refusals(command))
        row("of length 0 at the end", SIZE, 0, refusals(command))
        row("that crosses the end", SIZE - 1, 2, past_end(command))
        row("that begins at the end", SIZE, 1, past_end(command))
        row("that wraps 64 bits", (1 << 64) - 1, 2, past_end(command))
        if command in (TRIM, ZEROES, CACHE, STATUS):
            row("longer than any payload", 0, 0xFFFFFFFF, past_end(command))
            row("of 64 bits", 0, (1 << 64) - 1, past_end(command), modes=EXTENDED)
        for flag, bit in FLAGS.items():
            if flag in OWN_FLAGS.get(command, ()):
                continue
            if flag == "FUA":
                guest, read_only, _ = served(command)
                errors = guest, read_only, EINVAL
            else:
                errors = flagged(command)
            row(f"with {flag}", RELEASED, 4 * KIB, errors, flags=bit)
        compact = tuple(mode for mode in modes if mode != wire.EXTENDED)
        row("with PAYLOAD_LEN", 0, 512, flagged(command), flags=wire.PAYLOAD_LEN, modes=compact)
        if command not in (WRITE, STATUS):
            row(
                "with a payload",
                0,
                300,
                flagged(command),
                flags=wire.PAYLOAD_LEN,
                modes=EXTENDED,
                payload=b"\xff" * 300,
            )
    return rows


FILTER_OF_ONE = pack(">QI", 4096, 1)

ROWS = [
    *_rows(),
    # READ
    _same(OK, "READ of 64 MiB", READ, 0, 64 * MIB),
    _same(EINVAL, "READ of more than 64 MiB", READ, 0, 64 * MIB + 1),
    _same(OK, "READ with DF", READ, 0, 64 * KIB, flags=wire.DF, modes=CHUNKED),
    _same(OK, "READ of 32 MiB with DF", READ, 0, 32 * MIB, flags=wire.DF, modes=CHUNKED),
    _same(
        EOVERFLOW, "READ of 32 MiB + 1 with DF", READ, 0, 32 * MIB + 1, flags=wire.DF, modes=CHUNKED
    ),
    _same(EINVAL, "READ with DF, no chunks", READ, 0, 512, flags=wire.DF, modes=SIMPLE),
    # WRITE
    Row("WRITE without PAYLOAD_LEN", WRITE, 0, 512, OK, EPERM, EPERM, modes=EXTENDED, bare=True),
    Row("WRITE above the advertised maximum", WRITE, 32 * MIB, 33 * MIB, OK, EPERM, EPERM),
    # WRITE_ZEROES
    Row("WRITE_ZEROES with NO_HOLE", ZEROES, 0, 4096, OK, EPERM, EINVAL, flags=wire.NO_HOLE),
    Row(
        "WRITE_ZEROES with FAST_ZERO",
        *(ZEROES, RELEASED, 4096, OK_OR_NOTSUP, EPERM, EINVAL),
        flags=wire.FAST_ZERO,
    ),
    Row(
        "WRITE_ZEROES with FAST_ZERO past the end",
        *(ZEROES, SIZE, 4096, ENOSPC, EPERM, EINVAL),
        flags=wire.FAST_ZERO,
    ),
    # FLUSH
    _same(OK, "FLUSH", FLUSH, 0, 0),
    _same(OK, "FLUSH with an offset and a length", FLUSH, SIZE + 1, 77),
    Row("FLUSH with FUA", FLUSH, 0, 0, OK, OK, EINVAL, flags=wire.FUA),
    _same(EINVAL, "FLUSH with DF", FLUSH, 0, 0, flags=wire.DF),
    # BLOCK_STATUS
    _same(EINVAL, "BLOCK_STATUS without a context", STATUS, 0, 4096),
    _same(
        *(OK, "BLOCK_STATUS with REQ_ONE", STATUS, 0, SIZE),
        flags=wire.REQ_ONE,
        modes=CHUNKED,
        contexts=True,
    ),
    _same(
        *(OK, "BLOCK_STATUS with a filter", STATUS, 0, len(FILTER_OF_ONE)),
        flags=wire.PAYLOAD_LEN,
        modes=EXTENDED,
        contexts=True,
        payload=FILTER_OF_ONE,
        filtered=True,
    ),
    *(
        _same(
            *(EINVAL, f"BLOCK_STATUS with a filter {text}", STATUS, 0, len(payload)),
            flags=wire.PAYLOAD_LEN,
            modes=EXTENDED,
            contexts=True,
            payload=payload,
        )
        for text, payload in {
            "of nothing": b"",
            "of no context": pack(">Q", 4096),
            "of half an id": FILTER_OF_ONE[:-1],
            "of an unknown id": pack(">QI", 4096, 99),
            "of one id twice": pack(">QII", 4096, 1, 1),
            "of length 0": pack(">QI", 0, 1),
            "past the end": pack(">QI", SIZE + 1, 1),
            "of more ids than are kept": pack(">Q", 4096) + bytes(4 * 300),
        }.items()
    ),
    # What nobody knows
    *(_same(EINVAL, f"command {number}", number, 0, 512) for number in (8, 9, 255, 0xFFFF)),
    _same(
        *(EINVAL, "command 9 with a payload", 9, 0, 5000),
        flags=wire.PAYLOAD_LEN,
        modes=EXTENDED,
        payload=b"\xee" * 5000,
    ),
]
