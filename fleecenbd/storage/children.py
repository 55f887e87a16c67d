"""Programs of ours that must not outlive us: started by one thread that lives as long as we do.

The kernel sends a child the signal that it asked for (setpriv --pdeathsig) when the *thread* that
started it has ended, so a pool's thread will not do, and the loop's would have to wait for exec,
which reads from a disk.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import IO, Any, TypeAlias

_Start: TypeAlias = Callable[[], None]

_lock = threading.Lock()
_queue: SimpleQueue[_Start] | None = None


def _serve(queue: SimpleQueue[_Start]) -> None:
    while True:
        queue.get()()


async def start_child(
    command: Sequence[str], *, stderr: IO[bytes], signal: str = "TERM"
) -> subprocess.Popen[bytes]:
    """Start it, in a session of its own; it gets ``signal`` when this process has ended.

    Raises OSError. Who cancels this leaves a child that nobody knows until the end: so don't.
    """
    global _queue
    found = shutil.which("setpriv") is not None
    words = ("setpriv", "--pdeathsig", signal, "--", *command) if found else tuple(command)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[subprocess.Popen[bytes]] = loop.create_future()

    def start() -> None:
        result: Any
        try:
            result = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                start_new_session=True,
            )
            loop.call_soon_threadsafe(_set, future, result, None)
        except OSError as error:
            loop.call_soon_threadsafe(_set, future, None, error)

    with _lock:
        if _queue is None:
            _queue = SimpleQueue()
            threading.Thread(target=_serve, args=(_queue,), name="children", daemon=True).start()
    _queue.put(start)
    return await asyncio.shield(future)


def _set(
    future: asyncio.Future[subprocess.Popen[bytes]],
    result: subprocess.Popen[bytes] | None,
    error: OSError | None,
) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        assert result is not None, "one of the two"
        future.set_result(result)
