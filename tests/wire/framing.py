"""What a fuzzer's input means: bytes of a client, how they are split, and what was agreed before.

    byte 0        choices of the harness, bit by bit
    bytes 1, 2    where the stream is split (a seed)
    the rest      raw: the stream itself. Made: records, of which the stream is built with right
                  magic numbers and lengths, so that a mutation gets past the first check

Any bytes are an input; what is missing at the end is zero, or nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from struct import pack, unpack_from

from tests.nbd import wire

HEAD = 3


def head(data: bytes) -> tuple[int, random.Random, bytes]:
    """(choices, dice for the splits, the rest)."""
    padded = data[:HEAD].ljust(HEAD, b"\0")
    return padded[0], random.Random(padded[1:]), data[HEAD:]


def splits(stream: bytes, dice: random.Random) -> Iterator[bytes]:
    """The stream in pieces: single bytes, a few, or many; empty ones among them."""
    position = 0
    # Single bytes are the slowest, so they are the rarest.
    longest = dice.choice((1, 7, 40, 40, 400, 400, 5000, 5000))
    while position < len(stream):
        end = position + dice.randint(0, longest)
        yield stream[position:end]
        position = end


def made_options(rest: bytes) -> bytes:
    """Records of u8 option, u8 shape, u8 length, data: client flags and options around them.

    Shape 0: the data is the option's. Else a name and queries, or a name and information types,
    laid out as they must be, of its letters.
    """
    stream = wire.client_flags()
    position = 0
    while position + 3 <= len(rest):
        number, shape, length = unpack_from(">BBB", rest, position)
        content = rest[position + 3 : position + 3 + length]
        position += 3 + length
        if shape % 4 == 1:
            name, *queries = content.split(b"|")
            body = pack(">I", len(name)) + name + pack(">I", len(queries))
            body += b"".join(pack(">I", len(query)) + query for query in queries)
        elif shape % 4 == 2:
            name, _, types = content.partition(b"|")
            body = pack(">I", len(name)) + name
            body += pack(f">{1 + len(types)}H", len(types), *types)
        elif shape % 4 == 3:
            body = content * shape
        else:
            body = content
        stream += wire.option(number, body)
    return stream


_NUMBERS = (0, 1, 511, 512, 4096, 1 << 20, (1 << 20) - 512, (1 << 32) - 1, (1 << 64) - 1)
"""Offsets and lengths that matter, for an export of 1 MiB."""


def made_requests(rest: bytes, *, extended: bool) -> bytes:
    """Records of u8 command, u16 flags, u8 offset, u8 length: requests, with their payloads."""
    stream = bytearray()
    position = 0
    while position + 5 <= len(rest):
        command, flags, chosen, length = unpack_from(">BHBB", rest, position)
        position += 5
        offset = _NUMBERS[chosen % 16] if chosen % 16 < len(_NUMBERS) else chosen << 9
        has_payload = command == wire.WRITE or bool(
            extended and flags & wire.PAYLOAD_LEN and command != wire.DISC
        )
        payload = b""
        if has_payload:
            payload = rest[position : position + length]
            position += len(payload)
            size = len(payload)
        else:
            size = _NUMBERS[length % 16] if length % 16 < len(_NUMBERS) else length << 9
        if not extended:
            size &= 0xFFFFFFFF
        cookie = position
        # Not wire.request(): it sets PAYLOAD_LEN by itself, and here any flag is to be had.
        if extended:
            stream += pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, size)
        else:
            stream += pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, size)
        stream += payload
    return bytes(stream)
