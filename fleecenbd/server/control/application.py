"""The calls as HTTP: routes, bodies in time, errors as JSON with one message.

{"error": "there is no session called 'nightly'"}
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from fleecenbd.server.control.bodies import Error
from fleecenbd.server.control.calls import Calls
from fleecenbd.server.control.errors import CallError
from fleecenbd.server.control.job_calls import JobCalls
from fleecenbd.server.control.metrics import CONTENT_TYPE, Metrics
from fleecenbd.server.control.openapi import document
from fleecenbd.server.events import Events

logger = logging.getLogger(__name__)

BODY_LENGTH_MAX = 64 << 10
BODY_TIMEOUT_S = 10.0
"""Seconds that a body may take to come."""
EVENT_TIMEOUT_S = 10.0
"""Seconds that a listener may leave an event unread, once the socket is full."""
ALIVE_INTERVAL_S = 15.0
"""Seconds without an event after which an empty line shows whether the listener is there."""
EVENT_LISTENERS_MAX = 16
KEEP_ALIVE_S = 15.0
"""Seconds that a connection is kept after a call, for the next one."""
LINGER_S = 1.0
"""Seconds that the rest of a body is read which was refused."""
SHUTDOWN_S = 1.0
BITMAPS = "/v1/disks/{disk}/bitmaps"
JOBS = "/v1/jobs"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BusyWith = Callable[[object, str, int], None]
"""(transport, what was asked for, status: 0 when it begins) of each call."""


def _json(status: int, content: Any) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(content) + b"\n", content_type="application/json"
    )


def _refusal(status: int, message: str) -> web.Response:
    return _json(status, Error(" ".join(message.split())))


def _watched(busy: BusyWith) -> Any:
    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        what = f"{request.method} {request.rel_url.raw_path[:200]}"
        transport = request.transport
        busy(transport, what, 0)
        status = 500
        try:
            response = await _answered(request, handler, what)
            status = response.status
            return response
        finally:
            busy(transport, what, status)

    return watch


async def _answered(request: web.Request, handler: Handler, what: str) -> web.StreamResponse:
    try:
        return await handler(request)
    except CallError as error:
        return _refusal(error.status, str(error))
    except web.HTTPNotFound:
        return _refusal(404, f"there is no call {what}; docs/control.md lists all")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _refusal(405, f"there is no call {what}; there is: {allowed}")
        response.headers["Allow"] = allowed
        return response
    except web.HTTPRequestEntityTooLarge:
        return _refusal(413, f"the body is longer than {BODY_LENGTH_MAX} bytes")
    except web.HTTPException as error:
        return _refusal(error.status, error.reason)
    except (HttpProcessingError, web.RequestPayloadError):
        return _refusal(400, "the body could not be read")
    except Exception as error:
        logger.error("internal error in %s", what, exc_info=error)
        return _refusal(500, f"internal error: {type(error).__name__}; the server's log has more")


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise CallError(408, f"the body had not come after {BODY_TIMEOUT_S:g} s") from None


class _Handlers:
    def __init__(self, calls: Calls, events: Events) -> None:
        self._calls = calls
        self._events = events
        self._listeners = 0
        self._openapi = msgspec.json.encode(document())

    def routes(self) -> list[web.RouteDef]:
        get, put, post, patch = web.get, web.put, web.post, web.patch
        delete = web.delete
        return [
            get("/v1/status", self.status, allow_head=False),
            get("/v1/disks", self.disks, allow_head=False),
            get("/v1/disks/{disk}", self.disk, allow_head=False),
            post("/v1/disks/{disk}", self.add_disk),
            delete("/v1/disks/{disk}", self.remove_disk),
            get(f"{BITMAPS}", self.bitmaps, allow_head=False),
            get(f"{BITMAPS}/{{bitmap}}", self.bitmap, allow_head=False),
            put(f"{BITMAPS}/{{bitmap}}", self.add_bitmap),
            delete(f"{BITMAPS}/{{bitmap}}", self.remove_bitmap),
            post(f"{BITMAPS}/{{bitmap}}/clear", self.clear_bitmap),
            post(f"{BITMAPS}/{{bitmap}}/merge", self.merge_bitmap),
            get("/v1/sessions", self.sessions, allow_head=False),
            get("/v1/sessions/{session}", self.session, allow_head=False),
            put("/v1/sessions/{session}", self.begin),
            patch("/v1/sessions/{session}", self.set_session),
            delete("/v1/sessions/{session}", self.finish),
            get("/v1/events", self.events, allow_head=False),
            get("/v1/openapi.json", self.openapi, allow_head=False),
        ]

    async def status(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.status())

    async def disks(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.disks())

    async def disk(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.disk(request.match_info["disk"]))

    async def add_disk(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(201, await self._calls.add_disk(request.match_info["disk"], body))

    async def remove_disk(self, request: web.Request) -> web.Response:
        await self._calls.remove_disk(request.match_info["disk"])
        return web.Response(status=204)

    async def bitmaps(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.bitmap_list(request.match_info["disk"]))

    async def bitmap(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.bitmap(*_bitmap(request)))

    async def add_bitmap(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(201, await self._calls.add_bitmap(*_bitmap(request), body))

    async def remove_bitmap(self, request: web.Request) -> web.Response:
        await self._calls.remove_bitmap(*_bitmap(request))
        return web.Response(status=204)

    async def clear_bitmap(self, request: web.Request) -> web.Response:
        return _json(200, await self._calls.clear_bitmap(*_bitmap(request)))

    async def merge_bitmap(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(200, await self._calls.merge_bitmap(*_bitmap(request), body))

    async def sessions(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.session_list())

    async def session(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.session(request.match_info["session"]))

    async def begin(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(*await self._calls.begin(request.match_info["session"], body))

    async def set_session(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(200, await self._calls.set_session(request.match_info["session"], body))

    async def finish(self, request: web.Request) -> web.Response:
        return _json(200, await self._calls.finish(request.match_info["session"], request.query))

    async def openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")

    async def events(self, request: web.Request) -> web.StreamResponse:
        """JSON lines, until the client goes or the server stops."""
        if self._listeners >= EVENT_LISTENERS_MAX:
            raise CallError(503, f"{EVENT_LISTENERS_MAX} clients listen to events already")
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        self._listeners += 1
        listener = self._events.listen()
        try:
            await response.prepare(request)
            while True:
                try:
                    async with asyncio.timeout(ALIVE_INTERVAL_S):
                        event = await listener.next()
                    if event is None:
                        break
                    line = msgspec.json.encode(event) + b"\n"
                except TimeoutError:
                    line = b"\n"
                async with asyncio.timeout(EVENT_TIMEOUT_S):
                    await response.write(line)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._events.forget(listener)
            self._listeners -= 1
        return response


class _JobHandlers:
    def __init__(self, calls: JobCalls) -> None:
        self._calls = calls

    def routes(self) -> list[web.RouteDef]:
        get, post = web.get, web.post
        return [
            get(JOBS, self.list, allow_head=False),
            post(JOBS, self.start),
            get(f"{JOBS}/{{job}}", self.show, allow_head=False),
            post(f"{JOBS}/{{job}}/pause", self.pause),
            post(f"{JOBS}/{{job}}/resume", self.resume),
            post(f"{JOBS}/{{job}}/rate", self.set_rate),
            post(f"{JOBS}/{{job}}/cancel", self.cancel),
        ]

    async def list(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.list())

    async def show(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.show(request.match_info["job"]))

    async def start(self, request: web.Request) -> web.Response:
        return _json(201, self._calls.start(await _body(request)))

    async def pause(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.pause(request.match_info["job"]))

    async def resume(self, request: web.Request) -> web.Response:
        return _json(200, self._calls.resume(request.match_info["job"]))

    async def set_rate(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(200, self._calls.set_rate(request.match_info["job"], body))

    async def cancel(self, request: web.Request) -> web.Response:
        body = await _body(request)
        return _json(200, await self._calls.cancel(request.match_info["job"], body))


def _bitmap(request: web.Request) -> tuple[str, str]:
    return request.match_info["disk"], request.match_info["bitmap"]


def _metrics_route(metrics: Metrics) -> web.RouteDef:
    async def show(request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return web.get("/metrics", show)


async def make_runner(
    calls: Calls, events: Events, busy: BusyWith, *, metrics_only: bool = False
) -> web.AppRunner:
    """The application, ready for connections: ``runner.server`` makes their protocols."""
    app = web.Application(middlewares=[_watched(busy)], client_max_size=BODY_LENGTH_MAX)
    app.router.add_routes([_metrics_route(Metrics(calls.sessions, calls.jobs))])
    if not metrics_only:
        app.router.add_routes(_Handlers(calls, events).routes())
        app.router.add_routes(_JobHandlers(JobCalls(calls.jobs)).routes())
    # What a client sends that is no HTTP is answered, and no error of ours; those are logged here.
    quiet = logging.getLogger(f"{__name__}.http")
    quiet.setLevel(logging.CRITICAL)
    runner = web.AppRunner(
        app,
        logger=quiet,
        handle_signals=False,
        access_log=None,
        keepalive_timeout=KEEP_ALIVE_S,
        lingering_time=LINGER_S,
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    return runner
