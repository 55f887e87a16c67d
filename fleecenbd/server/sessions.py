"""Sessions begun and finished while guests run: whose they are, their hooks, how long they live.

    begin   refuse what cannot be ▶ make ▶ freeze command ▶ arm ▶ thaw command, whatever happened
    finish  by whoever asks, by ``ttl`` since arming, by ``idle_ttl`` since the last request

The server arms and ends sessions; here is what stands around that. A begin runs in a task of its
own: who asked for it may go, come back, ask again with the same owner and the same options, and
get the same session.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.recording import KEEP, USE
from fleecenbd.engine.resizing import is_away
from fleecenbd.engine.room import holds_space
from fleecenbd.engine.session import Session
from fleecenbd.server.asks import Ask, lasting
from fleecenbd.server.bitmaps import Bitmaps
from fleecenbd.server.catalog import FINISHED_MAX
from fleecenbd.server.exports import FleecingExport
from fleecenbd.server.guest_hooks import GuestHooks
from fleecenbd.server.places import Places
from fleecenbd.server.server import Server
from fleecenbd.server.temp_making import adding
from fleecenbd.server.views import (
    DiskView,
    Life,
    SessionView,
    Uris,
    disk_view,
    session_view,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """The answer to a begin. ``is_new``: the session was not there before."""

    session: Session
    warnings: tuple[str, ...]
    is_new: bool = True


@dataclass
class _Known:
    """A session that is not finished, and what it was begun with."""

    ask: Ask
    begun: Begun
    used_at: float
    """The loop's time of the last request."""
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    over: str | None = None
    """Why it is ended by nobody who asked: which of its times is over."""


class Sessions:
    """The sessions of a server at run time."""

    def __init__(self, server: Server, places: Places) -> None:
        self.finished: deque[SessionView] = deque(maxlen=FINISHED_MAX)
        """The last ones, oldest first, as they were just before their end."""
        self.bitmaps = Bitmaps(server)
        self._server = server
        self._places = places
        self._known: dict[str, _Known] = {}
        self._beginning: dict[str, tuple[Ask, asyncio.Task[Begun]]] = {}
        self._writes: dict[Disk, int] = {}
        """Guest writes that a disk had had when its last session began."""
        self.results = {"success": 0, "failed": 0}
        """Finished sessions since the start, counted."""
        self._closed = False
        server.finishing.append(self._ends)

    # -- begin -----------------------------------------------------------------------------

    async def begin(self, name: str, ask: Ask) -> Begun:
        """Begin a session, or find the one that the same owner has begun with the same options.

        Raises OSError: EEXIST where the name is somebody else's, ENOENT for an unknown disk,
        ESHUTDOWN, what a hook or arming failed with. Cancelling it ends the waiting only.
        """
        running = self._beginning.get(name)
        if running is None:
            known = self._known.get(name)
            if known is not None and name in self._server.sessions:
                self._check_same(name, ask, known.ask)
                return replace(known.begun, is_new=False)
            self._check_possible(name, ask)
            task = asyncio.get_running_loop().create_task(
                self._begin(name, ask), name=f"begin {name}"
            )
            self._beginning[name] = (ask, task)
            task.add_done_callback(partial(self._begin_ended, name))
            return await asyncio.shield(task)
        self._check_same(name, ask, running[0])
        begun = await asyncio.shield(running[1])
        if self._server.sessions.get(name) is not begun.session:
            return await self.begin(name, ask)  # it was finished while the guest was being thawed
        return replace(begun, is_new=False)

    def _begin_ended(self, name: str, task: asyncio.Task[Begun]) -> None:
        del self._beginning[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever asked may have gone.
            text = str(error)
            if isinstance(error, OSError) and error.strerror:
                where = f"{error.filename}: " if error.filename is not None else ""
                text = f"{where}{error.strerror}"
            logger.warning("session %s could not begin: %s", name, text)

    def _check_same(self, name: str, ask: Ask, other: Ask) -> None:
        if ask.owner is None or ask.owner != other.owner:
            raise OSError(
                errno.EEXIST,
                f"there is a session called {name} already; finish it, or take another name",
            )
        if ask != other:
            raise OSError(
                errno.EEXIST,
                f"session {name} is this owner's, but was begun with other options; "
                "finish it, or ask with the same ones",
            )

    def _check_possible(self, name: str, ask: Ask) -> None:
        """What needs no guest to be frozen to be refused."""
        if self._closed:
            raise OSError(errno.ESHUTDOWN, f"session {name} cannot begin: the server is stopping")
        if name in self._server.sessions:
            raise OSError(errno.EEXIST, f"there is a session called {name} already")
        for disk_name in self._server.disks if ask.disks is None else ask.disks:
            disk = self._server.disk(disk_name)
            if ask.bitmap is not None and ask.bitmap.mode in (USE, KEEP):
                self.bitmaps.find(disk.name, ask.bitmap.name)

    async def _begin(self, name: str, ask: Ask) -> Begun:
        make_temp = self._places.make_temp(name, ask.temp)
        names = list(self._server.disks) if ask.disks is None else list(ask.disks)
        warnings = self._warnings(names)
        hooks = GuestHooks(self._server.events, name, names, ask)
        try:
            if (store := self._server.store) is not None:
                store.extras[name] = lasting(ask)
            session = await self._server.begin(
                name,
                names,
                ask.options,
                make_temp,
                bitmap=ask.bitmap,
                owner=ask.owner,
                guests=hooks,
            )
        finally:
            warnings += await hooks.thawed()
        begun = Begun(session, tuple(warnings))
        for warning in warnings:
            logger.warning("session %s: %s", name, warning)
        if name in self._server.sessions:  # the thaw command may have taken its time
            self.adopt(session, ask, begun)
        return begun

    def _warnings(self, names: Sequence[str]) -> list[str]:
        """A disk that is away; what makes it likely that its guest writes past this server."""
        warnings = []
        for name in names:
            disk = self._server.disks.get(name)
            if disk is not None and is_away(disk):
                warnings.append(f"{disk.device.name} does not answer: reads of {name} wait for it")
            if disk is None or self._server.read_only:
                continue
            before = self._writes.get(disk)
            if not self._server.clients_of(name):
                warnings.append(f"no guest is connected to {name}: does it write past this server?")
            elif before is not None and before == disk.writes:
                warnings.append(
                    f"no guest has written to {name} since its last session: "
                    "does it write past this server?"
                )
        return warnings

    def adopt(self, session: Session, ask: Ask, begun: Begun | None = None) -> None:
        """Look after a session of the server that is not looked after yet."""
        loop = asyncio.get_running_loop()
        known = _Known(ask, begun or Begun(session, ()), used_at=loop.time())
        self._known[session.name] = known
        for fleece in session.fleeces:
            # One that is not of our making began with the server: before the first guest write.
            self._writes[fleece.disk] = fleece.disk.writes if begun is not None else 0
        if ask.ttl_s is not None:
            left = session.armed_at + ask.ttl_s - time.time()
            known.timers["ttl"] = loop.call_later(
                max(left, 0), self._too_old, session, "its ttl is over", f"{ask.ttl_s:g} s"
            )
        if ask.idle_ttl_s is not None:

            def used() -> None:
                known.used_at = loop.time()

            for fleece in session.fleeces:
                export = self._server.exports[fleece.name]
                assert isinstance(export, FleecingExport), "it has the name of one"
                export.tell_use(used)
            self._watch_use(session, known, ask.idle_ttl_s)

    async def set_temp_limit(self, name: str, limit: int | None) -> SessionView:
        """Another limit for each temp image of a session, from this step on; None: no limit.

        What is above a lower one stays, and nothing is added. Raises OSError: ENOENT, EINVAL for
        less than a cluster, ESHUTDOWN, and what writing it down failed with (it holds all the same,
        until the server ends).
        """
        session = self._server.session(name)
        if self._server.stopping:
            raise OSError(errno.ESHUTDOWN, f"session {name} is not changed: the server is stopping")
        if session.state != "active":
            raise OSError(
                errno.EPIPE, f"session {name} is {session.state}: nothing is kept for it any more"
            )
        if limit is not None and any(holds_space(fleece.temp) for fleece in session.fleeces):
            raise OSError(
                errno.EINVAL,
                f"session {name} has preallocated temp images, which took all of their space at "
                "the start: there is no limit to set",
            )
        least = max(fleece.cluster_size for fleece in session.fleeces)
        if limit is not None and limit < least:
            raise OSError(
                errno.EINVAL,
                f"a temp limit of {limit} bytes is less than one cluster of {least} bytes, so that "
                "nothing could be kept; set it higher",
            )
        session.options = replace(session.options, temp_limit=limit)
        for fleece in session.fleeces:
            fleece.state.temp_limit = limit
        logger.info(
            "session %s: its temp limit is %s now", name, "none" if limit is None else limit
        )
        if self._server.store is not None:
            await self._server.store.commit()
        return self.view(session)

    # -- end -------------------------------------------------------------------------------

    def finish(self, name: str, *, failed: bool = False) -> SessionView:
        """End a session; as it was. Raises OSError: ENOENT, with its result if it was finished;
        ESHUTDOWN once the server stops, since then the session is the next one's."""
        if self._server.stopping:
            raise OSError(
                errno.ESHUTDOWN,
                f"session {name} cannot be finished now: the server is stopping; ask the next one",
            )
        if name not in self._server.sessions:
            for view in reversed(self.finished):
                if view.name == name:
                    raise OSError(
                        errno.ENOENT, f"session {name} is finished already ({view.result})"
                    )
        self._server.finish(name, failed=failed)
        return self.finished[-1]

    async def written(self) -> None:
        """Return when every end is written down, where sessions last."""
        if self._server.store is not None:
            await self._server.store.settle()

    def _ends(self, session: Session, failed: bool) -> None:
        """The server ends a session, whoever asked for it."""
        if self._server.stopping:
            return  # nobody will ask
        view = self._view(session, lambda export: ())  # they lead nowhere any more
        result = "failed" if failed else "success"
        self.results[result] += 1
        known = self._known.pop(session.name, None)
        self.finished.append(
            replace(
                view,
                state="finished",
                reason=view.reason if known is None else view.reason or known.over,
                result=result,
                finished_at=time.time(),
                ttl_left=None,
                idle_ttl_left=None,
            )
        )
        if known is not None:
            for timer in known.timers.values():
                timer.cancel()

    def _too_old(self, session: Session, why: str, detail: str) -> None:
        if self._server.sessions.get(session.name) is session:
            logger.warning("session %s %s: %s (%s)", session.name, session.id, why, detail)
            self._known[session.name].over = why
            self._server.finish(session.name, failed=True)

    def _watch_use(self, session: Session, known: _Known, idle_ttl_s: float) -> None:
        loop = asyncio.get_running_loop()
        left = known.used_at + idle_ttl_s - loop.time()
        if left <= 0:
            detail = f"nobody has asked for anything for {idle_ttl_s:g} s"
            self._too_old(session, "its idle ttl is over", detail)
        else:
            known.timers["idle_ttl"] = loop.call_later(
                left, self._watch_use, session, known, idle_ttl_s
            )

    async def close(self) -> None:
        """The server stops: begin no more; thaw what is frozen."""
        self._closed = True
        tasks = [task for _, task in self._beginning.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- disks -----------------------------------------------------------------------------

    async def add_disk(self, name: str, image: str) -> DiskView:
        """Serve one more disk. Raises OSError."""
        if name in self._server.disks:
            raise OSError(errno.EEXIST, f"there is a disk called {name} already")
        disk = await self._places.open_disk(name, image)
        try:
            async with adding(disk):
                self._server.add_disk(disk)
        except BaseException:
            disk.device.close()
            raise
        logger.info("disk %s: added, %s", name, image)
        return self.disk_view(name)

    async def remove_disk(self, name: str) -> None:
        """Serve it no more, sync and close it. Raises OSError as Server.remove_disk."""
        disk = self._server.disk(name)
        await self._server.remove_disk(name)
        self._writes.pop(disk, None)

    # -- views -----------------------------------------------------------------------------

    def view(self, session: Session) -> SessionView:
        """What there is to see of a session that is not finished."""
        return self._view(session, self._places.uris)

    def _view(self, session: Session, uris: Uris) -> SessionView:
        known = self._known.get(session.name)
        life = Life()
        if known is not None:
            ask = known.ask
            idle_s = asyncio.get_running_loop().time() - known.used_at
            life = Life(
                ttl=ask.ttl_s,
                ttl_left=_left(ask.ttl_s, time.time() - session.armed_at),
                idle_ttl=ask.idle_ttl_s,
                idle_ttl_left=_left(ask.idle_ttl_s, idle_s),
            )
        return session_view(self._server, session, life, uris)

    def active_views(self) -> list[SessionView]:
        """Those that are not finished, oldest first."""
        return [self.view(session) for session in self._server.sessions.values()]

    def views(self) -> list[SessionView]:
        """The last finished ones, then the others; oldest first."""
        return [*self.finished, *self.active_views()]

    def disk_views(self) -> list[DiskView]:
        """All disks."""
        return [self.disk_view(name) for name in self._server.disks]

    def disk_view(self, name: str) -> DiskView:
        """The disk of this name. Raises OSError(ENOENT)."""
        return disk_view(self._server, self._server.disk(name), self._places.uris)

    def find(self, name: str) -> SessionView:
        """The session of this name, or else the last finished one. Raises OSError(ENOENT)."""
        if name not in self._server.sessions:
            for view in reversed(self.finished):
                if view.name == name:
                    return view
        return self.view(self._server.session(name))


def _left(total: float | None, spent: float) -> float | None:
    return None if total is None else max(0.0, total - spent)
