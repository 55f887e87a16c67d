"""The client's end of the control socket: one call after the other, errors as one line.

Where the socket is: ``--control``, else FLEECENBD_CONTROL, else beside the default Unix socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from fleecenbd.cli.errors import CommandError, UsageError, one_line
from fleecenbd.cli.places import CONTROL_SUFFIX, default_control, default_socket

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
"""Seconds: arming, and both hooks, take less."""
LOOK_TIMEOUT_S = 15.0
"""Seconds that a call that only looks may take: a server that is there answers it at once."""
SILENCE_S = 60.0
"""Seconds without a line of events: a server that is there sends one every 15."""
NBD_GREETING = b"NBDMAGIC"


def control_path(given: str | None) -> str:
    """The control socket's path. Raises UsageError where there is none by default."""
    path = given or os.environ.get("FLEECENBD_CONTROL")
    if path:
        return path
    try:
        return default_control(str(default_socket(os.environ, os.geteuid())))
    except UsageError:
        raise UsageError(
            "there is no default control socket: XDG_RUNTIME_DIR is not set; "
            "say where the server's is with --control or FLEECENBD_CONTROL"
        ) from None


class ControlClient:
    """Calls to one server."""

    def __init__(self, path: str, session: aiohttp.ClientSession) -> None:
        self.path = path
        self._session = session

    async def call(
        self, method: str, *words: str, body: Any = None, result: str | None = None
    ) -> Any:
        """One call, ``/v1/WORD/WORD``; its answer as plain values. Raises CommandError."""
        total_s = LOOK_TIMEOUT_S if method == "GET" else ANSWER_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(total=total_s, connect=CONNECT_TIMEOUT_S)
        with self._one_line_errors():
            async with self._session.request(
                method,
                _url(*words, result=result),
                data=None if body is None else msgspec.json.encode(body),
                timeout=timeout,
            ) as answer:
                content = await answer.read()
                status = answer.status
        if status == 204:
            return None
        decoded = self._decoded(content)
        if status >= 400:
            raise CommandError(_refusal(status, decoded))
        return decoded

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """What happens from the moment on at which this is entered, until the server stops.

        Raises CommandError, also where the server has died, or says nothing for so long that it
        must be taken for hanging.
        """
        timeout = aiohttp.ClientTimeout(connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S)
        with self._one_line_errors():
            answer = await self._session.get(_url("events"), timeout=timeout)
        # Nothing of the caller's is taken for the server's: it writes, too, and that may fail.
        async with answer:
            if answer.status >= 400:
                with self._one_line_errors():
                    content = await answer.read()
                raise CommandError(_refusal(answer.status, self._decoded(content)))
            yield self._told(answer)

    async def _told(self, answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        with self._one_line_errors():
            async for line in answer.content:
                if line.strip():  # an empty one: the server is there
                    event = self._decoded(line)
                    if not isinstance(event, dict) or "event" not in event:
                        raise CommandError(self._stranger())
                    yield event

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise CommandError(
                f"no answer from the server at {self.path} in time: it is stopped (SIGSTOP, a "
                "debugger), or hangs; look at its process and its log, and ask again"
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise CommandError(_no_server(self.path, error.errno)) from None
        except aiohttp.ClientPayloadError:
            raise CommandError(
                f"the server at {self.path} went away in the middle of its answer: it was killed, "
                "or has crashed; its log may say why"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise CommandError(_no_http(self.path, error)) from None

    def _decoded(self, content: bytes) -> Any:
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError:
            raise CommandError(self._stranger()) from None

    def _stranger(self) -> str:
        return f"{self.path}: no control socket of fleecenbd answers there"


def _url(*words: str, result: str | None = None) -> URL:
    path = "/".join(quote(word, safe="") for word in words)
    query = f"?result={result}" if result is not None else ""
    # Names are quoted already.
    return URL(f"http://fleecenbd/v1/{path}{query}", encoded=True)


def _refusal(status: int, answer: Any) -> str:
    told = answer.get("error") if isinstance(answer, dict) else None
    return one_line(str(told or f"the server answered with status {status}"))


def call_server(given: str | None, work: Callable[[ControlClient], Awaitable[Result]]) -> Result:
    """Do the work with a client of the server at ``given``, or at the default place."""
    return asyncio.run(with_client(given, work))


async def with_client(
    given: str | None, work: Callable[[ControlClient], Awaitable[Result]]
) -> Result:
    """The same, on the loop that runs."""
    path = control_path(given)
    connector = aiohttp.UnixConnector(path=path)
    async with aiohttp.ClientSession(connector=connector) as session:
        return await work(ControlClient(path, session))


def _no_server(path: str, number: int | None) -> str:
    start = "start one (fleecenbd serve), or say where it is with --control or FLEECENBD_CONTROL"
    if number == errno.ENOENT:
        return f"no server is there: {path} does not exist; {start}"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: no right to control this server; run as its user, or as root"
    if number == errno.EPROTOTYPE:
        return f"{path} is no control socket of fleecenbd: it is no stream socket"
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        is_socket = True
    if not is_socket:
        return f"{path} is no socket; name the control socket, PATH{CONTROL_SUFFIX} by default"
    if number == errno.ECONNREFUSED:
        return f"no server is there: nobody listens on {path} any more; {start}"
    return f"{path}: {os.strerror(number) if number else 'it cannot be reached'}; {start}"


def _no_http(path: str, error: Exception) -> str:
    """What answers is no HTTP, or has broken off."""
    if _greeting(path).startswith(NBD_GREETING):
        return (
            f"{path} is an NBD socket, not a control socket; "
            f"that is {path}{CONTROL_SUFFIX} by default"
        )
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return f"the server at {path} went away before it had answered; ask again"
    return f"{path}: no control socket of fleecenbd answers there"


def _greeting(path: str) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            sock.connect(path)
            return sock.recv(len(NBD_GREETING))
    except OSError:
        return b""
