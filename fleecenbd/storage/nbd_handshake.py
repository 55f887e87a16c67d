"""From an NBD URI to a libnbd handle that commands can be sent on, without blocking the loop.

    URI ──▶ connecting ──▶ negotiating ──▶ NBD_OPT_GO ──▶ ready

Of all that, only a name's resolution runs in a thread. NBD_OPT_GO is a step of its own (libnbd's
opt mode), or the server's refusal could not be told from a hang-up.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fleecenbd.storage.libnbd import nbd
from fleecenbd.storage.nbd_errors import (
    NbdRefused,
    ServerTexts,
    closed_while_connecting,
    connect_error,
    go_error,
    refusal_text,
)

CONNECT_TIMEOUT_S = 30.0
"""Seconds from the name's resolution to the end of the handshake."""
PAYLOAD_MAX = 32 << 20
"""Bytes of one READ or WRITE, where the server does not say less."""

KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 3
UNACKNOWLEDGED_MAX_S = 60
"""A TCP peer that has vanished without a word is found out in a minute."""


@dataclass(frozen=True)
class NbdFacts:
    """What was agreed on with the server."""

    size: int
    block_size_min: int
    block_size_preferred: int
    """Bytes; 1 and 0 where the server does not say."""
    payload_max: int
    """Bytes of one READ or WRITE."""
    description: str
    contexts: frozenset[str]
    is_read_only: bool
    can_trim: bool
    can_zero: bool
    can_fast_zero: bool
    can_flush: bool
    can_multi_conn: bool
    is_tls: bool


async def connected_handle(uri: str, contexts: Iterable[str], texts: ServerTexts) -> Any:
    """A handle that is ready for commands, and that logs to ``texts``. Raises OSError."""
    handle = _new_handle(contexts, texts)
    failure: OSError
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await _shake_hands(uri, handle, texts)
        return handle
    except nbd.Error as error:
        failure = connect_error(error, texts, uri)
    except TimeoutError:
        text = f"the server did not answer within {CONNECT_TIMEOUT_S:g} s"
        failure = OSError(errno.ETIMEDOUT, text, uri)
    except OSError as error:
        failure = error
    # Whoever keeps the failure must not keep the handle, which holds the connection open.
    del handle
    raise failure.with_traceback(None)


def _new_handle(contexts: Iterable[str], texts: ServerTexts) -> Any:
    handle = nbd.NBD()
    handle.set_debug_callback(texts)
    handle.set_debug(True)
    handle.set_opt_mode(True)  # or the reply to NBD_OPT_GO could not be told from a hang-up
    handle.set_full_info(True)
    handle.set_uri_allow_local_file(True)  # nbds://…?tls-psk-file=
    # A reply that leaves out a part of what was asked for is an error (see the top of this file).
    handle.set_pread_initialize(False)
    for context in contexts:
        handle.add_meta_context(context)
    return handle


async def _shake_hands(uri: str, handle: Any, texts: ServerTexts) -> None:
    """Up to the moment at which commands can be sent. Raises OSError, nbd.Error."""
    if _has_name_to_resolve(uri):
        # libnbd calls getaddrinfo, which blocks. (A name that is replaced by its address here
        # would no longer be the one in the server's certificate.)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, handle.aio_connect_uri, uri)
    else:
        handle.aio_connect_uri(uri)
    outcome: list[int] = []

    def has_gone(error: Any) -> int:
        outcome.append(error.value)
        return 1

    is_asked = False
    while not handle.aio_is_ready():
        if outcome and outcome[0]:
            await _ask_why(handle, outcome[0], texts, uri)
            continue  # it is there by now
        if handle.aio_is_dead() or handle.aio_is_closed():
            wants_tls = uri.startswith("nbds") and not handle.get_tls_negotiated()
            raise closed_while_connecting(wants_tls, texts, uri)
        if handle.aio_is_negotiating() and not is_asked:
            is_asked = True
            handle.aio_opt_go(has_gone)
            continue
        is_readable = await _wait_until_ready(handle)
        if is_readable:
            handle.aio_notify_read()
        else:
            handle.aio_notify_write()


async def _ask_why(handle: Any, number: int, texts: ServerTexts, uri: str) -> None:
    """Raise what NBD_OPT_GO was refused with; ``number`` is what libnbd makes of the reply.

    Of libnbd 1.14 the text is known by now. 1.22 hands it out with the exception of a call that
    waits for the reply, and with nothing else: so it is asked again, in a thread. Returns if the
    export is there now.
    """
    text = texts.take()
    if text is None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, handle.opt_go)
        except nbd.Error as error:
            text = refusal_text(error)
        else:
            return
    # A server that insists on TLS refuses structured replies as it refuses everything.
    is_plain = not handle.get_tls_negotiated()
    refuses_all = is_plain and not handle.get_structured_replies_negotiated()
    raise go_error(number, text, refuses_all, uri)


async def _wait_until_ready(handle: Any) -> bool:
    """Wait for what libnbd waits for: True for something to read, False for room to write."""
    loop = asyncio.get_running_loop()
    direction = handle.aio_get_direction()
    with duplicate_socket(handle) as ready_socket:
        descriptor = ready_socket.fileno()
        ready: asyncio.Future[bool] = loop.create_future()

        def is_ready(readable: bool) -> None:
            if not ready.done():
                ready.set_result(readable)

        try:
            if direction & nbd.AIO_DIRECTION_READ:
                loop.add_reader(descriptor, is_ready, True)
            if direction & nbd.AIO_DIRECTION_WRITE:
                loop.add_writer(descriptor, is_ready, False)
            return await ready
        finally:
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)


def _has_name_to_resolve(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        if parts.scheme not in ("nbd", "nbds"):
            return False
        ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return True
    return False


def duplicate_socket(handle: Any) -> socket.socket:
    """libnbd's socket, to be watched: it stays what it is when libnbd closes its own."""
    return socket.socket(fileno=os.dup(handle.aio_get_fd()))


def keep_alive(of: socket.socket) -> None:
    """Let the kernel look after a TCP peer that says nothing."""
    if of.family in (socket.AF_INET, socket.AF_INET6):
        of.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
        of.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MAX_S * 1000)


def _size_of(handle: Any, uri: str) -> int:
    """libnbd's number is a signed one, and -1 is its mark of an error."""
    try:
        size: int = handle.get_size()
    except nbd.Error:
        size = -1
    if size < 0:
        raise NbdRefused(errno.EOVERFLOW, "the server tells of a disk of 8 EiB or more", uri)
    return size


def facts_of(handle: Any, uri: str) -> NbdFacts:
    """What a handle that is connected knows. Raises NbdRefused."""
    asked = [handle.get_meta_context(index) for index in range(handle.get_nr_meta_contexts())]
    try:
        description = handle.get_export_description()
    except nbd.Error:
        description = ""  # none was told
    is_read_only = handle.is_read_only()
    return NbdFacts(
        size=_size_of(handle, uri),
        block_size_min=handle.get_block_size(nbd.SIZE_MINIMUM) or 1,
        block_size_preferred=handle.get_block_size(nbd.SIZE_PREFERRED),
        payload_max=min(handle.get_block_size(nbd.SIZE_MAXIMUM) or PAYLOAD_MAX, PAYLOAD_MAX),
        description=description,
        contexts=frozenset(name for name in asked if handle.can_meta_context(name)),
        is_read_only=is_read_only,
        can_trim=handle.can_trim() and not is_read_only,
        can_zero=handle.can_zero() and not is_read_only,
        can_fast_zero=handle.can_fast_zero() and not is_read_only,
        can_flush=handle.can_flush(),
        can_multi_conn=handle.can_multi_conn(),
        is_tls=handle.get_tls_negotiated(),
    )
