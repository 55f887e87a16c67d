"""Which requests are refused before anyone looks at a device: one rule per row, in this order.

    NBD_CMD_DISC                                            nothing of it is looked at
    unknown command                                         NBD_EINVAL
    WRITE, WRITE_ZEROES, TRIM of a read-only export         NBD_EPERM
    command that was not advertised                         NBD_EINVAL
    BLOCK_STATUS without a context that was agreed          NBD_EINVAL
    flag unknown, not this command's, or not advertised     NBD_EINVAL
    WRITE of an export that can only be read and trimmed    NBD_EPERM
    payload filter of BLOCK_STATUS that is not right        NBD_EINVAL
    length 0 (FLUSH: neither offset nor length matters)     NBD_EINVAL
    not a multiple of the minimum block size                NBD_EINVAL
    past the end: WRITE, WRITE_ZEROES                       NBD_ENOSPC
    past the end: READ, TRIM, CACHE, BLOCK_STATUS           NBD_EINVAL
    READ of more than PAYLOAD_MAX                           NBD_EINVAL
    READ with DF of more than PAYLOAD_ADVERTISED            NBD_EOVERFLOW

NBD_CMD_FLAG_FUA is every command's once it was advertised. (Specification, "Command flags",
"Request types", "Size constraints", "Error values".) The decoder has read the payload of all
of them before: an answer is all that is left to do.
"""

from __future__ import annotations

from collections.abc import Collection
from struct import unpack, unpack_from
from typing import Final

from fleecenbd.nbd.constants import (
    FLEECENBD_CMD_FLAG_READ_ONCE,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EOVERFLOW,
    NBD_EPERM,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    PAYLOAD_ADVERTISED,
    PAYLOAD_MAX,
)
from fleecenbd.nbd.transmission import Request

COMMAND_NAMES: Final = (
    "READ",
    "WRITE",
    "DISC",
    "FLUSH",
    "TRIM",
    "CACHE",
    "WRITE_ZEROES",
    "BLOCK_STATUS",
)
"""By number; for messages."""

_COMMANDS: Final = range(len(COMMAND_NAMES))
_ADVERTISED_BY: Final = {
    NBD_CMD_FLUSH: NBD_FLAG_SEND_FLUSH,
    NBD_CMD_TRIM: NBD_FLAG_SEND_TRIM,
    NBD_CMD_CACHE: NBD_FLAG_SEND_CACHE,
    NBD_CMD_WRITE_ZEROES: NBD_FLAG_SEND_WRITE_ZEROES,
}
_MODIFYING: Final = (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)
_EVERY_FLAG: Final = 0xFFFF
_LENGTH_UNLIMITED: Final = (1 << 64) - 1


def block_status_filter(payload: bytes | bytearray | memoryview) -> tuple[int, list[int]] | None:
    """(effect length, context ids) of a BLOCK_STATUS payload; None: its length is not right.

    Layout: u64 effect length, n * u32 id.
    """
    count, rest = divmod(len(payload) - 8, 4)
    if count < 0 or rest:
        return None
    (length,) = unpack_from(">Q", payload)
    return length, list(unpack(f">{count}I", payload[8:]))


class RequestRules:
    """The rules for one connection: what was agreed, and the size of the export.

    ``flags``: transmission flags of the export; ``size``: bytes; ``extended``, ``structured``:
    headers and replies that were agreed (extended implies structured); ``contexts``: whether
    any meta context was; ``context_ids``: which ids a payload filter may name;
    ``block_minimum``: bytes, a power of two; ``can_write``: whether WRITE is ever served;
    ``read_once``: whether a READ may ask to be the last of its range (a private extension).
    """

    def __init__(
        self,
        *,
        flags: int,
        size: int,
        extended: bool,
        structured: bool,
        contexts: bool,
        context_ids: Collection[int] = (),
        block_minimum: int = 1,
        can_write: bool = True,
        read_once: bool = False,
    ) -> None:
        self._size = size
        self._can_write = can_write
        self._block_mask = block_minimum - 1
        self._read_only = flags & NBD_FLAG_READ_ONLY != 0
        self._block_status = contexts and (structured or extended)
        self._context_ids = context_ids
        self._not_advertised = [
            command for command, flag in _ADVERTISED_BY.items() if not flags & flag
        ]

        allowed = [NBD_CMD_FLAG_FUA if flags & NBD_FLAG_SEND_FUA else 0 for _ in _COMMANDS]
        if read_once:
            allowed[NBD_CMD_READ] |= FLEECENBD_CMD_FLAG_READ_ONCE
        if structured or extended:
            allowed[NBD_CMD_READ] |= NBD_CMD_FLAG_DF
        allowed[NBD_CMD_WRITE_ZEROES] |= NBD_CMD_FLAG_NO_HOLE
        if flags & NBD_FLAG_SEND_FAST_ZERO:
            allowed[NBD_CMD_WRITE_ZEROES] |= NBD_CMD_FLAG_FAST_ZERO
        allowed[NBD_CMD_BLOCK_STATUS] |= NBD_CMD_FLAG_REQ_ONE
        if extended:
            # A client must set it there, and QEMU 10's does not: with or without is the same.
            allowed[NBD_CMD_WRITE] |= NBD_CMD_FLAG_PAYLOAD_LEN
            allowed[NBD_CMD_BLOCK_STATUS] |= NBD_CMD_FLAG_PAYLOAD_LEN
        self._allowed = allowed

        # The short cut of ``check``: by command, the flags that need a longer look (DF: its own
        # limit; a payload filter: its payload), and the longest length that does not. 0: always
        # look.
        look_flags = [_EVERY_FLAG & ~allowed[command] for command in _COMMANDS]
        look_flags[NBD_CMD_READ] |= NBD_CMD_FLAG_DF
        look_flags[NBD_CMD_BLOCK_STATUS] |= NBD_CMD_FLAG_PAYLOAD_LEN
        self._look_flags = tuple(look_flags)
        length_max = [_LENGTH_UNLIMITED for _ in _COMMANDS]
        length_max[NBD_CMD_READ] = PAYLOAD_MAX
        for command in (NBD_CMD_DISC, NBD_CMD_FLUSH, *self._not_advertised):
            length_max[command] = 0
        if self._read_only:
            for command in _MODIFYING:
                length_max[command] = 0
        if not can_write:
            length_max[NBD_CMD_WRITE] = 0
        if not self._block_status:
            length_max[NBD_CMD_BLOCK_STATUS] = 0
        self._length_max = tuple(length_max)

    def check(self, request: Request) -> tuple[int, str] | None:
        """None: serve it. Else (NBD error, text) to answer."""
        flags, command, _, offset, length, _ = request
        if (
            command <= NBD_CMD_BLOCK_STATUS
            and not flags & self._look_flags[command]
            and 0 < length <= self._length_max[command]
            and offset + length <= self._size
            and not (offset | length) & self._block_mask
        ):
            return None
        return self._look(request)

    def _look(self, request: Request) -> tuple[int, str] | None:
        """Every rule, in order."""
        flags, command, _, offset, length, payload = request
        if command == NBD_CMD_DISC:
            return None
        if command > NBD_CMD_BLOCK_STATUS:
            return NBD_EINVAL, f"command {command} is unknown"
        name = COMMAND_NAMES[command]
        if self._read_only and command in _MODIFYING:
            return NBD_EPERM, f"{name}: the export is read-only"
        if command in self._not_advertised:
            return NBD_EINVAL, f"{name} was not advertised for this export"
        if command == NBD_CMD_BLOCK_STATUS and not self._block_status:
            return NBD_EINVAL, f"{name}: no meta context was agreed on for this export"
        refused = flags & ~self._allowed[command]
        if refused:
            return NBD_EINVAL, f"{name}: command flags {refused:#06x} are not allowed here"
        if command == NBD_CMD_WRITE and not self._can_write:
            return NBD_EPERM, (
                f"{name}: the export is a point in time: it can be read and trimmed, not written"
            )
        if command == NBD_CMD_FLUSH:
            return None
        if command == NBD_CMD_BLOCK_STATUS and flags & NBD_CMD_FLAG_PAYLOAD_LEN:
            effect = self._effect_length(payload)
            if effect is None:
                return NBD_EINVAL, f"{name}: the payload does not name contexts that were agreed on"
            length = effect
        return self._look_at_range(command, flags, offset, length)

    def _look_at_range(
        self, command: int, flags: int, offset: int, length: int
    ) -> tuple[int, str] | None:
        name = COMMAND_NAMES[command]
        if length == 0:
            return NBD_EINVAL, f"{name}: the length is 0"
        if (offset | length) & self._block_mask:
            return NBD_EINVAL, (
                f"{name} of {length} bytes at {offset}: "
                f"not a multiple of the minimum block size, {self._block_mask + 1}"
            )
        if offset + length > self._size:
            writes = command in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
            return NBD_ENOSPC if writes else NBD_EINVAL, (
                f"{name} of {length} bytes at {offset}: the export ends at {self._size}"
            )
        if command == NBD_CMD_READ:
            if flags & NBD_CMD_FLAG_DF and length > PAYLOAD_ADVERTISED:
                return NBD_EOVERFLOW, (
                    f"{name} of {length} bytes in one piece: at most {PAYLOAD_ADVERTISED}"
                )
            if length > PAYLOAD_MAX:
                return NBD_EINVAL, f"{name} of {length} bytes: at most {PAYLOAD_MAX}"
        return None

    def _effect_length(self, payload: bytes | bytearray | memoryview | None) -> int | None:
        """Effect length of a payload filter; None: it is malformed, or names an id it must not."""
        content = block_status_filter(payload or b"")
        if content is None:
            return None
        length, ids = content
        if not ids or len(set(ids)) != len(ids) or not set(ids).issubset(self._context_ids):
            return None
        return length
