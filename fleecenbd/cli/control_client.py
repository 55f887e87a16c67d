"""The client's end of the control socket: one call after the other, errors as one line.

Where the socket is: ``--control``, else FLEECENBD_CONTROL, else beside the default Unix socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable
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
        path = "/".join(quote(word, safe="") for word in words)
        # Names are quoted already.
        url = f"http://fleecenbd/v1/{path}" + (f"?result={result}" if result is not None else "")
        data = None if body is None else msgspec.json.encode(body)
        total_s = LOOK_TIMEOUT_S if method == "GET" else ANSWER_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(total=total_s, connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, URL(url, encoded=True), data=data, timeout=timeout
            ) as answer:
                content = await answer.read()
                status = answer.status
        except TimeoutError:
            raise CommandError(
                f"no answer from the server at {self.path} in time: it is stopped (SIGSTOP, a "
                "debugger), or hangs; look at its process and its log, and ask again"
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise CommandError(_no_server(self.path, error.errno)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise CommandError(_no_http(self.path, error)) from None
        if status == 204:
            return None
        try:
            decoded = msgspec.json.decode(content)
        except msgspec.DecodeError:
            raise CommandError(
                f"{self.path}: no control socket of fleecenbd answers there"
            ) from None
        if status >= 400:
            told = decoded.get("error") if isinstance(decoded, dict) else None
            raise CommandError(one_line(str(told or f"the server answered with status {status}")))
        return decoded


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
