"""Where a server's state is, and how it is taken up again before the first client is let in."""

from __future__ import annotations

import errno
import logging
import os
import shlex
from pathlib import Path

from fleecenbd.cli.endpoints import PRIVATE
from fleecenbd.cli.errors import CommandError, reason
from fleecenbd.cli.handed import Handed
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.places import make_private_directory, servers_directory
from fleecenbd.server.server import Server
from fleecenbd.server.state.directory import DESCRIPTION, StateDirectory
from fleecenbd.server.state.names import DisksMissing
from fleecenbd.server.state.recovery import recover
from fleecenbd.server.state.trust import BOOT_ID, boot_id
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)


def address_of(options: ServeOptions, handed: Handed) -> str | None:
    """Where guests reach this server, and the next one in its place; None: nowhere twice.

    The first socket that is not for backups only.
    """
    if options.addresses is not None:
        addresses = options.addresses
        if addresses.unix != PRIVATE:
            return os.path.abspath(addresses.unix)
        return f"{addresses.host or 'localhost'}:{addresses.port}" if addresses.port else None
    for endpoint in handed.endpoints or []:
        if endpoint.backup_only:
            continue
        if endpoint.unix is not None:
            return os.path.abspath(endpoint.unix) if endpoint.unix else None
        host, port, *_ = endpoint.socket.getsockname()
        return f"{host}:{port}"
    return None


def state_of(options: ServeOptions, handed: Handed) -> Path | None:
    """The state directory of this very server; None: it can have none, and nothing lasts."""
    base = options.state_directory
    if not options.lasts or base is None:
        return None
    if options.state_given:
        return base
    address = address_of(options, handed)
    return servers_directory(base, address) if address is not None else None


async def take_up(
    server: Server, options: ServeOptions, handed: Handed, boot: Path = BOOT_ID
) -> None:
    """Lock the state directory, and go on with what the last server left. Raises CommandError.

    Where there is nothing to go on with, and no place by default, nothing lasts: a guest is served
    all the same, and the log says so.
    """
    path = state_of(options, handed)
    if path is None:
        return
    # A thread of its own: the directory's disk may hang, and signals must be heard.
    pool = ThreadPool(str(path), "state", size_max=1)
    try:
        directory = await pool.run(_open, path)
        await recover(
            server,
            directory,
            boot_id(boot),
            trust_offline=options.trust_offline,
            forget_missing=options.forget_missing,
        )
    except DisksMissing as error:
        words = [name if path is None else f"{name}={path}" for name, path in error.images.items()]
        raise CommandError(
            f"cannot serve: {error}; serve {' '.join(map(shlex.quote, words))} again, or give "
            "up such sessions with --forget-missing"
        ) from error
    except OSError as error:
        text = reason(error, str(path))
        is_needed = options.state_given or options.session is not None or error.errno == errno.EBUSY
        if is_needed or await pool.run(os.path.lexists, path / DESCRIPTION):
            if "--state-dir" not in text:
                text = f"{text}; give another folder with --state-dir"
            raise CommandError(f"cannot use the state directory: {text}") from error
        logger.warning(
            "no bitmap and no session can last: %s; give another folder with --state-dir", text
        )
    finally:
        pool.close()


def _open(path: Path) -> StateDirectory:
    make_private_directory(path)
    return StateDirectory.open(path)
