"""What ``fleecenbd serve`` was asked to do; what contradicts itself is refused here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fleecenbd.cli import values
from fleecenbd.cli.disk_options import DiskOptions
from fleecenbd.cli.endpoints import DEFAULT_PORT, PRIVATE, Addresses
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.places import default_socket
from fleecenbd.cli.values import DiskSpec
from fleecenbd.engine.session import SessionOptions
from fleecenbd.engine.state import CLUSTER_SIZE_MIN
from fleecenbd.server.hooks import Hooks
from fleecenbd.server.temp_place import OWN_FILES, TempPlace


@dataclass(frozen=True)
class ServeOptions:
    """All that the server needs to know. ``addresses`` None: --single, or socket activation."""

    disks: tuple[DiskSpec, ...]
    """Each with what ``disk_options`` say of it."""
    addresses: Addresses | None
    state_directory: Path | None = None
    guests_directory: Path | None = None
    """Where it is noted which guests are connected; None: nowhere."""
    lasts: bool = False
    """Bitmaps and sessions outlive the server."""
    state_given: bool = False
    """The state directory is this server's alone: it was asked for."""
    end_sessions: bool = False
    trust_offline: frozenset[str] = frozenset()
    """Names of disks whose block devices nobody else writes to while we are away."""
    forget_missing: bool = False
    """Sessions that are left over a disk which is not served now are lost; else it is an error."""
    session: str | None = None
    session_options: SessionOptions = field(default_factory=SessionOptions)
    temp: TempPlace = OWN_FILES
    """Also for sessions that come later,"""
    temp_reserve: int | None = None
    """and so is this."""
    ttl_s: float | None = None
    idle_ttl_s: float | None = None
    control: str | None = None
    """Path of the control socket; None: none is made."""
    control_is_default: bool = False
    metrics: tuple[str, int] | None = None
    hooks: Hooks = field(default_factory=Hooks)
    default_export: str | None = None
    disk_options: DiskOptions = field(default_factory=DiskOptions)
    """Also for disks that come later."""
    read_only: bool = False
    force_share: bool = False
    shared: int = 1
    pidfile: Path | None = None
    command: str | None = None

    @property
    def exports(self) -> list[str]:
        """The names of all exports, guest disks first."""
        names = [disk.name for disk in self.disks]
        if self.session is not None:
            names += [f"{disk.name}@{self.session}" for disk in self.disks]
        return names

    @property
    def empty_name(self) -> str | None:
        """The export that the empty name means.

        None but for --default-export, with one exception: a client that started the server for
        itself, over one disk and a session, means the fleecing export.
        """
        if self.default_export is not None:
            return self.default_export
        if self.addresses is None and self.session is not None and len(self.disks) == 1:
            return f"{self.disks[0].name}@{self.session}"
        return None

    @property
    def command_export(self) -> str:
        """The export that ``$uri`` names for --run; "" where nothing says which."""
        if self.default_export is not None:
            return self.default_export
        if len(self.disks) > 1:
            return ""
        return self.exports[-1]


def check_default_export(options: ServeOptions) -> None:
    """Raise UsageError if the default export is none of the exports."""
    if options.default_export is not None and options.default_export not in options.exports:
        raise UsageError(
            f"--default-export: there will be no export called {options.default_export!r}; "
            f"there will be {', '.join(options.exports)}"
        )


def parse_trust_offline(given: str | None, disks: Sequence[DiskSpec]) -> frozenset[str]:
    """The names of --trust-offline. Raises UsageError for one that is no disk's."""
    names = frozenset(given.split(",")) if given is not None else frozenset()
    known = [disk.name for disk in disks]
    for name in sorted(names):
        if name not in known:
            raise UsageError(
                f"--trust-offline: there will be no disk called {name!r}; "
                f"there will be {', '.join(known)}"
            )
    return names


def refuse_together(given: dict[str, bool], why: str) -> None:
    """Raise UsageError for the first of the options (name: was it given) that was given."""
    for name, was_given in given.items():
        if was_given:
            raise UsageError(f"{name} cannot be given {why}")


def refuse_empty(given: Mapping[str, str | None]) -> None:
    """Raise UsageError for the first of the options (name: value) that was given as ''."""
    for name, value in given.items():
        if value == "":
            raise UsageError(f"{name}: '' names nothing; leave the option out, or give it a value")


def choose_addresses(
    *,
    unix: str | None,
    ip: str | None,
    port: str | None,
    backup_unix: str | None,
    backup_port: str | None,
    socket_mode: str | None,
    socket_group: str | None,
    is_private: bool,
) -> Addresses:
    """The sockets to open, from the options as typed. Raises UsageError.

    ``is_private``: where no Unix socket was asked for, it is a private one.
    """
    if backup_unix == PRIVATE:
        raise UsageError(
            "--backup-unix: '-' names no socket: only --unix can have a private one; give a path, "
            "or ./- for a file of that name"
        )
    group = values.parse_group(socket_group) if socket_group is not None else None
    mode = 0o600 if group is None else 0o660
    port_number = values.parse_port(port, "--port") if port is not None else None
    backup_number = (
        values.parse_port(backup_port, "--backup-port") if backup_port is not None else None
    )
    if ip is not None and port is None and backup_port is None:
        port_number = DEFAULT_PORT
    chosen = unix or (PRIVATE if is_private else None)
    addresses = Addresses(
        unix=chosen or str(default_socket(os.environ, os.geteuid())),
        unix_is_default=chosen is None,
        unix_mode=mode if socket_mode is None else values.parse_mode(socket_mode),
        unix_group=group,
        host=ip,
        port=port_number,
        backup_unix=backup_unix,
        backup_port=backup_number,
    )
    if port_number is not None and port_number == backup_number != 0:
        raise UsageError(
            f"port {port_number} is given twice, by --port and by --backup-port; give each its own"
        )
    _refuse_twice("--unix", addresses.unix, "--backup-unix", backup_unix)
    return addresses


def check_pidfile_is_no_socket(pidfile: str | None, addresses: Addresses) -> None:
    """Raise UsageError if a socket is to be where the pidfile is to be."""
    _refuse_twice("--unix", addresses.unix, "--pidfile", pidfile)
    _refuse_twice("--backup-unix", addresses.backup_unix, "--pidfile", pidfile)


def _refuse_twice(name: str, path: str | None, other_name: str, other: str | None) -> None:
    if path is None or other is None or path == PRIVATE:
        return
    if os.path.realpath(path) == os.path.realpath(other):
        raise UsageError(
            f"{other} is given twice, by {name} and by {other_name}; give each its own"
        )


def choose_session_options(
    *,
    temp_limit: str | None,
    temp_reserve: str | None = None,
    cluster_size: str | None,
    on_cbw_error: str | None,
    cbw_timeout: str | None,
) -> SessionOptions:
    """A session's options, from the command's as typed. Raises UsageError."""
    given: dict[str, object] = {}
    if cluster_size is not None:
        given["cluster_size"] = values.parse_size(cluster_size, "--cluster-size")
    if temp_limit is not None:
        given["temp_limit"] = values.parse_size_or_none(temp_limit, "--temp-limit", None)
    if temp_reserve is not None:
        given["temp_reserve"] = values.parse_size_or_none(temp_reserve, "--temp-reserve", 0)
    if on_cbw_error is not None:
        given["on_cbw_error"] = on_cbw_error
    if cbw_timeout is not None:
        given["cbw_timeout_s"] = values.parse_seconds(cbw_timeout, "--cbw-timeout")
    try:
        options = SessionOptions(**given)  # type: ignore[arg-type]
    except ValueError as error:
        option, _, text = str(error).partition(" ")
        raise UsageError(f"--{option.replace('_', '-')} {text}") from None
    least = options.cluster_size or CLUSTER_SIZE_MIN
    if options.temp_limit is not None and options.temp_limit < least:
        raise UsageError(
            f"--temp-limit: {temp_limit} is less than one cluster of {least} bytes, so that "
            "nothing could be kept; leave the option out for no limit"
        )
    return options


def choose_hooks(freeze: str | None, thaw: str | None, timeout: str | None) -> Hooks:
    """The server's own hooks, as typed. Raises UsageError."""
    given = Hooks(freeze or None, thaw or None)
    if timeout is None:
        return given
    return replace(given, timeout_s=values.parse_period(timeout, "--hook-timeout"))


def check_control(control: str | None, addresses: Addresses | None, pidfile: str | None) -> None:
    """Raise UsageError if another socket, or the pidfile, is to be where the control socket is."""
    if addresses is not None:
        _refuse_twice("--unix", addresses.unix, "--control", control)
        _refuse_twice("--backup-unix", addresses.backup_unix, "--control", control)
    _refuse_twice("--control", control, "--pidfile", pidfile)
