"""What a handshake asks the server for, and what it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from fleecenbd.nbd.validation import RequestRules


class ReplyMode(Enum):
    """How requests and replies look on the wire, as agreed."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass(frozen=True)
class ExportInfo:
    """What a client is told about an export.

    ``size`` in bytes. ``flags``: transmission flags; NBD_FLAG_SEND_DF and
    NBD_FLAG_BLOCK_STATUS_PAYLOAD are the handshake's to add. ``block_*``: bytes; ``minimum``
    and ``preferred`` are powers of two, ``preferred`` at least 512, ``maximum`` a multiple of
    both. ``contexts``: names of the meta contexts on offer.
    """

    name: str
    description: str
    size: int
    flags: int
    block_minimum: int
    block_preferred: int
    block_maximum: int
    contexts: tuple[str, ...] = ()
    read_once_context: str | None = None
    """Who has selected this meta context may set FLEECENBD_CMD_FLAG_READ_ONCE; None: nobody."""
    can_write: bool = True
    """False: NBD_CMD_WRITE is refused, and its payload is not kept: a read-only disk, and what is
    not called read-only because clients do not TRIM what is."""


class Catalog(Protocol):
    """What the server offers. Each call may raise NegotiationError, which is sent as it is."""

    def list(self) -> Sequence[tuple[str, str]]:
        """(name, description) of every export that may be listed."""

    def info(self, name: str) -> ExportInfo:
        """The export of this name; "" is the default one."""

    def open(self, name: str) -> tuple[ExportInfo, object]:
        """As ``info``, and the export itself: this client has taken its place there."""


@dataclass
class Negotiated:
    """What a handshake ended with.

    ``export``: what ``Catalog.open`` gave. ``info``: with the flags that the client was told.
    ``contexts``: (id, name) of those that it selected and that hold for this export.
    """

    export: object
    info: ExportInfo
    reply_mode: ReplyMode
    contexts: tuple[tuple[int, str], ...]

    def request_rules(self) -> RequestRules:
        """The rules that this connection's requests are checked by."""
        return RequestRules(
            flags=self.info.flags,
            size=self.info.size,
            extended=self.reply_mode is ReplyMode.EXTENDED,
            structured=self.reply_mode is not ReplyMode.SIMPLE,
            contexts=bool(self.contexts),
            context_ids=tuple(context_id for context_id, _ in self.contexts),
            block_minimum=self.info.block_minimum,
            can_write=self.info.can_write,
            read_once=any(name == self.info.read_once_context for _, name in self.contexts),
        )
