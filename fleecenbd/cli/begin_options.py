"""What a session is begun with, as it is typed, and as the server is asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import typer

from fleecenbd.cli import values
from fleecenbd.cli.options import choose_session_options
from fleecenbd.engine.state import POLICIES

OnCbwError = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(POLICIES),
        show_default=False,
        help="When old data cannot be kept: give up the session, or fail the guest's write; "
        "throttle gives up the session, too, but delays writes that copy before, as the temp "
        "image fills up. Default: break-snapshot.",
    ),
]
CbwTimeout = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS",
        show_default=False,
        help="How long a guest's write may wait for old data to be kept; 0: for ever. Default: 20.",
    ),
]
TempLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        show_default=False,
        help="Most that one disk's temp image may hold, as in 10G. Default: no limit.",
    ),
]
ClusterSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        show_default=False,
        help="Unit of copying, a power of two. Default: 4k, more for disks past 256 GiB.",
    ),
]


def begin_body(
    *,
    on_cbw_error: str | None,
    cbw_timeout: str | None,
    temp_limit: str | None,
    temp_reserve: str | None,
    cluster_size: str | None,
    ttl: str | None,
    idle_ttl: str | None,
    freeze_cmd: str | None,
    thaw_cmd: str | None,
    hook_timeout: str | None,
    read_once: bool = False,
    temp: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Fields of the body of ``PUT /v1/sessions/NAME``; ``temp``: those of temp_options.py. Raises
    UsageError."""
    options = choose_session_options(
        temp_limit=temp_limit,
        temp_reserve=temp_reserve,
        cluster_size=cluster_size,
        on_cbw_error=on_cbw_error,
        cbw_timeout=cbw_timeout,
    )
    body: dict[str, Any] = {
        "on_cbw_error": options.on_cbw_error,
        "cbw_timeout": options.cbw_timeout_s,
        "temp_limit": options.temp_limit,
        "cluster_size": options.cluster_size,
        "read_once": read_once,
        **temp,
    }
    if temp_reserve is not None:
        body["temp_reserve"] = options.temp_reserve
    for key, text in (("ttl", ttl), ("idle_ttl", idle_ttl), ("hook_timeout", hook_timeout)):
        if text is not None:
            body[key] = values.parse_period(text, f"--{key.replace('_', '-')}")
    for key, command in (("freeze_cmd", freeze_cmd), ("thaw_cmd", thaw_cmd)):
        if command is not None:
            body[key] = command or None
    return body
