"""The OpenAPI document of the calls, made from the types of their bodies.

python -m fleecenbd.server.control.openapi > docs/openapi.json
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from fleecenbd.server.control import bodies
from fleecenbd.server.names import NAME_LENGTH_MAX
from fleecenbd.server.views import BitmapView, DiskView, JobView, SessionView

_REF = "#/components/schemas/{name}"
_TYPES: tuple[Any, ...] = (
    bodies.AddBitmapBody,
    bodies.AddDiskBody,
    bodies.BeginAnswer,
    bodies.BeginBody,
    bodies.BitmapList,
    bodies.Disks,
    bodies.Error,
    bodies.JobBody,
    bodies.JobList,
    bodies.MergeBody,
    bodies.RateBody,
    bodies.CancelBody,
    bodies.SetBody,
    bodies.SessionList,
    bodies.Status,
    BitmapView,
    DiskView,
    JobView,
    SessionView,
)


@dataclass(frozen=True)
class _Call:
    method: str
    path: str
    summary: str
    answers: dict[int, str]
    """Status to the name of the body's schema, "" for none, or a media type."""
    errors: tuple[int, ...]
    body: str = ""
    query: tuple[dict[str, Any], ...] = ()


_RESULT = {
    "name": "result",
    "in": "query",
    "description": "whether the backup is safe; success by default",
    "schema": {"type": "string", "enum": ["success", "failed"]},
}

CALLS = (
    _Call("get", "/v1/status", "Everything at one moment", {200: "Status"}, ()),
    _Call("get", "/v1/disks", "All disks", {200: "Disks"}, ()),
    _Call("get", "/v1/disks/{disk}", "One disk", {200: "DiskView"}, (400, 404)),
    _Call(
        "post",
        "/v1/disks/{disk}",
        "Serve one more disk",
        {201: "DiskView"},
        (400, 408, 409, 413, 422, 500, 503),
        body="AddDiskBody",
    ),
    _Call(
        "delete",
        "/v1/disks/{disk}",
        "Serve a disk no more: it is synced and closed. Not while a client or a session needs it",
        {204: ""},
        (400, 404, 409, 500),
    ),
    _Call(
        "get",
        "/v1/disks/{disk}/bitmaps",
        "The recording bitmaps of a disk",
        {200: "BitmapList"},
        (400, 404),
    ),
    _Call(
        "get",
        "/v1/disks/{disk}/bitmaps/{bitmap}",
        "One bitmap",
        {200: "BitmapView"},
        (400, 404),
    ),
    _Call(
        "put",
        "/v1/disks/{disk}/bitmaps/{bitmap}",
        "Add a bitmap, which records from now on",
        {201: "BitmapView"},
        (400, 404, 408, 409, 413, 422, 500, 507),
        body="AddBitmapBody",
    ),
    _Call(
        "delete",
        "/v1/disks/{disk}/bitmaps/{bitmap}",
        "Remove a bitmap. Not while a session that resets it is not finished",
        {204: ""},
        (400, 404, 409, 500, 507),
    ),
    _Call(
        "post",
        "/v1/disks/{disk}/bitmaps/{bitmap}/clear",
        "Forget what has changed until now",
        {200: "BitmapView"},
        (400, 404, 409, 422, 500, 507),
    ),
    _Call(
        "post",
        "/v1/disks/{disk}/bitmaps/{bitmap}/merge",
        "Add what another bitmap of the disk says to this one",
        {200: "BitmapView"},
        (400, 404, 408, 409, 413, 422, 500, 507),
        body="MergeBody",
    ),
    _Call(
        "get",
        "/v1/sessions",
        "All sessions that are not finished, and the last 20 that are",
        {200: "SessionList"},
        (),
    ),
    _Call("get", "/v1/sessions/{session}", "One session", {200: "SessionView"}, (400, 404)),
    _Call(
        "put",
        "/v1/sessions/{session}",
        "Begin a session. 200: the same owner has begun it before with the same options",
        {201: "BeginAnswer", 200: "BeginAnswer"},
        (400, 404, 408, 409, 413, 422, 500, 503, 504, 507),
        body="BeginBody",
    ),
    _Call(
        "patch",
        "/v1/sessions/{session}",
        "Change a session that goes on: the limit of its temp images",
        {200: "SessionView"},
        (400, 404, 408, 413, 422, 500, 503, 504, 507),
        body="SetBody",
    ),
    _Call(
        "delete",
        "/v1/sessions/{session}",
        "Finish a session; the answer is its state just before",
        {200: "SessionView"},
        (400, 404, 422),
        query=(_RESULT,),
    ),
    _Call(
        "get",
        "/v1/jobs",
        "Backups that the server makes: those that run, and the last 20 that have ended",
        {200: "JobList"},
        (),
    ),
    _Call(
        "post",
        "/v1/jobs",
        "Back up a disk of a session to a target",
        {201: "JobView"},
        (400, 404, 408, 409, 413, 422, 503),
        body="JobBody",
    ),
    _Call("get", "/v1/jobs/{job}", "One job", {200: "JobView"}, (400, 404)),
    _Call(
        "post",
        "/v1/jobs/{job}/pause",
        "Read nothing more; what was read still becomes durable",
        {200: "JobView"},
        (400, 404, 409, 503),
    ),
    _Call("post", "/v1/jobs/{job}/resume", "Go on", {200: "JobView"}, (400, 404, 409, 503)),
    _Call(
        "post",
        "/v1/jobs/{job}/rate",
        "Limit what it reads per second",
        {200: "JobView"},
        (400, 404, 408, 409, 413, 422, 503),
        body="RateBody",
    ),
    _Call(
        "post",
        "/v1/jobs/{job}/cancel",
        "End it; answered once it has ended",
        {200: "JobView"},
        (400, 404, 408, 409, 413, 422, 500),
        body="CancelBody",
    ),
    _Call(
        "get",
        "/v1/events",
        "What happens from now on, one JSON object a line; empty lines mean nothing",
        {200: "application/jsonl"},
        (503,),
    ),
    _Call("get", "/v1/openapi.json", "This document", {200: "application/json"}, ()),
    _Call("get", "/metrics", "The state for Prometheus", {200: "text/plain"}, ()),
)


def document() -> dict[str, Any]:
    """The document, as plain values."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    for schema in schemas.values():
        if "description" in schema:
            # A docstring: Python 3.13 takes its indent away itself, earlier ones leave it.
            schema["description"] = inspect.cleandoc(schema["description"])
    paths: dict[str, Any] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fleecenbd control",
            "version": "1",
            "summary": "Disks, sessions and their state while guests run",
            "description": "HTTP on the control socket of `fleecenbd serve`; see docs/control.md.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(call: _Call) -> dict[str, Any]:
    words = re.findall(r"\{(\w+)\}", call.path)
    last = call.path.rsplit("/", 1)[-1].strip("{}").replace(".json", "")
    if last in ("clear", "merge"):
        last = f"{last}_bitmap"
    elif last in ("pause", "resume", "rate", "cancel"):
        last = f"{last}_job"
    operation: dict[str, Any] = {
        "operationId": f"{call.method}_{last}",
        "summary": call.summary,
        "responses": {
            **{str(status): _answer(name) for status, name in call.answers.items()},
            **{
                str(status): {"description": _ERRORS[status], **_json("Error")}
                for status in call.errors
            },
        },
    }
    parameters = [
        {
            "name": word,
            "in": "path",
            "required": True,
            "schema": {
                "type": "string",
                "minLength": 1,
                "maxLength": NAME_LENGTH_MAX,
                "pattern": "^[A-Za-z0-9._-]+$",
            },
        }
        for word in words
    ]
    if parameters or call.query:
        operation["parameters"] = [*parameters, *call.query]
    if call.body:
        # A begin may be asked for with all its defaults.
        operation["requestBody"] = {
            "required": call.body not in ("BeginBody", "AddBitmapBody", "CancelBody"),
            **_json(call.body),
        }
    return operation


_ERRORS = {
    400: "the name, or the body, is none",
    404: "there is none of this name",
    408: "the body did not come in time",
    409: "it is in use, or somebody else's",
    413: "the body is too long",
    422: "a field is unknown, or its value is not possible",
    500: "it failed; the message says why",
    503: "the server is stopping, or all places are taken",
    504: "guest writes, or a hook, did not end in time",
    507: "no space for a temp image",
}


def _json(name: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(name=name)}
    return {"content": {"application/json": {"schema": schema}}}


def _answer(name: str) -> dict[str, Any]:
    if not name:
        return {"description": "done"}
    if "/" in name:
        return {"description": "done", "content": {name: {}}}
    return {"description": "done", **_json(name)}


def text() -> str:
    """The document as it stands in docs/openapi.json."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
