"""nbdkit's parameters, ``key=value``, into what a server needs to know.

They are the options of ``fleecenbd serve`` under the same names, but for ``session=`` (--begin)
and ``disk=``, and are checked by the same code.
"""

from __future__ import annotations

import getopt
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fleecenbd.cli import values
from fleecenbd.cli.endpoints import PRIVATE, Addresses
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.options import (
    ServeOptions,
    check_default_export,
    choose_session_options,
    refuse_empty,
    refuse_together,
)
from fleecenbd.cli.places import guests_directory, state_directory
from fleecenbd.cli.values import DiskSpec

PARAMETERS = {
    "disk": "[NAME=]IMAGE: a raw file or a block device; as often as there are disks",
    "session": "NAME: begin a session over all disks before the first client is let in",
    "state-dir": "DIR: where temp images are kept",
    "temp-limit": "SIZE: most that one disk's temp image may hold",
    "temp-reserve": "SIZE or none: what the temp images' file system keeps free",
    "cluster-size": "SIZE: unit of copying, a power of two",
    "on-cbw-error": "break-snapshot, break-guest-write or throttle",
    "cbw-timeout": "SECONDS: how long a guest's write may wait for old data to be kept",
    "default-export": "NAME: the export that the empty name means",
    "read-only": "true or false: no guest may write (nbdkit -r: and no backup TRIM)",
    "force-share": "true or false: neither lock the images nor look whether others have",
}
"""By name, what stands behind the ``=``."""

MAGIC_KEY = "script"
"""What nbdkit calls an argument without a key: its python plugin says so, and means our file."""

_SESSION_ONLY = ("temp-limit", "temp-reserve", "cluster-size", "on-cbw-error", "cbw-timeout")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")

# nbdkit's own options (nbdkit --short-options, --long-options), as getopt writes them.
_SHORT = "46De:fg:i:nop:P:rst:u:U:vV"
_LONG = (
    *("ipv4-only", "ipv6-only", "dump-config", "dump-plugin", "exit-with-parent", "foreground"),
    *("help", "keepalive", "keep-alive", "new-style", "newstyle", "no-fork", "no-mc"),
    *("no-meta-contexts", "no-sr", "no-structured-replies", "old-style", "oldstyle", "print-uri"),
    *("print-url", "read-only", "readonly", "show-uri", "show-url", "single", "stdin", "swap"),
    *("tls-verify-peer", "verbose", "version", "vsock"),
    *("debug=", "export=", "export-name=", "exportname=", "filter=", "group=", "ip-addr="),
    *("ipaddr=", "log=", "mask-handshake=", "pid-file=", "pidfile=", "port=", "run="),
    *("selinux-label=", "threads=", "timeout=", "time-out=", "tls=", "tls-certificates="),
    *("tls-psk=", "unix=", "user="),
)


@dataclass(frozen=True)
class CommandLine:
    """What nbdkit was asked to do that it tells no plugin before there is a client."""

    read_only: bool = False
    """-r"""
    own_client: bool = False
    """-s, --run: one client, which the server lives for."""


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Look for those options. One that is unknown here hides what stands behind it."""
    given: set[str] = set()
    rest = list(arguments)
    while rest:
        try:
            found, rest = getopt.getopt(rest, _SHORT, _LONG)
        except getopt.GetoptError:
            break
        given |= {name for name, _ in found}
        rest = rest[1:]  # the plugin, or a parameter: options may follow
    return CommandLine(
        read_only=bool(given & {"-r", "--readonly", "--read-only"}),
        own_client=bool(given & {"-s", "--single", "--stdin", "--run"}),
    )


class Parameters:
    """What was given so far. Every call raises UsageError, in the words of ``serve``."""

    def __init__(self) -> None:
        self._disks: list[str] = []
        self._given: dict[str, str] = {}

    def add(self, key: str, value: str) -> None:
        """One ``key=value``."""
        if key in ("disk", MAGIC_KEY):
            self._disks.append(value)
        elif key not in PARAMETERS:
            raise UsageError(
                f"there is no parameter {key}=; there are "
                + ", ".join(f"{name}=" for name in PARAMETERS)
                + f" (a disk called {key} is written disk={key}={value})"
            )
        elif self._given.setdefault(key, value) is not value:
            raise UsageError(f"{key}= is given twice; give it once")

    def options(self, command_line: CommandLine, *, activated: bool) -> ServeOptions:
        """All of them. ``activated``: by systemd, or by a client that does as it does."""
        if not self._disks:
            raise UsageError("no disk is given; write disk=[NAME=]IMAGE, as in disk=vm.raw")
        given = self._given
        session, state = given.get("session"), given.get("state-dir")
        refuse_empty({"--state-dir": state})
        # nbdkit goes to / on its way into the background, and we look again from there.
        state = os.path.abspath(state) if state is not None else None
        if session is None:
            refuse_together({f"--{key}": key in given for key in _SESSION_ONLY}, "without --begin")
        else:
            values.check_name(session, "a session")
        own_client = command_line.own_client or activated
        options = ServeOptions(
            disks=tuple(map(_raw_disk, values.parse_disks(self._disks))),
            # Where nbdkit listens is its own business; whether it does decides what "" means.
            addresses=None if own_client else Addresses(PRIVATE),
            state_directory=state_directory(state) if session is not None else None,
            guests_directory=None if command_line.own_client else guests_directory(state),
            session=session,
            session_options=choose_session_options(
                temp_limit=given.get("temp-limit"),
                temp_reserve=given.get("temp-reserve"),
                cluster_size=given.get("cluster-size"),
                on_cbw_error=given.get("on-cbw-error"),
                cbw_timeout=given.get("cbw-timeout"),
            ),
            default_export=given.get("default-export"),
            read_only=command_line.read_only or self._is_true("read-only"),
            force_share=self._is_true("force-share"),
        )
        check_default_export(options)
        return options

    def _is_true(self, key: str) -> bool:
        text = self._given.get(key, "false").lower()
        if text not in (*_TRUE, *_FALSE):
            raise UsageError(f"--{key}: {text!r} is neither true nor false")
        return text in _TRUE


def _raw_disk(disk: DiskSpec) -> DiskSpec:
    """As it is seen from another folder. Raises UsageError."""
    if disk.kind != "raw":
        raise UsageError(
            f"disk {disk.name}: behind nbdkit a disk is a raw file or a block device; "
            f"fleecenbd serve {disk.name}={disk.image} serves that"
        )
    return replace(disk, path=disk.absolute)


def own_arguments() -> list[str]:
    """nbdkit's arguments, without its own name."""
    with open("/proc/self/cmdline", "rb") as file:
        words = file.read().split(b"\0")[1:-1]
    return [os.fsdecode(word) for word in words]


def is_activated() -> bool:
    """Whether sockets were handed over: nbdkit has taken that out of the environment."""
    with open("/proc/self/environ", "rb") as file:
        names = dict(word.partition(b"=")[::2] for word in file.read().split(b"\0"))
    return names.get(b"LISTEN_PID") == str(os.getpid()).encode()
