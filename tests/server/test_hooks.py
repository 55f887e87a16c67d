"""Freeze and thaw commands: failures are told, and what hangs is killed, with its children."""

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from fleecenbd.server import hooks
from fleecenbd.server.hooks import run_hook

WHAT = "the freeze command"


async def test_a_hook_gets_its_variables(tmp_path: Path) -> None:
    command = f"printf '%s' \"$FLEECENBD_SESSION\" > {tmp_path}/seen"
    await run_hook(WHAT, command, timeout_s=10, environment={"FLEECENBD_SESSION": "nightly"})
    assert (tmp_path / "seen").read_text() == "nightly"


async def test_a_hook_that_fails_is_told_with_its_status_and_its_words() -> None:
    with pytest.raises(OSError, match="the freeze command failed with status 3: no agent") as told:
        await run_hook(WHAT, "echo no agent >&2; exit 3", timeout_s=10, environment={})
    assert told.value.errno == errno.EIO


async def test_a_hook_that_is_killed_by_somebody_is_told_with_the_signal() -> None:
    with pytest.raises(OSError, match="failed with signal 9"):
        await run_hook(WHAT, "kill -9 $$", timeout_s=10, environment={})


async def test_a_hook_that_says_much_is_read_to_its_end() -> None:
    command = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the last word; exit 1"
    with pytest.raises(OSError, match=r"x the last word$") as told:
        await run_hook(WHAT, command, timeout_s=20, environment={})
    assert len(str(told.value)) < 500


async def test_a_hook_that_hangs_is_killed_with_all_its_children(tmp_path: Path) -> None:
    """A child of it would hold a pipe's end: the pipe is at its end once they are all gone."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = f"exec 3>{fifo}; echo up >&3; (trap '' TERM; sleep 1000) & sleep 1000"
        with pytest.raises(OSError, match=r"had not ended after 0\.5 s, and was killed") as told:
            await run_hook(WHAT, command, timeout_s=0.5, environment={})
        assert told.value.errno == errno.ETIMEDOUT
        assert os.read(reader, 100) == b"up\n"
        await _at_end(reader)
    finally:
        os.close(reader)


async def test_a_hook_that_hangs_as_another_user_is_told_as_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups = []

    def refused(group: int, signal_: int) -> None:
        groups.append(group)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(hooks, "_KILLED_WAIT_S", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refused)
        with pytest.raises(OSError, match=r"had not ended after 0\.1 s") as told:
            await run_hook(WHAT, "exec sleep 1000", timeout_s=0.1, environment={})
    assert told.value.errno == errno.ETIMEDOUT
    assert "it cannot be killed" in caplog.text
    os.killpg(groups[0], signal.SIGKILL)


async def test_a_hook_whose_caller_is_cancelled_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = f"exec 3>{fifo}; echo up >&3; sleep 1000"
        hook = asyncio.ensure_future(run_hook(WHAT, command, timeout_s=60, environment={}))
        assert await _read(reader) == b"up\n"
        hook.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hook
        await _at_end(reader)
    finally:
        os.close(reader)


async def test_what_a_hook_leaves_in_the_background_holds_nobody_up(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        command = f"sleep 1000 & echo $! > {tmp_path}/pid"
        await run_hook(WHAT, command, timeout_s=60, environment={})
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def _read(reader: int) -> bytes:
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(reader, came.set)
    try:
        async with asyncio.timeout(10):
            await came.wait()
        return os.read(reader, 100)
    finally:
        loop.remove_reader(reader)


async def _at_end(reader: int) -> None:
    assert await _read(reader) == b""
