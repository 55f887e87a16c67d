"""A client on a running server's socket: it says what it likes, and reads as a strict one does."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType

from tests.nbd import wire

EXPORT_NAME, ABORT, LIST = 1, 2, 3
INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(6, 12)
TIMEOUT_S = 30.0
CONTEXTS = ("base:allocation",)


class Raw:
    """A connected socket, after the greeting."""

    def __init__(self, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.socket.settimeout(timeout_s)
            self.socket.connect(str(path))
            self.greeting_flags = wire.parse_greeting(self.receive(18))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(f"the server closed after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def until_closed(self) -> bytes:
        """What still comes, up to the server's close."""
        data = bytearray()
        try:
            while piece := self.socket.recv(1 << 20):
                data += piece
        except ConnectionResetError:
            pass
        return bytes(data)

    def say(self, number: int, data: bytes = b"") -> list[wire.OptionReply]:
        """All replies to an option."""
        self.send(wire.option(number, data))
        replies: list[wire.OptionReply] = []
        while not replies or not (replies[-1].kind == wire.ACK or replies[-1].is_error):
            head = self.receive(20)
            body = self.receive(int.from_bytes(head[16:], "big"))
            replies += wire.parse_option_replies(head + body)
            wire.require(replies[-1].option == number, "a reply to another option")
        return replies


class Client(Raw):
    """In an export; ``mode`` is wire.SIMPLE, STRUCTURED or EXTENDED."""

    def __init__(
        self,
        path: Path,
        export: str,
        mode: str,
        *,
        contexts: tuple[str, ...] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(path, timeout_s=timeout_s)
        try:
            self._negotiate(export, mode, contexts)
        except BaseException:
            self.close()
            raise

    def _negotiate(self, export: str, mode: str, contexts: tuple[str, ...]) -> None:
        self.mode = mode
        self.extended = mode == wire.EXTENDED
        self.send(wire.client_flags())
        if mode != wire.SIMPLE:
            agreed = self.say(EXTENDED_HEADERS if self.extended else STRUCTURED_REPLY)
            wire.require(agreed[-1].kind == wire.ACK, f"the server has no {mode} replies")
        self.context_ids: tuple[int, ...] = ()
        if contexts:
            replies = self.say(SET_META_CONTEXT, wire.meta_data(export, *contexts))
            self.context_ids = tuple(number for number, _ in wire.parse_contexts(replies))
        self.info = wire.parse_infos(self.say(GO, wire.info_data(export, 3)))
        self.reader = wire.ReplyReader(mode, data_max=64 << 20)
        self._replies: list[wire.Reply] = []

    def asked(
        self,
        command: int,
        cookie: int,
        offset: int,
        length: int,
        flags: int,
        *,
        filtered: bool = False,
    ) -> None:
        """Note what was asked for in other ways than by ``ask``."""
        ids = self.context_ids if command == wire.BLOCK_STATUS else ()
        if filtered:
            ids = ids[:1]
        self.reader.asked(command, cookie, offset, length, flags=flags, contexts=ids)

    def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        cookie: int = 1,
        flags: int = 0,
        payload: bytes = b"",
    ) -> wire.Reply:
        """Send one request and wait for its reply."""
        self.asked(command, cookie, offset, length, flags)
        self.send(
            wire.request(
                command,
                cookie,
                offset,
                length,
                flags=flags,
                payload=payload,
                extended=self.extended,
            )
        )
        return self.reply()

    def reply(self) -> wire.Reply:
        """The next reply that is complete."""
        while not self._replies:
            data = self.socket.recv(1 << 20)
            if not data:
                raise EOFError("the server closed, and a reply is missing")
            self._replies += self.reader.feed(data)
        return self._replies.pop(0)
