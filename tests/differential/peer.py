"""One of the two servers as its clients see it: a guest's connection and a backup's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import nbd

from tests.differential.script import Step
from tests.serving import connected

CONTEXT = "base:allocation"

# What libnbd would refuse by itself is to reach the server; it must go on setting its own flags.
UNCHECKED = nbd.STRICT_BOUNDS | nbd.STRICT_ZERO_SIZE | nbd.STRICT_COMMANDS | nbd.STRICT_FLAGS

FLAG_BITS = {
    "fua": nbd.CMD_FLAG_FUA,
    "no-hole": nbd.CMD_FLAG_NO_HOLE,
    "fast": nbd.CMD_FLAG_FAST_ZERO,
    "df": nbd.CMD_FLAG_DF,
}

ABILITIES = ("flush", "fua", "trim", "zero", "fast-zero", "cache", "df", "multi-conn")
BLOCK_SIZES = {
    "block-minimum": nbd.SIZE_MINIMUM,
    "block-preferred": nbd.SIZE_PREFERRED,
    "block-maximum": nbd.SIZE_MAXIMUM,
}


@dataclass(frozen=True)
class Answer:
    """What came of a step. `extents`: (length, flags), merged, up to the first error if any."""

    error: str | None = None
    data: bytes | None = None
    extents: tuple[tuple[int, int], ...] | None = None

    def __str__(self) -> str:
        parts = [self.error or "done"]
        if self.data is not None:
            parts.append(f"{len(self.data)} bytes")
        if self.extents is not None:
            parts.append(" ".join(f"{length}:{flags}" for length, flags in self.extents))
        return ", ".join(parts)


class Peer:
    """A server's two exports of one disk, each with a libnbd client on it."""

    def __init__(self, guest: nbd.NBD, backup: nbd.NBD) -> None:
        self._clients = {"guest": guest, "backup": backup}

    def play(self, step: Step) -> Answer:
        """Make a step's request and wait for its answer."""
        client = self._clients[step.side]
        if step.request == "status":
            return _status(client, step)
        bits = sum(FLAG_BITS[flag] for flag in step.flags)
        data = None
        try:
            match step.request:
                case "read":
                    data = bytes(client.pread(step.length, step.offset, bits))
                case "write":
                    client.pwrite(step.payload(), step.offset, bits)
                case "zero":
                    client.zero(step.length, step.offset, bits)
                case "trim":
                    client.trim(step.length, step.offset, bits)
                case "cache":
                    client.cache(step.length, step.offset, bits)
                case "flush":
                    client.flush()
        except nbd.Error as error:
            return Answer(_name(error))
        return Answer(data=data)

    def offers(self) -> dict[tuple[str, str], int]:
        """What each side's export offers, by (side, name): its size, abilities, block sizes."""
        found: dict[tuple[str, str], int] = {}
        for side, client in self._clients.items():
            found[side, "size"] = client.get_size()
            found[side, "read-only"] = client.is_read_only()
            for ability in ABILITIES:
                method = getattr(client, f"can_{ability.replace('-', '_')}")
                found[side, ability] = method()
            for name, which in BLOCK_SIZES.items():
                found[side, name] = client.get_block_size(which)
        return found


@contextmanager
def peer(guest_uri: str, backup_uri: str) -> Iterator[Peer]:
    """Connect to both exports of a disk."""
    with connected(guest_uri, _prepare) as guest, connected(backup_uri, _prepare) as backup:
        yield Peer(guest, backup)


def _prepare(client: nbd.NBD) -> None:
    client.add_meta_context(CONTEXT)
    client.set_strict_mode(client.get_strict_mode() & ~UNCHECKED)


def _name(error: nbd.Error) -> str:
    assert error.errno is not None, f"not from the server: {error.string}"
    name: str = error.errno
    return name


def _status(client: nbd.NBD, step: Step) -> Answer:
    """Ask until the whole range is covered: how much one reply covers is the server's choice."""
    merged: list[tuple[int, int]] = []
    position = step.offset

    def collect(name: str, offset: int, entries: list[int], _error: object) -> int:
        nonlocal position
        assert (name, offset) == (CONTEXT, position)
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            length = min(length, step.end - position)
            if merged and merged[-1][1] == flags:
                merged[-1] = (merged[-1][0] + length, flags)
            elif length:
                merged.append((length, flags))
            position += length
        return 0

    while True:
        asked = position
        try:
            client.block_status(step.end - position, position, collect)
        except nbd.Error as error:
            return Answer(_name(error), extents=tuple(merged))
        if position == step.end:
            return Answer(extents=tuple(merged))
        assert position > asked, f"no progress at {position}"
