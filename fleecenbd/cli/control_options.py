"""Options that ``serve`` and the commands of the control socket share, as typer has them."""

from __future__ import annotations

from typing import Annotated

import typer

from fleecenbd.server.hooks import HOOK_TIMEOUT_S

CONTROL = "Control while guests run"

ControlPath = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="PATH",
        rich_help_panel=CONTROL,
        show_default=False,
        help="Control socket (mode 0600). Default: the Unix socket's path and .control; none with "
        "--single and under socket activation, which can hand one over.",
    ),
]
MetricsAddress = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="ADDR:PORT",
        rich_help_panel=CONTROL,
        show_default=False,
        help="Serve /metrics for Prometheus there, to whoever asks; nothing else.",
    ),
]
FreezeCommand = Annotated[
    str | None,
    typer.Option(
        "--freeze-cmd",
        metavar="COMMAND",
        rich_help_panel=CONTROL,
        show_default=False,
        help="Run this by sh before a session is armed at run time, such as a guest agent's "
        "fsfreeze; the session does not begin if it fails. '' for none.",
    ),
]
ThawCommand = Annotated[
    str | None,
    typer.Option(
        "--thaw-cmd",
        metavar="COMMAND",
        rich_help_panel=CONTROL,
        show_default=False,
        help="Run this after arming, whatever happened. '' for none.",
    ),
]
HookTimeout = Annotated[
    str | None,
    typer.Option(
        "--hook-timeout",
        metavar="SECONDS",
        rich_help_panel=CONTROL,
        show_default=False,
        help="After this long each of these is killed, with all that it started. "
        f"Default: {HOOK_TIMEOUT_S:g}.",
    ),
]
Ttl = Annotated[
    str | None,
    typer.Option(
        "--ttl",
        metavar="SECONDS",
        rich_help_panel="How long the session lives",
        show_default=False,
        help="Finish the session, as failed, this long after it began.",
    ),
]
IdleTtl = Annotated[
    str | None,
    typer.Option(
        "--idle-ttl",
        metavar="SECONDS",
        rich_help_panel="How long the session lives",
        show_default=False,
        help="Finish it, as failed, this long after the last request to its exports.",
    ),
]
ForgetMissing = Annotated[
    bool,
    typer.Option(
        "--forget-missing",
        rich_help_panel="How long the session lives",
        help="Start though a session that the last server left is over a disk that is not served "
        "now: the session is lost. Default: refuse to start.",
    ),
]
EndSessions = Annotated[
    bool,
    typer.Option(
        "--end-sessions",
        rich_help_panel="How long the session lives",
        help="At SIGTERM end all sessions, as failed. Default: they go on when the server is "
        "started again.",
    ),
]
TrustOffline = Annotated[
    str | None,
    typer.Option(
        "--trust-offline",
        metavar="DISK[,DISK]...",
        rich_help_panel="How long the session lives",
        show_default=False,
        help="Nobody else writes to these block devices while no server has them: bitmaps and "
        "sessions over them go on after a restart. (A block device cannot tell.)",
    ),
]
