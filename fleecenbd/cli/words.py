"""What was typed after ``fleecenbd serve``, and the short way to read it.

typer reads every command line, explains it, and says what is wrong with it. It takes longer to
import than a server to start. So a command line that is plainly right is read here: options whose
words are whole, each once but for lists, in any order among the disks. All else, a typing error,
help, an abbreviation, gives None, and is typer's (command_line.py). What is read here is read
there to the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fleecenbd.cli.disk_options import CACHES
from fleecenbd.cli.logs import LEVELS
from fleecenbd.engine.state import POLICIES


@dataclass(frozen=True, kw_only=True)
class ServeWords:
    """The options of ``serve`` as typed, by their names; None: not given."""

    disk: tuple[str, ...]
    unix: str | None = None
    socket_mode: str | None = None
    socket_group: str | None = None
    ip: str | None = None
    port: str | None = None
    backup_unix: str | None = None
    backup_port: str | None = None
    single: bool = False
    begin: str | None = None
    state_dir: str | None = None
    temp_limit: str | None = None
    temp_reserve: str | None = None
    cluster_size: str | None = None
    temp: str | None = None
    temp_dir: str | None = None
    temp_prealloc: bool = False
    temp_overwrite: bool = False
    on_cbw_error: str | None = None
    cbw_timeout: str | None = None
    ttl: str | None = None
    idle_ttl: str | None = None
    control: str | None = None
    metrics: str | None = None
    freeze_cmd: str | None = None
    thaw_cmd: str | None = None
    hook_timeout: str | None = None
    end_sessions: bool = False
    trust_offline: str | None = None
    forget_missing: bool = False
    default_export: str | None = None
    cache: str | None = None
    discard: tuple[str, ...] = ()
    read_only: bool = False
    shared: str = "1"
    force_share: bool = False
    run: str | None = None
    pidfile: str | None = None
    log_level: str | None = None
    json_log: bool = False


CHOICES = {
    "cache": CACHES,
    "log_level": LEVELS,
    "on_cbw_error": POLICIES,
}
"""Options of which only these words are right."""

SHORT = {
    "-U": "unix",
    "-i": "ip",
    "-p": "port",
    "-s": "single",
    "-e": "default_export",
    "-r": "read_only",
    "-P": "pidfile",
}

OPTIONS = SHORT | {
    f"--{field.name.replace('_', '-')}": field.name
    for field in fields(ServeWords)
    if field.name != "disk"
}
"""Every way to write an option -> its name in ServeWords."""

_FLAGS = {field.name for field in fields(ServeWords) if field.default is False}
_LISTS = {field.name for field in fields(ServeWords) if field.default == ()}
"""May be given more than once."""


def plain_words(arguments: Sequence[str]) -> ServeWords | None:
    """The words after ``serve``, where there is nothing to say about them; else None."""
    disks: list[str] = []
    given: dict[str, Any] = {}
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-"):
            disks.append(argument)
            continue
        option, equals, value = argument.partition("=")
        name = OPTIONS.get(option)
        if name is None or (equals and option in SHORT):
            return None
        if name in given and name not in _LISTS:
            return None
        if name in _FLAGS:
            if equals:
                return None
            given[name] = True
            continue
        if not equals:
            value = next(left, "")
        # An empty value, or one that could be an option, may have been meant otherwise.
        if not value or (value.startswith("-") and value != "-"):
            return None
        if value not in CHOICES.get(name, (value,)):
            return None
        given[name] = (*given.get(name, ()), value) if name in _LISTS else value
    if not disks or not all(map(_is_text, (*disks, *given.values()))):
        return None
    return ServeWords(disk=tuple(disks), **given)


def _is_text(value: str | bool | tuple[str, ...]) -> bool:
    """Whether it is something, in letters: bytes that are none come as lone surrogates."""
    if isinstance(value, tuple):
        return all(map(_is_text, value))
    return value is True or (value != "" and not any("\ud800" <= x <= "\udfff" for x in str(value)))
