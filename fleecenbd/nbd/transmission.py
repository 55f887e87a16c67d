"""Transmission: bytes in, requests out. (Replies: fleecenbd.nbd.replies, offered here too.)

Wire layout, big-endian (specification, "Request message"):

    compact   u32 0x25609513  u16 flags  u16 type  u64 cookie  u64 offset  u32 length    28 bytes
    extended  u32 0x21e41c71  u16 flags  u16 type  u64 cookie  u64 offset  u64 length    32 bytes

What follows the header is payload of ``length`` bytes: compact, of NBD_CMD_WRITE whatever its
flags; extended, of any command with NBD_CMD_FLAG_PAYLOAD_LEN, and of NBD_CMD_WRITE without it
too: QEMU 10's client leaves the flag out and sends the payload. A payload is always consumed,
whatever will be answered: the next header begins behind it. NBD_CMD_DISC has none, whatever
its flags say: the connection ends there.

How the bytes are kept: one segment, the bytes of the latest feed, and a position in it. A
header inside the segment is unpacked where it lies; that is the hot path. A header that the
segment cuts is collected in ``_head``, a payload that it cuts in ``_payload``. While either has
begun, the segment is used up: that alone keeps the hot path away, and what is fed waits in the
queue. So do feeds that come before the segment is used up: nothing is copied to be joined.
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import Final, TypeAlias

from fleecenbd.nbd.constants import (
    CONTEXT_FILTER_MAX,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_WRITE,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REQUEST_MAGIC,
    PAYLOAD_MAX,
)
from fleecenbd.nbd.errors import ProtocolError
from fleecenbd.nbd.replies import ExtendedReplies, SimpleReplies, StructuredReplies

__all__ = [
    "ExtendedReplies",
    "Request",
    "RequestDecoder",
    "SimpleReplies",
    "StructuredReplies",
]

Request: TypeAlias = tuple[int, int, int, int, int, bytes | bytearray | memoryview | None]
"""(flags, type, cookie, offset, length, payload); payload is None where none follows."""

_COMPACT: Final = Struct(">IHHQQI")
_EXTENDED: Final = Struct(">IHHQQQ")

_COPY_MAX: Final = 16 * 1024
"""Bytes of a payload that is copied out of its segment: a view costs as much to make, and
would keep the whole segment alive while the request is served."""


class RequestDecoder:
    """Takes bytes as they come, hands out requests that are complete.

    ``extended``: NBD_OPT_EXTENDED_HEADERS was agreed. ``payload_max``: bytes; a longer payload
    is a ProtocolError. ``keep_writes``: False where every WRITE is refused: its payload is read
    and dropped, and handed out as b"". Does not check what is asked: see fleecenbd.nbd.validation.
    """

    def __init__(
        self,
        *,
        extended: bool = False,
        payload_max: int = PAYLOAD_MAX,
        keep_writes: bool = True,
    ) -> None:
        header = _EXTENDED if extended else _COMPACT
        self._extended = extended
        self._payload_max = payload_max
        self._keep_writes = keep_writes
        self._unpack = header.unpack_from
        self._header_size = header.size
        self._magic = NBD_EXTENDED_REQUEST_MAGIC if extended else NBD_REQUEST_MAGIC
        # In a compact request the flag means nothing, so no flag makes a payload follow.
        self._payload_flag = NBD_CMD_FLAG_PAYLOAD_LEN if extended else 0

        self._segment = b""
        self._size = 0
        self._position = 0
        self._queue: deque[bytes] = deque()

        self._head = bytearray()
        self._unfinished: tuple[int, int, int, int, int] | None = None
        self._payload = bytearray()
        self._wanted = 0
        self._dropping = False

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet handed out."""
        return (
            self._size
            - self._position
            + sum(map(len, self._queue))
            + len(self._head)
            + len(self._payload)
        )

    def feed(self, data: bytes) -> None:
        """Take ``data``; payloads may be views of it."""
        if self._position == self._size and not (self._queue or self._head or self._unfinished):
            self._segment = data
            self._size = len(data)
            self._position = 0
        else:
            self._queue.append(data)

    def next_request(self) -> Request | None:
        """The next request that is complete; None: more bytes are needed.

        Raises ProtocolError, and goes on raising it: there is no way to find the next header.
        """
        position = self._position
        end = position + self._header_size
        if end > self._size:
            return self._next_across_segments()
        magic, flags, command, cookie, offset, length = self._unpack(self._segment, position)
        if magic != self._magic:
            raise self._bad_magic(magic)
        if (command == NBD_CMD_WRITE or flags & self._payload_flag) and self._has_payload(
            flags, command
        ):
            return self._begin_payload((flags, command, cookie, offset, length), end)
        self._position = end
        return (flags, command, cookie, offset, length, None)

    def _has_payload(self, flags: int, command: int) -> bool:
        if command == NBD_CMD_WRITE:
            return True
        return flags & self._payload_flag != 0 and command != NBD_CMD_DISC

    def _begin_payload(self, header: tuple[int, int, int, int, int], begin: int) -> Request | None:
        """The request whose payload begins at ``begin``, if the segment holds it whole."""
        length = header[4]
        if length > self._payload_max:
            raise ProtocolError(
                f"a payload of {length} bytes was announced; at most {self._payload_max} are taken"
            )
        if header[1] == NBD_CMD_WRITE:
            keep = self._keep_writes
        else:
            keep = header[1] == NBD_CMD_BLOCK_STATUS and length <= CONTEXT_FILTER_MAX
        end = begin + length
        if end > self._size:
            self._position = begin
            self._unfinished = header
            self._wanted = length
            self._dropping = not keep
            return self._next_across_segments()
        self._position = end
        if not keep:
            return (*header, b"")
        if length <= _COPY_MAX:
            return (*header, self._segment[begin:end])
        return (*header, memoryview(self._segment)[begin:end])

    def _next_across_segments(self) -> Request | None:
        """What ``next_request`` does where the segment ends inside a header or a payload."""
        while True:
            if self._unfinished is not None:
                if self._take_payload():
                    header, payload = self._unfinished, self._payload
                    self._unfinished = None
                    self._payload = bytearray()
                    return (*header, payload)
            elif self._head or self._size - self._position < self._header_size:
                if self._take_head():
                    return self._request_of_head()
            else:
                return self.next_request()
            if not self._queue:
                return None
            self._segment = self._queue.popleft()
            self._size = len(self._segment)
            self._position = 0

    def _take_payload(self) -> bool:
        """Move payload out of the segment; True: it is complete."""
        begin = self._position
        end = min(begin + self._wanted, self._size)
        self._wanted -= end - begin
        self._position = end
        if not self._dropping:
            # Grown as bytes come, not allocated from the announced length: a header alone
            # must not cost its sender's word in memory, and no zeroes are stored first.
            self._payload += memoryview(self._segment)[begin:end]
        return self._wanted == 0

    def _take_head(self) -> bool:
        """Move bytes of a header that the segment cuts out of it; True: it is complete."""
        begin = self._position
        end = min(begin + self._header_size - len(self._head), self._size)
        self._head += self._segment[begin:end]
        self._position = end
        return len(self._head) == self._header_size

    def _request_of_head(self) -> Request | None:
        magic, flags, command, cookie, offset, length = self._unpack(self._head, 0)
        if magic != self._magic:
            raise self._bad_magic(magic)
        if self._has_payload(flags, command):
            request = self._begin_payload((flags, command, cookie, offset, length), self._position)
        else:
            request = (flags, command, cookie, offset, length, None)
        self._head.clear()
        return request

    def _bad_magic(self, magic: int) -> ProtocolError:
        kind = "extended" if self._extended else "compact"
        return ProtocolError(
            f"{kind} requests begin with {self._magic:#010x}; this one with {magic:#010x}"
        )
