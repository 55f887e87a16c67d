"""A job's child process: commands go in, events come out, its words go to the log, and it ends.

    stdin    a line of JSON for each command; the end of stdin: stop, and keep what is durable
    stdout   a line of JSON for each event (job_events)
    stderr   to our log, a line at a time

The pipes are ours and not asyncio's: asyncio takes a process for ended when its pipes are at their
end, which what it has started (qemu-nbd) may hold open. A command is written at once or not at
all: a child that does not read its commands makes nobody wait, and nothing grow.

It has a session of its own (setsid), so that a signal for the server's group, Ctrl-C, is not one
for it; and no descriptor of ours but its pipes. (uvloop hands on every one that can be inherited,
and copies of the pipes, so it is started by subprocess, in a thread: exec reads from a disk that
may be slow. No preexec_fn, which is Python's code in a copy of a process with threads.) When this
server is killed, its stdin is at its end.

    end:   a command, or the end of stdin ─▶ SIGTERM, to it alone ─▶ SIGKILL, to its whole group
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fleecenbd.server.hooks import to_its_end
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)

LINE_LENGTH_MAX = 64 << 10
"""Bytes of a line; what is longer is cut."""
LINES_LOGGED_MAX = 200
"""Lines of one child's standard error that the log takes."""
LAST_LINES = 3
"""Lines of standard error that tell why a child ended which has not told otherwise."""
KILLED_WAIT_S = 1.0
"""Seconds to wait for what was killed: a process in a system call that hangs stays."""
_READ_LENGTH = 64 << 10
_PIPE_READS_MAX = 32
"""A pipe holds 1 MiB at most, without the help of root."""

_NOT_THE_CHILDS = (
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
)
"""Variables by which systemd speaks to one process, this one."""


def childs_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what was said to this process alone."""
    return {key: value for key, value in environment.items() if key not in _NOT_THE_CHILDS}


class JobProcess:
    """One child, from its start to its end."""

    def __init__(self, name: str, on_line: Callable[[bytes], None]) -> None:
        """``name``: what the log calls it; ``on_line``: called with each line of its stdout."""
        self.pid: int | None = None
        """None: it has not started."""
        self._name = name
        self._on_line = on_line
        self._commands: int | None = None
        """The end of its stdin that is written to."""
        self._process: subprocess.Popen[bytes] | None = None
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._logged = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    async def run(self, command: Sequence[str]) -> int:
        """Start it; return its exit status when it has ended, -n for signal n. Raises OSError.

        Cancelled, it kills the group, and does not wait for its end.
        """
        lines = [_Lines(self._on_line), _Lines(self._said)]
        try:
            await self._start(command, lines)
            status = await self._wait()
            for pipe in lines:
                pipe.read_rest()
            return status
        except BaseException:
            self._kill_group()
            raise
        finally:
            self._started.set()
            self._ended.set()
            self.close_stdin()
            for pipe in lines:
                pipe.close()

    async def _start(self, command: Sequence[str], lines: Sequence[_Lines]) -> None:
        stdin, self._commands = os.pipe()
        os.set_blocking(self._commands, False)
        theirs = [stdin]
        pool = ThreadPool(self._name, "start", size_max=1)
        try:
            theirs += [pipe.open() for pipe in lines]
            self._process, cancelled = await to_its_end(pool.run(_popen, command, *theirs))
        finally:
            pool.close()
            for descriptor in theirs:
                os.close(descriptor)
        assert self._process is not None, "it has started"
        self.pid = self._process.pid
        self._started.set()
        if cancelled is not None:
            raise cancelled

    async def _wait(self) -> int:
        assert self._process is not None, "it has started"
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(self._process.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._process.wait()

    def _said(self, line: bytes) -> None:
        text = " ".join(line.decode(errors="replace").split())
        if not text:
            return
        self._last.append(text)
        self._logged += 1
        if self._logged <= LINES_LOGGED_MAX:
            logger.info("%s: %s", self._name, text)
        elif self._logged == LINES_LOGGED_MAX + 1:
            logger.info("%s: more of its lines are not logged", self._name)

    @property
    def last_words(self) -> str:
        """The last lines of its standard error, as one."""
        return " / ".join(self._last)

    # -- while it runs ---------------------------------------------------------------------

    def send(self, command: str, **words: object) -> None:
        """Say something to it. Raises OSError: EPIPE if it has ended, EAGAIN if it hangs."""
        if self._commands is None:
            raise OSError(errno.EPIPE, f"{self._name} has ended")
        # A line is far shorter than PIPE_BUF: written whole, or not at all.
        line = json.dumps({"command": command, **words}).encode() + b"\n"
        try:
            os.write(self._commands, line)
        except BlockingIOError:
            raise OSError(
                errno.EAGAIN,
                f"{self._name} does not listen: its process ({self.pid}) hangs or is stopped; "
                "look at it, or cancel the job",
            ) from None
        except BrokenPipeError:
            raise OSError(errno.EPIPE, f"{self._name} is ending") from None

    def close_stdin(self) -> None:
        """There will be no more commands."""
        if self._commands is not None:
            os.close(self._commands)
            self._commands = None

    async def end(self, command: str | None, *, gently_s: float, term_s: float) -> bool:
        """End it, by a command or (None) by the end of its stdin; True once it has ended.

        ``gently_s``: seconds until SIGTERM; ``term_s``: from there until SIGKILL, 0: no SIGTERM.
        False: what was killed has not ended, and is left.
        """
        await self._started.wait()
        if command is None:
            self.close_stdin()
        else:
            with suppress(OSError):  # it has ended, or will be ended in another way
                self.send(command)
        if await self._ends_within(gently_s):
            return True
        if term_s and self._process is not None:
            logger.warning("%s has not ended after %g s: SIGTERM", self._name, gently_s)
            self._process.terminate()
            if await self._ends_within(term_s):
                return True
        logger.warning("%s has not ended in time: it is killed", self._name)
        self._kill_group()
        if await self._ends_within(KILLED_WAIT_S):
            return True
        logger.error(
            "%s was killed and has not ended: process %s hangs in a system call",
            self._name,
            self.pid,
        )
        return False

    async def _ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self._ended.is_set()

    def _kill_group(self) -> None:
        # Until somebody has looked for its status, its number is nobody else's.
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _popen(command: Sequence[str], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=childs_environment(os.environ),
        cwd="/",
        start_new_session=True,
    )
    with suppress(OSError):  # it has ended already, or there is no procfs
        expose(Path("/proc/self/oom_score_adj"), Path(f"/proc/{process.pid}/oom_score_adj"))
    return process


def expose(ours: Path, childs: Path) -> None:
    """Where memory is short, let the kernel kill the child rather than a server that guests need:
    it inherits the unit's OOMScoreAdjust=. Raises OSError."""
    if int(ours.read_text()) < 0:
        childs.write_text("0")


class _Lines:
    """The lines that come out of a pipe, each told as it comes."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._reading: int | None = None
        self._rest = b""
        self._is_cut = False
        """The line whose end has not come was longer than a line may be."""
        self._at_end = False
        self._loop = asyncio.get_running_loop()

    def open(self) -> int:
        """The end to write to, which is the caller's to close."""
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._loop.add_reader(self._reading, self._read)
        return writing

    def _read(self) -> bool:
        """Read once; False: there is nothing now, or no more."""
        assert self._reading is not None, "it is open"
        try:
            data = os.read(self._reading, _READ_LENGTH)
        except BlockingIOError:
            return False
        if not data:
            self._at_end = True
            self._loop.remove_reader(self._reading)
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._is_cut:
                self._on_line(line[:LINE_LENGTH_MAX])
            self._is_cut = False
        if len(rest) > LINE_LENGTH_MAX:
            if not self._is_cut:
                self._on_line(rest[:LINE_LENGTH_MAX])
            self._is_cut = True
            rest = b""
        self._rest = rest
        return bool(data)

    def read_rest(self) -> None:
        """What has come by now: the process has ended."""
        reads = 0
        while not self._at_end and reads < _PIPE_READS_MAX and self._read():
            reads += 1
        if self._rest and not self._is_cut:
            self._on_line(self._rest)
        self._rest = b""

    def close(self) -> None:
        if self._reading is not None:
            if not self._at_end:
                self._loop.remove_reader(self._reading)
            os.close(self._reading)
            self._reading = None
