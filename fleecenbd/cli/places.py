"""Where things are by default: the socket, the state; and directories that are ours alone."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from fleecenbd.cli.errors import UsageError

SOCKET_NAME = "fleecenbd.sock"
CONTROL_SUFFIX = ".control"
ROOTS_STATE = Path("/var/lib/fleecenbd")


def default_socket(environment: Mapping[str, str], user_id: int) -> Path:
    """``fleecenbd.sock`` in the runtime directory: XDG's, or /run for root."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime) / SOCKET_NAME
    if user_id == 0:
        return Path("/run") / SOCKET_NAME
    raise UsageError(
        "there is no runtime directory for the socket: XDG_RUNTIME_DIR is not set; "
        "give a path with --unix"
    )


def default_control(unix: str) -> str:
    """The control socket of a server on this Unix socket; ``-``, a private one, has one beside."""
    return f"{unix}{CONTROL_SUFFIX}"


def default_state_directory(environment: Mapping[str, str], user_id: int) -> Path:
    """systemd's StateDirectory=, else XDG's, else ~/.local/state; /var/lib for root."""
    given = environment.get("STATE_DIRECTORY", "").split(":")[0]
    if os.path.isabs(given):
        return Path(given)
    state = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):
        return Path(state) / "fleecenbd"
    if user_id == 0:
        return ROOTS_STATE
    home = environment.get("HOME", "")
    if os.path.isabs(home):
        return Path(home) / ".local" / "state" / "fleecenbd"
    raise UsageError(
        "there is no place for state: neither XDG_STATE_HOME nor HOME is set; "
        "give a directory with --state-dir"
    )


def make_private_directory(path: Path) -> None:
    """Make the directory and those above it that are missing, mode 0700. Raises OSError.

    What is there keeps its mode: it is somebody's decision. ROOTS_STATE can be passed through: a
    service of another user may have its state directory in there (systemd's StateDirectory=).
    """
    if path.is_dir():
        return
    if os.path.lexists(path):
        raise NotADirectoryError(
            errno.ENOTDIR, "there is a file of this name, which is no folder", str(path)
        )
    if path.parent != path:
        make_private_directory(path.parent)
    path.mkdir(mode=0o711 if path == ROOTS_STATE else 0o700, exist_ok=True)


def state_directory(given: str | None) -> Path:
    """That of --state-dir, or the default one. Raises UsageError where there is none."""
    if given is not None:
        return Path(given)
    return default_state_directory(os.environ, os.geteuid())


def servers_directory(base: Path, address: str) -> Path:
    """The part of a default state directory that belongs to the server at one address.

    ``address``: where guests reach it, and will reach it again; no two live servers share it.
    The name says which it is to a person, and its end to nobody but us.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", address).strip("-.")[-40:]
    digest = hashlib.sha256(os.fsencode(address)).hexdigest()[:12]
    return base / "servers" / f"{stem}-{digest}"


def guests_directory(given: str | None) -> Path | None:
    """The same; None where there is none by default: a guest needs none."""
    try:
        return state_directory(given)
    except UsageError:
        return None
