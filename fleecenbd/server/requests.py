"""One request that may wait: what it does to its export, and the reply that it gets."""

from __future__ import annotations

from fleecenbd.nbd.catalog import ReplyMode
from fleecenbd.nbd.constants import (
    NBD_CMD_BLOCK_STATUS,
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
    NBD_EIO,
    NBD_ESHUTDOWN,
)
from fleecenbd.nbd.errors import nbd_errno
from fleecenbd.nbd.replies import Buffer, SimpleReplies, StructuredReplies
from fleecenbd.nbd.transmission import ExtendedReplies, Request
from fleecenbd.nbd.validation import block_status_filter
from fleecenbd.server.exports import Export

Replies = SimpleReplies | StructuredReplies
Contexts = tuple[tuple[int, str], ...]
"""(id, name) of each meta context that the client selected."""

REPLIES: dict[ReplyMode, type[SimpleReplies] | type[StructuredReplies]] = {
    ReplyMode.SIMPLE: SimpleReplies,
    ReplyMode.STRUCTURED: StructuredReplies,
    ReplyMode.EXTENDED: ExtendedReplies,
}


class Pending:
    """A request in flight in a task. Once ``answered``, what its task ends with is dropped."""

    __slots__ = ("answered", "cost", "request")

    def __init__(self, request: Request, cost: int) -> None:
        self.request = request
        self.cost = cost
        """Bytes charged, as long as the channel has not taken them over."""
        self.answered = False


async def perform(
    export: Export, replies: Replies, contexts: Contexts, request: Request
) -> list[Buffer]:
    """Do what the request asks, and return its reply; nothing is awaited after the last look.

    RequestRules has let the request pass. Raises OSError.
    """
    flags, command, cookie, offset, length, _ = request
    if command == NBD_CMD_READ:
        data = await export.read(offset, length)
        return replies.read(cookie, offset, data, dont_fragment=flags & NBD_CMD_FLAG_DF != 0)
    if command == NBD_CMD_BLOCK_STATUS:
        return await _block_status(export, replies, contexts, request)
    await change(export, request)
    return [replies.done(cookie, offset)]


async def change(export: Export, request: Request) -> None:
    """Do what a request asks that has no more to answer than that it is done. Raises OSError."""
    flags, command, _, offset, length, payload = request
    if command == NBD_CMD_WRITE:
        assert payload is not None, "the decoder hands out whole requests"
        await export.write(offset, payload)
    elif command == NBD_CMD_TRIM:
        await export.trim(offset, length)
    elif command == NBD_CMD_WRITE_ZEROES:
        await export.write_zeroes(
            offset,
            length,
            may_trim=not flags & NBD_CMD_FLAG_NO_HOLE,
            fast=flags & NBD_CMD_FLAG_FAST_ZERO != 0,
        )
    if command == NBD_CMD_FLUSH or flags & NBD_CMD_FLAG_FUA:
        await export.flush()


async def _block_status(
    export: Export, replies: Replies, contexts: Contexts, request: Request
) -> list[Buffer]:
    flags, _, cookie, offset, length, payload = request
    if flags & NBD_CMD_FLAG_PAYLOAD_LEN:
        content = block_status_filter(payload or b"")
        assert content is not None, "RequestRules has looked at the payload"
        length, wanted = content
        contexts = tuple(context for context in contexts if context[0] in wanted)
    one = flags & NBD_CMD_FLAG_REQ_ONE != 0
    extents = await export.status([name for _, name in contexts], offset, length, one=one)
    answer = [(number, found) for (number, _), found in zip(contexts, extents, strict=True)]
    return replies.block_status(cookie, offset, answer, req_one=one)


def failure(replies: Replies, request: Request, error: OSError, *, is_guest: bool) -> bytes:
    """The reply to a request that failed."""
    number = error_number(request, error, is_guest=is_guest)
    text = error.strerror or str(error)
    return replies.error(request[2], request[3], number, text, is_read=request[1] == NBD_CMD_READ)


def error_number(request: Request, error: OSError, *, is_guest: bool) -> int:
    """The NBD error of a request that failed.

    A guest never sees NBD_ESHUTDOWN, not even when its own device says so: QEMU takes it for the
    server's end (docs/semantics.md, section 9).
    """
    flags, command, _, _, _, _ = request
    fast = command == NBD_CMD_WRITE_ZEROES and flags & NBD_CMD_FLAG_FAST_ZERO != 0
    number = nbd_errno(error.errno, fast_zero=fast)
    if number == NBD_ESHUTDOWN and is_guest:
        return NBD_EIO
    return number
