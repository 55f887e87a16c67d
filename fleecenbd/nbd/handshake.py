"""The handshake: fixed newstyle negotiation, from the greeting to the first request.

    server  NBDMAGIC IHAVEOPT, handshake flags
    client  client flags
    client  IHAVEOPT, option, length, data      } until NBD_OPT_GO or NBD_OPT_EXPORT_NAME
    server  replies; the last one is final      } succeeds, or NBD_OPT_ABORT

``Handshake._conversation`` reads like that: a generator that yields how many bytes it needs
next and is sent exactly those. An option's data is consumed before anything is decided about
it, so the next option is always found. What cannot be answered (a client flag that was not
offered, NBD_OPT_EXPORT_NAME that fails, a limit that is passed) is a ProtocolError.

State that options leave behind, and what ends it: the reply mode only rises (simple,
structured, extended); meta contexts are those of the latest NBD_OPT_SET_META_CONTEXT, none
when it failed, and they count only if the export is entered by the same name. There is no
TLS: NBD_OPT_STARTTLS is NBD_REP_ERR_UNSUP.

How long a handshake may take, and how many may go on at once, is the server's business.
(Specification, "Fixed newstyle negotiation" and "Option types".)
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from struct import pack, unpack
from typing import Final, TypeAlias

from fleecenbd.nbd.catalog import Catalog, ExportInfo, Negotiated, ReplyMode
from fleecenbd.nbd.constants import (
    MIB,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTS_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_EXT_HEADER_REQD,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNSUP,
)
from fleecenbd.nbd.errors import NegotiationError, ProtocolError
from fleecenbd.nbd.options import (
    Reply,
    error_reply,
    info_block_size,
    info_description,
    info_export,
    info_name,
    invalid,
    list_contexts,
    meta_context_reply,
    option_reply,
    parse_info,
    parse_meta_context,
    parse_string,
    select_contexts,
    server_reply,
)

__all__ = [
    "Catalog",
    "ExportInfo",
    "Handshake",
    "HandshakeLimits",
    "Negotiated",
    "ReplyMode",
]

_EXPORT_NAME_ZEROES: Final = bytes(124)
_Conversation: TypeAlias = Generator[int, bytes, None]
_Answer: TypeAlias = Callable[[bytes], list[Reply]]


@dataclass(frozen=True)
class HandshakeLimits:
    """How much a client may ask before it enters an export. Sizes in bytes."""

    option_data_max: int = 64 * 1024
    """Longer data is consumed, and NBD_REP_ERR_TOO_BIG."""
    option_data_drop: int = MIB
    """Data longer than this drops the connection."""
    options_max: int = 32
    """Options of one connection; one more drops it."""
    options_per_export: int = 32
    """So many more for every export that was listed: `nbdinfo --list` asks for each."""
    queries_max: int = 256
    """Queries for meta contexts in one option; more are NBD_REP_ERR_TOO_BIG."""


class Handshake:
    """One connection's handshake.

    ``negotiated``: set when transmission begins. ``ended``: the client said NBD_OPT_ABORT; send
    what the call returned, then close. ``shutting_down``: set it, and every option but
    NBD_OPT_ABORT is NBD_REP_ERR_SHUTDOWN.
    """

    def __init__(self, catalog: Catalog, *, limits: HandshakeLimits | None = None) -> None:
        self.negotiated: Negotiated | None = None
        self.ended = False
        self.shutting_down = False
        self._catalog = catalog
        self._limits = limits or HandshakeLimits()
        self._buffer = bytearray()
        self._replies: list[bytes] = []
        self._reply_mode = ReplyMode.SIMPLE
        self._selected_for: str | None = None
        self._selected: tuple[tuple[int, str], ...] = ()
        self._options_left = self._limits.options_max
        self._exports_listed = 0
        self._answers: dict[int, _Answer] = {
            NBD_OPT_LIST: self._list,
            NBD_OPT_STARTTLS: self._starttls,
            NBD_OPT_INFO: self._info,
            NBD_OPT_GO: self._go,
            NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
            NBD_OPT_LIST_META_CONTEXT: self._list_meta_context,
            NBD_OPT_SET_META_CONTEXT: self._set_meta_context,
            NBD_OPT_EXTENDED_HEADERS: self._extended_headers,
        }
        self._conversation = self._converse()
        self._wanted = next(self._conversation)

    def greeting(self) -> bytes:
        """What the server says first."""
        flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        return pack(">QQH", NBD_MAGIC, NBD_OPTS_MAGIC, flags)

    def receive_data(self, data: bytes) -> bytes:
        """Take the client's bytes; return the replies to send. Raises ProtocolError.

        After the last option the bytes are kept for whoever goes on: ``leftover``.
        """
        self._buffer += data
        while not self._over and len(self._buffer) >= self._wanted:
            piece = bytes(self._buffer[: self._wanted])
            del self._buffer[: self._wanted]
            try:
                self._wanted = self._conversation.send(piece)
            except StopIteration:
                break
        replies = b"".join(self._replies)
        self._replies.clear()
        return replies

    @property
    def leftover(self) -> bytes:
        """Bytes after the last option, once the handshake is over."""
        return bytes(self._buffer) if self._over else b""

    @property
    def _over(self) -> bool:
        return self.ended or self.negotiated is not None

    def _converse(self) -> _Conversation:
        (client_flags,) = unpack(">I", (yield 4))
        if client_flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise ProtocolError(f"client flags {client_flags:#x} were not offered")
        while not self._over:
            magic, option, length = unpack(">QII", (yield 16))
            if magic != NBD_OPTS_MAGIC:
                raise ProtocolError(f"an option begins with IHAVEOPT, not {magic:#018x}")
            if option != NBD_OPT_EXPORT_NAME and not client_flags & NBD_FLAG_C_FIXED_NEWSTYLE:
                raise ProtocolError(f"option {option} without NBD_FLAG_C_FIXED_NEWSTYLE")
            self._count_option()
            data = yield from self._option_data(length)
            if option == NBD_OPT_EXPORT_NAME:
                self._enter_by_export_name(data, client_flags)
            elif option == NBD_OPT_ABORT:
                self._replies.append(option_reply(option, NBD_REP_ACK))
                self.ended = True
            else:
                self._replies.append(self._answer(option, data))

    def _count_option(self) -> None:
        if self._options_left == 0:
            raise ProtocolError("too many options")
        self._options_left -= 1

    def _option_data(self, length: int) -> Generator[int, bytes, bytes | None]:
        """An option's data, whole; None: it was longer than allowed, and has been skipped."""
        limit = self._limits.option_data_max
        if length > self._limits.option_data_drop:
            raise ProtocolError(f"an option of {length} bytes")
        if length <= limit:
            return (yield length)
        while length:
            length -= len((yield min(length, limit)))
        return None

    def _enter_by_export_name(self, data: bytes | None, client_flags: int) -> None:
        """NBD_OPT_EXPORT_NAME: it has no way to refuse but to drop the connection."""
        if self._reply_mode is ReplyMode.EXTENDED:
            raise ProtocolError("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
        if self.shutting_down:
            raise ProtocolError("NBD_OPT_EXPORT_NAME while the server is shutting down")
        if data is None:
            raise ProtocolError("the name in NBD_OPT_EXPORT_NAME is too long")
        try:
            name = parse_string(data, "export name")
            info = self._enter(name)
        except NegotiationError as error:
            raise ProtocolError(f"NBD_OPT_EXPORT_NAME: {error.text}") from error
        self._replies.append(pack(">QH", info.size, info.flags))
        if not client_flags & NBD_FLAG_C_NO_ZEROES:
            self._replies.append(_EXPORT_NAME_ZEROES)

    def _answer(self, option: int, data: bytes | None) -> bytes:
        """All replies to an option: the last one is NBD_REP_ACK or an error."""
        if option == NBD_OPT_SET_META_CONTEXT:
            # Whatever comes of it, the contexts selected before are gone.
            self._selected_for, self._selected = None, ()
        try:
            if self.shutting_down:
                raise NegotiationError(NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
            answer = self._answers.get(option)
            if answer is None:
                raise NegotiationError(NBD_REP_ERR_UNSUP, f"option {option} is not known here")
            if data is None:
                limit = self._limits.option_data_max
                raise NegotiationError(
                    NBD_REP_ERR_TOO_BIG, f"the option's data is longer than {limit} bytes"
                )
            replies = answer(data)
        except NegotiationError as error:
            return error_reply(option, error)
        replies.append((NBD_REP_ACK, b""))
        return b"".join(option_reply(option, kind, content) for kind, content in replies)

    def _list(self, data: bytes) -> list[Reply]:
        self._refuse_data(data)
        exports = self._catalog.list()
        more = max(0, len(exports) - self._exports_listed)
        self._exports_listed += more
        self._options_left += more * self._limits.options_per_export
        return [server_reply(name, description) for name, description in exports]

    def _starttls(self, data: bytes) -> list[Reply]:
        self._refuse_data(data)
        raise NegotiationError(NBD_REP_ERR_UNSUP, "this server has no TLS")

    def _structured_reply(self, data: bytes) -> list[Reply]:
        self._refuse_data(data)
        if self._reply_mode is ReplyMode.EXTENDED:
            raise NegotiationError(
                NBD_REP_ERR_EXT_HEADER_REQD, "extended headers were agreed on before"
            )
        if self._reply_mode is ReplyMode.STRUCTURED:
            raise invalid("structured replies were agreed on before")
        self._reply_mode = ReplyMode.STRUCTURED
        return []

    def _extended_headers(self, data: bytes) -> list[Reply]:
        self._refuse_data(data)
        if self._reply_mode is ReplyMode.EXTENDED:
            raise invalid("extended headers were agreed on before")
        self._reply_mode = ReplyMode.EXTENDED
        return []

    def _list_meta_context(self, data: bytes) -> list[Reply]:
        # Before structured replies a server may refuse this; a list does no harm.
        name, queries = parse_meta_context(data, self._limits.queries_max)
        offered = self._catalog.info(name).contexts
        return [meta_context_reply(0, context) for context in list_contexts(offered, queries)]

    def _set_meta_context(self, data: bytes) -> list[Reply]:
        if self._reply_mode is ReplyMode.SIMPLE:
            raise invalid("meta contexts need structured replies or extended headers")
        name, queries = parse_meta_context(data, self._limits.queries_max)
        selected = select_contexts(self._catalog.info(name).contexts, queries)
        self._selected_for, self._selected = name, tuple(enumerate(selected, 1))
        return [meta_context_reply(context_id, context) for context_id, context in self._selected]

    def _info(self, data: bytes) -> list[Reply]:
        name, wanted = parse_info(data)
        return _describe(self._as_told(self._catalog.info(name)), wanted)

    def _go(self, data: bytes) -> list[Reply]:
        name, wanted = parse_info(data)
        return _describe(self._enter(name), wanted)

    def _enter(self, name: str) -> ExportInfo:
        """Open the export: what follows is transmission."""
        info, export = self._catalog.open(name)
        info = self._as_told(info)
        contexts = self._selected if name == self._selected_for else ()
        self.negotiated = Negotiated(
            export,
            info,
            self._reply_mode,
            tuple(pair for pair in contexts if pair[1] in info.contexts),
        )
        return info

    def _as_told(self, info: ExportInfo) -> ExportInfo:
        """``info`` with the flags that depend on what was agreed before."""
        flags = info.flags
        if self._reply_mode is not ReplyMode.SIMPLE:
            flags |= NBD_FLAG_SEND_DF
        if self._reply_mode is ReplyMode.EXTENDED and info.contexts:
            flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD
        return replace(info, flags=flags)

    def _refuse_data(self, data: bytes) -> None:
        if data:
            raise invalid(f"this option has no data; {len(data)} bytes came with it")


def _describe(info: ExportInfo, wanted: frozenset[int]) -> list[Reply]:
    """Replies to NBD_OPT_INFO and NBD_OPT_GO: what was asked for, and always NBD_INFO_EXPORT."""
    replies = [info_export(info.size, info.flags)]
    if NBD_INFO_NAME in wanted:
        replies.append(info_name(info.name))
    if NBD_INFO_DESCRIPTION in wanted and info.description:
        replies.append(info_description(info.description))
    if NBD_INFO_BLOCK_SIZE in wanted:
        replies.append(
            info_block_size(info.block_minimum, info.block_preferred, info.block_maximum)
        )
    return replies
