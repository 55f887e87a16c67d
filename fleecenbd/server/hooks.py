"""Commands that freeze and thaw a guest's file systems around arming.

A hook is a shell command in a process group of its own, with a deadline: past it the whole group
is killed, whatever it has started. What it wrote to standard output and error goes into the
message of a failure.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

Started = TypeVar("Started")

HOOK_TIMEOUT_S = 30.0
"""Seconds that a hook may take, by default."""
OUTPUT_SHOWN_MAX = 300
"""Characters of a hook's output that a message shows."""
_OUTPUT_READ_MAX = 64 << 10
_PIPE_READS_MAX = 32
"""A pipe holds 1 MiB at most, without the help of root."""
_KILLED_WAIT_S = 1.0
"""Seconds to wait for what was killed: a process in a system call that hangs stays."""


@dataclass(frozen=True)
class Hooks:
    """The server's own commands, for sessions that name none."""

    freeze: str | None = None
    thaw: str | None = None
    timeout_s: float = HOOK_TIMEOUT_S


async def run_hook(
    what: str, command: str, *, timeout_s: float, environment: Mapping[str, str]
) -> None:
    """Run the command by ``sh -c``; return when it has succeeded.

    ``what``: what to call it, "the freeze command". ``environment``: variables besides ours.
    Raises OSError: ETIMEDOUT when it was killed at its deadline, EIO when it failed. Cancelled,
    it kills the group too.
    """
    variables = {**os.environ, **environment}
    variables.pop("NOTIFY_SOCKET", None)
    # A pipe of our own: asyncio takes a process for ended when its pipes are at their end, which
    # what it leaves in the background may hold open.
    reading, writing = os.pipe()
    try:
        output = _Output(reading)
        process, cancelled = await to_its_end(
            asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=asyncio.subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        )
    except BaseException:
        output.close()
        raise
    finally:
        os.close(writing)
    ended = asyncio.ensure_future(process.wait())
    try:
        if cancelled is not None:
            raise cancelled
        await asyncio.wait({ended}, timeout=timeout_s)
        if not ended.done():
            raise OSError(
                errno.ETIMEDOUT,
                f"{what} had not ended after {timeout_s:g} s, and was killed: {command}",
            )
        status = ended.result()
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise OSError(errno.EIO, f"{what} failed with {how}: {output.text() or command}")
    finally:
        if not ended.done():
            await _kill_group(process.pid, ended)
        output.close()


async def to_its_end(
    start: Awaitable[Started],
) -> tuple[Started, asyncio.CancelledError | None]:
    """What was started, and what cancelled us meanwhile: then it is to be killed."""
    starting = asyncio.ensure_future(start)
    cancelled = None
    while not starting.done():
        try:
            await asyncio.wait({starting})
        except asyncio.CancelledError as error:
            cancelled = error
    return starting.result(), cancelled


async def _kill_group(group: int, ended: asyncio.Future[int]) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        logger.error("what the hook became (sudo, perhaps) is another user's: it cannot be killed")
    await asyncio.wait({ended}, timeout=_KILLED_WAIT_S)
    if not ended.done():
        logger.error("process %d, a hook's, has not ended", group)
    ended.cancel()


class _Output:
    """The last words of a command, from a pipe that is read all the while."""

    def __init__(self, reading: int) -> None:
        self._reading = reading
        self._kept = b""
        os.set_blocking(reading, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(reading, self._read)
        self._at_end = False

    def _read(self) -> bool:
        """Read once; False: there is nothing now, or no more."""
        try:
            data = os.read(self._reading, _OUTPUT_READ_MAX)
        except BlockingIOError:
            return False
        if not data:
            self._at_end = True
            self._loop.remove_reader(self._reading)
        self._kept = (self._kept + data)[-4 * OUTPUT_SHOWN_MAX :]
        return bool(data)

    def text(self) -> str:
        """What has come, on one line; the process has ended."""
        reads = 0
        while not self._at_end and reads < _PIPE_READS_MAX and self._read():
            reads += 1
        return " ".join(self._kept.decode(errors="replace").split())[-OUTPUT_SHOWN_MAX:]

    def close(self) -> None:
        if not self._at_end:
            self._loop.remove_reader(self._reading)
        os.close(self._reading)
