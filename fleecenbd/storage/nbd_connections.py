"""Several connections to one export: requests are shared out, lost connections are made anew.

    submit ──▶ waiting ──▶ the least busy connection with room ──▶ reply
                  ▲                      │
                  └──── no reply ◀── connection lost ──▶ back-off ──▶ made anew, if it is the same

Order rules
    * A request that got no reply is sent again, on whichever connection has room: nothing that can
      be asked here does harm when it is done twice. An error reply is a reply. (A server that has
      lost the connection and nothing else may still be at it: a write could land after a later one
      to the same place. QEMU's client takes that risk too; a pull writes each place once.)
    * A connection that is made anew must lead to what the first one led to: the same size and meta
      contexts, and whatever else the owner's ``accept`` looks at. Else nothing is asked there, and
      nothing more anywhere.
    * ``generation`` is counted up before a request is sent again.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fleecenbd.storage.errors import closed_error
from fleecenbd.storage.nbd_connection import NbdConnection, NbdRequest, Send
from fleecenbd.storage.nbd_errors import NbdErrorReply, NbdLost, NbdRefused
from fleecenbd.storage.nbd_handshake import NbdFacts

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 10.0
"""Seconds before the first attempt to connect again, doubled each time, and at most."""
REQUEST_LOST_MAX = 10
"""Connections that may be lost under one request while others are answered: it may be what the
server dies of."""
LASTING_S = 10.0
"""Seconds after which a connection counts as one that works, even if nothing was asked on it."""
CLOSE_TIMEOUT_S = 10.0
"""Seconds that closing leaves to what is being written."""

Tell: TypeAlias = Callable[[str], None]
Accept: TypeAlias = Callable[[NbdFacts], None]


class NbdConnections:
    """Those of one client. To be opened first, and closed in the end, whatever ``open`` did."""

    def __init__(
        self,
        uri: str,
        contexts: Sequence[str],
        *,
        retries: int | None,
        tell: Tell,
        accept: Accept,
        lasts: bool = True,
    ) -> None:
        """``retries``: attempts in a row to connect again; None: without end, whatever they fail
        with. ``lasts`` False: the first connection that is lost is the end of all."""
        self.facts: NbdFacts
        """What was agreed on with the first connection."""
        self.size_offered = 0
        """Bytes of what the last connection that was made leads to."""
        self.generation = 0
        """Connections lost so far."""
        self.left_changing = False
        """The server has left without an answer what may change the export, and may still do it."""
        self.on_connected: Callable[[], None] = lambda: None
        """Called once there is a connection again, and as many as before."""
        self._on_failed: Callable[[OSError], None] | None = None
        self.wanted = 1
        """Connections that there are, or that are being made anew."""
        self._uri = uri
        self._contexts = tuple(contexts)
        self._retries = retries
        self._tell = tell
        self._accept = accept
        self._lasts = lasts
        self._loop = asyncio.get_running_loop()
        self._open: list[NbdConnection] = []
        self._waiting: deque[NbdRequest] = deque()
        self._attempts = 0
        """Attempts to connect again since a connection last worked: since a reply, that is."""
        self._reconnecting: asyncio.Task[None] | None = None
        self._failure: OSError | None = None
        """Why no call succeeds any more."""
        self._replied = asyncio.Event()
        self._asker: NbdConnection | None = None
        """A connection on which the server's texts are kept."""
        self._asked: NbdErrorReply | None = None
        """What is asked again there."""
        self._asking = asyncio.Lock()

    async def open(self, connections: int) -> None:
        """Make the first, and more as far as the server takes them. Raises OSError."""
        first = await self._connect()
        self.facts = first.facts
        self._take(first)
        if first.facts.can_multi_conn:
            self.wanted = connections
        while len(self._open) < self.wanted:
            try:
                connection = await self._connect()
            except OSError as error:
                self._go_on_with_fewer(error)
                return
            self._take(connection)

    async def _connect(self, *, keeps_texts: bool = False) -> NbdConnection:
        return await NbdConnection.connect(
            self._uri,
            self._contexts,
            on_reply=self._on_reply,
            on_lost=self._asker_lost if keeps_texts else self._lost,
            keeps_texts=keeps_texts,
        )

    def _take(self, connection: NbdConnection) -> None:
        """Use a new connection, if it leads to the right thing. Raises OSError."""
        try:
            self._check(connection.facts)
        except OSError:
            connection.abandon()
            raise
        self._open.append(connection)
        self._dispatch()

    def _check(self, facts: NbdFacts) -> None:
        self.size_offered = facts.size
        if facts.size != self.facts.size:
            raise NbdLost(
                errno.ESTALE,
                f"another disk answers there now: it has {facts.size} bytes, and not "
                f"{self.facts.size}",
                self._uri,
            )
        self._accept(facts)
        missing = self.facts.contexts - facts.contexts
        if missing:
            raise NbdLost(
                errno.ESTALE,
                f"another export answers there now: it knows nothing of {min(missing)}",
                self._uri,
            )

    def _go_on_with_fewer(self, error: OSError) -> None:
        self.wanted = len(self._open)
        why = error.strerror or error
        self._tell(f"{self._uri}: no more connections than {self.wanted}: {why}")

    def when_failed(self, tell: Callable[[OSError], None]) -> None:
        """``tell`` is called once no call succeeds any more, but for ``close``: at once where it
        is so already."""
        self._on_failed = tell
        if self._failure is not None:
            tell(self._failure)

    @property
    def is_open(self) -> bool:
        """Whether one can be asked now."""
        return bool(self._open)

    # -- requests ------------------------------------------------------------------------------

    async def call(self, send: Send, length: int, *, changes: bool = False) -> None:
        """Ask, and wait for the reply. ``length``: bytes of payload, either way.

        Raises OSError: NbdErrorReply is the server's answer.
        """
        request = NbdRequest(send, length, changes, self._loop.create_future())
        if self._failure is not None:
            raise self._failure_anew()
        if self._waiting or not self._issue(request):
            self._waiting.append(request)
        await request.future

    def _issue(self, request: NbdRequest) -> bool:
        """Send it on the least busy connection that has room, if there is one."""
        best: NbdConnection | None = None
        for connection in self._open:
            if (best is None or connection.bytes < best.bytes) and connection.has_room(
                request.length
            ):
                best = connection
        if best is None:
            return False
        best.issue(request)
        return True

    def _dispatch(self) -> None:
        waiting = self._waiting
        while waiting:
            request = waiting.popleft()
            if not request.future.done() and not self._issue(request):
                waiting.appendleft(request)
                return

    def _on_reply(self) -> None:
        self._attempts = 0
        self._replied.set()
        if self._waiting:
            self._dispatch()

    # -- a lost connection ---------------------------------------------------------------------

    def _lost(
        self, connection: NbdConnection, unanswered: list[NbdRequest], error: OSError
    ) -> None:
        self.generation += 1
        self._open.remove(connection)
        self.left_changing |= connection.left_changing
        if self._failure is not None:
            self._fail_requests(unanswered)
            self._replied.set()
            return
        if not self._lasts:
            self._fail(self._given_up(error, 0))
            self._fail_requests(unanswered)
            return
        self._ask_later(unanswered, error)
        if self._loop.time() - connection.since > LASTING_S:
            self._attempts = 0
        if self._reconnecting is None:
            self._reconnecting = self._loop.create_task(
                self._reconnect(error), name=f"reconnect {self._uri}"
            )
        self._dispatch()

    def _ask_later(self, unanswered: list[NbdRequest], error: OSError) -> None:
        lost_max = REQUEST_LOST_MAX + self.wanted * ((self._retries or 0) + 1)
        for request in reversed(unanswered):
            request.lost += 1
            if request.lost < lost_max:
                self._waiting.appendleft(request)
            else:
                text = f"the connection was lost {request.lost} times over one request"
                request.future.set_exception(
                    OSError(errno.EIO, f"{text}: {error.strerror}", self._uri)
                )

    async def _reconnect(self, why: OSError) -> None:
        try:
            await self._reconnect_all(why)
            self.on_connected()
        except OSError as error:
            self._fail(error)
        finally:
            self._reconnecting = None

    async def _reconnect_all(self, why: OSError) -> None:
        """Raises OSError when there is no hope left."""
        of_this_round = 0
        while len(self._open) < self.wanted:
            # While others are answered, it is only so often that more are tried for.
            attempts = of_this_round if self._open else self._attempts
            if self._retries is not None and attempts >= self._retries:
                if not self._open:
                    raise self._given_up(why, attempts)
                self._go_on_with_fewer(why)
                return
            of_this_round += 1
            self._attempts += 1
            delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(attempts, 30))
            of = "" if self._retries is None else f" of {self._retries}"
            self._tell(
                f"{self._uri}: {why.strerror}; connecting again in {delay_s:g} s "
                f"(attempt {attempts + 1}{of})"
            )
            await asyncio.sleep(delay_s)
            # Those that are lost again meanwhile have to wait for the next time.
            for _ in range(self.wanted - len(self._open)):
                try:
                    connection = await self._connect()
                except OSError as error:
                    if self._retries is not None and isinstance(error, NbdRefused):
                        raise NbdLost(error.errno, error.strerror, self._uri) from error
                    why = error
                    break
                try:
                    self._take(connection)
                    if len(self._open) == 1:
                        self.on_connected()
                except OSError as error:  # something else answers there
                    if self._retries is not None:
                        raise
                    why = error
                    break

    def _given_up(self, why: OSError, attempts: int) -> OSError:
        tried = f"; connecting again failed {attempts} times" if attempts else ""
        return NbdLost(why.errno, f"the connection is lost: {why.strerror}{tried}", self._uri)

    def _fail(self, error: OSError) -> None:
        """From now on every call fails with this, those that wait among them."""
        is_news = self._failure is None
        if is_news:
            self._failure = error
        self._fail_requests(self._abandon())
        if is_news and self._on_failed is not None:
            self._on_failed(error)

    def _failure_anew(self) -> OSError:
        """Not the same object for everybody, each of whom adds to its traceback."""
        failure = self._failure
        assert failure is not None, "something failed"
        anew = type(failure)(failure.errno, failure.strerror, failure.filename)
        anew.__cause__ = failure.__cause__
        return anew

    def _fail_requests(self, requests: list[NbdRequest]) -> None:
        for request in requests:
            if not request.future.done():
                request.future.set_exception(self._failure_anew())

    def _abandon(self) -> list[NbdRequest]:
        requests = list(self._waiting)
        self._waiting.clear()
        for connection in self._open:
            requests += connection.abandon()
            self.left_changing |= connection.left_changing
        self._open.clear()
        return requests

    # -- the server's own text -----------------------------------------------------------------

    async def ask_again(self, send: Send, length: int, error: NbdErrorReply) -> None:
        """Ask for what failed with ``error`` once more, where the server's text can be had.

        Returns if it succeeds now; else it raises the error with the text.
        """
        async with self._asking:
            if self._failure is not None:
                raise self._failure_anew()
            if self._asker is None:
                try:
                    asker = await self._connect(keeps_texts=True)
                except OSError:
                    # What this says is of the connection, and not of the request.
                    raise error from None
                try:
                    self._check(asker.facts)
                except OSError:
                    asker.abandon()
                    raise error from None
                if self._failure is not None:  # closed meanwhile
                    asker.abandon()
                    raise self._failure_anew()
                self._asker = asker
            self._asked = error
            request = NbdRequest(send, length, False, self._loop.create_future())
            self._asker.issue(request)
            try:
                await request.future
            except asyncio.CancelledError:
                if self._asker is not None:  # the text to come would be taken for the next one's
                    self._asker.abandon()
                    self._asker = None
                raise
            self._tell(f"{self._uri}: {error.strerror}; asked once more, it went well")

    def _asker_lost(
        self, _connection: NbdConnection, unanswered: list[NbdRequest], _error: OSError
    ) -> None:
        self._asker = None
        for request in unanswered:
            assert self._asked is not None, "it was asked for that"
            request.future.set_exception(self._asked)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls."""
        if self._failure is None:
            self._failure = closed_error(self._uri)

    async def hang_up(self) -> None:
        """Let what is being written end, say goodbye, and hang up."""
        self.close()
        reconnecting = self._reconnecting
        if reconnecting is not None:
            reconnecting.cancel()
            await asyncio.wait({reconnecting})
        waiting = list(self._waiting)
        self._waiting.clear()
        self._fail_requests(waiting)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while any(connection.is_changing for connection in self._open):
                    self._replied.clear()
                    await self._replied.wait()
        except TimeoutError:
            pass
        finally:
            connections = [*self._open, *([self._asker] if self._asker is not None else [])]
            self._open.clear()
            self._asker = None
            for requests in await asyncio.gather(*(each.close() for each in connections)):
                self._fail_requests(requests)
            self.left_changing |= any(each.left_changing for each in connections)
