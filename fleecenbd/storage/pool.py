"""Threads for the system calls that may block, and their results' way back to the loop.

Each device has a pool of its own, and thereby each role: a temp image whose disk hangs may fill
its pool, and no guest's disk waits for one of its threads.

    run() ──queue──▶ thread: function(*arguments) ──outbox──▶ one wake-up ──▶ many futures

Why not concurrent.futures: it joins its threads when the interpreter ends, so that one hung
system call would keep the process from ending. These threads are daemons, and nobody joins them.

Order rules
    * A thread is started when there are more unfinished calls than threads, up to ``size_max``;
      it ends after ``IDLE_S`` without a call, or when the pool is closed.
    * ``close(last)`` takes no more calls; ``last`` runs in a thread once the last call has ended:
      in the caller's own if there is none and none can be started, for it must run.
    * A thread puts its result into the outbox *before* it looks whether a wake-up is on its way;
      the loop notes that the wake-up has arrived *before* it empties the outbox. So no result
      is left behind, without a lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

from fleecenbd.storage.errors import closed_error, no_thread_error

logger = logging.getLogger(__name__)

SIZE_MAX = 16
"""Threads per pool, by default."""

IDLE_S = 10.0
"""Seconds after which a thread with nothing to do ends."""

Result = TypeVar("Result")


class _Outbox:
    """Results on their way to one event loop: many results, one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._results: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._waking = False

    def put(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        """Called by a pool thread."""
        self._results.append((future, result, error))
        if self._waking:
            return
        self._waking = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop was closed: nobody is left to be told.
            self._results.clear()

    def _deliver(self) -> None:
        self._waking = False
        results = self._results
        while results:
            future, result, error = results.popleft()
            if future.done():  # cancelled by its owner; the call went on
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


_Call: TypeAlias = tuple[_Outbox, "asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class ThreadPool:
    """Daemon threads that run the blocking calls of one device in one role."""

    def __init__(
        self, name: str, role: str, *, size_max: int = SIZE_MAX, idle_s: float = IDLE_S
    ) -> None:
        """``name`` is the device's, for messages; ``role`` stands in the threads' names too."""
        assert size_max > 0, "a pool needs a thread"
        self.name = name
        self.role = role
        self.size_max = size_max
        self._idle_s = idle_s
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._outbox: _Outbox | None = None
        self._lock = threading.Lock()
        # Under the lock:
        self._size = 0  # threads
        self._unfinished = 0  # calls queued or running
        self._last: Callable[[], None] | None = None  # set once closing
        self._closed = False  # `last` has ended
        self._waiters: list[tuple[_Outbox, asyncio.Future[None]]] = []

    @property
    def size(self) -> int:
        """Threads at the moment."""
        return self._size

    @property
    def unfinished(self) -> int:
        """Calls queued or running."""
        return self._unfinished

    def run(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Call ``function(*arguments)`` in a thread; the future belongs to the running loop.

        Cancelling the future does not stop the call. Raises OSError: EBADF once closed, EAGAIN
        where there is no thread and none can be started.
        """
        outbox = self._outbox_of_running_loop()
        future: asyncio.Future[Result] = outbox.loop.create_future()
        with self._lock:
            if self._last is not None:
                raise closed_error(self.name)
            if not self._enqueue((outbox, future, function, arguments)):
                raise no_thread_error(self.name)
        return future

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Take no more calls; run ``last`` in a thread once the last call has ended.

        Needs no event loop, waits for nothing (but ``last``, where no thread can be started to
        run it), raises nothing, and does nothing the second time.
        """
        with self._lock:
            if self._last is not None:
                return
            self._last = last
            # Whoever ends last runs `last`: perhaps this very entry.
            has_thread = self._enqueue(None)
        if not has_thread:
            self._finish(last)

    async def wait_closed(self) -> None:
        """Return when the last call, and what was given to ``close``, have ended."""
        outbox = self._outbox_of_running_loop()
        future: asyncio.Future[None] = outbox.loop.create_future()
        with self._lock:
            if self._closed:
                return
            self._waiters.append((outbox, future))
        await future

    def _outbox_of_running_loop(self) -> _Outbox:
        loop = asyncio.get_running_loop()
        outbox = self._outbox
        if outbox is None or outbox.loop is not loop:
            # Results of calls that another loop began still go to that loop's outbox.
            outbox = self._outbox = _Outbox(loop)
        return outbox

    def _enqueue(self, call: _Call | None) -> bool:
        """Queue one call (None: the mark of ``close``); the lock is held.

        False: it is not queued, for there is no thread (and so no call either), and none can be
        started: the process has as many as it may, or no memory for one more.
        """
        if self._unfinished >= self._size and self._size < self.size_max:
            try:
                threading.Thread(
                    target=self._work, name=f"{self.role} {self.name}", daemon=True
                ).start()
                self._size += 1
            except RuntimeError:
                if self._size == 0:
                    return False
        self._unfinished += 1
        self._queue.put(call)
        return True

    def _work(self) -> None:
        while True:
            try:
                call = self._queue.get(timeout=self._idle_s)
            except Empty:
                with self._lock:
                    if self._unfinished < self._size:
                        self._size -= 1
                        return
                continue  # a call is on its way to this thread
            if call is None:
                if self._closed:
                    with self._lock:
                        self._size -= 1
                    return
                last, ends = self._ended()
            else:
                outbox, future, function, arguments = call
                result: Any = None
                failure: BaseException | None = None
                try:
                    result = function(*arguments)
                except BaseException as error:
                    failure = error
                # Counted before it is told: whoever then calls again finds this thread free.
                last, ends = self._ended()
                outbox.put(future, result, failure)
                # Nothing is kept alive while waiting for the next call.
                del call, outbox, future, function, arguments, result, failure
            if last is not None:
                self._finish(last)
            if ends:
                return

    def _ended(self) -> tuple[Callable[[], None] | None, bool]:
        """Count a call that has ended: (what to run now that all have, the thread ends)."""
        with self._lock:
            self._unfinished -= 1
            if self._last is None:
                return None, False
            if self._size > self._unfinished:
                self._size -= 1
                return (self._last if self._unfinished == 0 else None), True
            return None, False

    def _finish(self, last: Callable[[], None]) -> None:
        """Run by the thread that ended the last call of a closing pool. Raises nothing."""
        try:
            last()
        except Exception as error:
            logger.error(
                "%s (%s) was not closed as it should be", self.name, self.role, exc_info=error
            )
        finally:
            with self._lock:
                self._closed = True
                for _ in range(self._size):
                    self._queue.put(None)  # idle threads end now
                waiters, self._waiters = self._waiters, []
            for outbox, future in waiters:
                outbox.put(future, None, None)
