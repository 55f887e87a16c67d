"""nbdkit python fleece.py disk=vm.raw session=nightly: fleecenbd's engine behind nbdkit.

Serves `vm`, the disk for its guest, and `vm@nightly`, the disk as it was when nbdkit started, for
a backup to read and to TRIM. Parameters: docs/nbdkit.md, or nbdkit python fleece.py --dump-plugin.

This file is nbdkit's callbacks and nothing else; fleecenbd.plugin does what they ask. It finds
the package from where it lies itself: in a checkout, or where a wheel has installed it.
"""

import contextlib
import functools
import os
import site
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import nbdkit


def _find_package() -> None:
    """nbdkit embeds the system's Python, which knows nothing of virtual environments."""
    here = Path(__file__).resolve()
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    folders = []
    if (here.parents[1] / "fleecenbd" / "__init__.py").exists():
        sys.path.insert(0, str(here.parents[1]))
        folders.append(here.parents[1] / ".venv" / packages)
    else:
        folders.append(here.parents[2] / packages)  # PREFIX/share/fleecenbd/fleece.py
    if active := os.environ.get("VIRTUAL_ENV"):
        folders.append(Path(active) / packages)
    for folder in folders:
        if folder.is_dir():
            known = len(sys.path)
            site.addsitedir(str(folder))
            sys.path[:] = sys.path[known:] + sys.path[:known]  # before the system's own
    try:
        import bitarray  # noqa: F401

        import fleecenbd  # noqa: F401
    except ImportError as error:
        looked = ", ".join(map(str, folders))
        sys.exit(
            f"{here}: {error}: fleecenbd is not installed for the Python that nbdkit embeds, "
            f"{sys.version.split()[0]} (looked in {looked}); install it for that one"
        )


_find_package()

from fleecenbd import __version__  # noqa: E402
from fleecenbd.cli.errors import CommandError  # noqa: E402
from fleecenbd.nbd import constants as nbd  # noqa: E402
from fleecenbd.nbd.errors import NegotiationError  # noqa: E402
from fleecenbd.plugin import parameters, words  # noqa: E402
from fleecenbd.plugin.client import PluginClient, RequestFailed  # noqa: E402
from fleecenbd.plugin.service import Service  # noqa: E402

API_VERSION = 2

Callback = TypeVar("Callback", bound=Callable[..., Any])

_parameters = parameters.Parameters()
_service: Service


def _told(callback: Callback) -> Callback:
    """Let nbdkit log one line, and answer with the right errno, where the callback fails."""

    @functools.wraps(callback)
    def call(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except (CommandError, NegotiationError) as error:
            raise words.Told(words.in_nbdkits_words(str(error))) from None
        except RequestFailed as error:
            nbdkit.set_error(error.number)
            raise words.Told(str(error)) from None

    return call  # type: ignore[return-value]


words.hide_expected_tracebacks()


# -- from the command line to the first client ---------------------------------------------


def dump_plugin() -> None:
    lines = ["fleecenbd_plugin=fleece", f"fleecenbd_version={__version__}"]
    for name, meaning in parameters.PARAMETERS.items():
        lines.append(f"fleecenbd_parameter_{name}={meaning}")
    # nbdkit does not stand an exception here; and a full disk is its own to tell.
    with contextlib.suppress(OSError):
        os.write(1, ("\n".join(lines) + "\n").encode())


@_told
def config(key: str, value: str) -> None:
    _parameters.add(key, value)


@_told
def config_complete() -> None:
    global _service
    command_line = parameters.read_command_line(parameters.own_arguments())
    options = _parameters.options(command_line, activated=parameters.is_activated())
    _service = Service(options, words.Log(nbdkit.debug))


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


@_told
def get_ready() -> None:
    _service.get_ready()


def after_fork() -> None:
    _service.after_fork()


def cleanup() -> None:
    _service.cleanup()


# -- clients -------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> Any:
    return _service.list_exports()


def default_export(readonly: bool, is_tls: bool) -> str:
    return _service.default_export()


@_told
def open(readonly: bool) -> PluginClient:
    return _service.open(nbdkit.export_name())


def close(h: PluginClient) -> None:
    h.leave()


def export_description(h: PluginClient) -> str:
    return h.info.description


def get_size(h: PluginClient) -> int:
    return h.info.size


def block_size(h: PluginClient) -> tuple[int, int, int]:
    info = h.info
    return info.block_minimum, info.block_preferred, info.block_maximum


def can_write(h: PluginClient) -> bool:
    # nbdkit knows no TRIM without WRITE: a point in time is not read-only, and refuses WRITEs.
    return not h.info.flags & nbd.NBD_FLAG_READ_ONLY


def can_flush(h: PluginClient) -> bool:
    return bool(h.info.flags & nbd.NBD_FLAG_SEND_FLUSH)


def can_trim(h: PluginClient) -> bool:
    return bool(h.info.flags & nbd.NBD_FLAG_SEND_TRIM)


def can_zero(h: PluginClient) -> bool:
    # Where we said no, nbdkit would offer it all the same, and write; so that it is ours to refuse.
    return can_write(h)


def can_fast_zero(h: PluginClient) -> bool:
    # Where we said no to what can be zeroed, a client that asks all the same would end nbdkit.
    return can_zero(h)


def can_fua(h: PluginClient) -> int:
    return nbdkit.FUA_NATIVE if h.info.flags & nbd.NBD_FLAG_SEND_FUA else nbdkit.FUA_NONE


def can_multi_conn(h: PluginClient) -> bool:
    return bool(h.info.flags & nbd.NBD_FLAG_CAN_MULTI_CONN)


def can_cache(h: PluginClient) -> int:
    return nbdkit.CACHE_NATIVE if h.info.flags & nbd.NBD_FLAG_SEND_CACHE else nbdkit.CACHE_NONE


def can_extents(h: PluginClient) -> bool:
    return True


# -- requests ------------------------------------------------------------------------------


def _flags(flags: int, *, zeroes: bool = False) -> int:
    """nbdkit's flags as the wire's."""
    result = 0
    if flags & nbdkit.FLAG_FUA:
        result |= nbd.NBD_CMD_FLAG_FUA
    if flags & nbdkit.FLAG_REQ_ONE:
        result |= nbd.NBD_CMD_FLAG_REQ_ONE
    if flags & nbdkit.FLAG_FAST_ZERO:
        result |= nbd.NBD_CMD_FLAG_FAST_ZERO
    if zeroes and not flags & nbdkit.FLAG_MAY_TRIM:
        result |= nbd.NBD_CMD_FLAG_NO_HOLE
    return result


@_told
def pread(h: PluginClient, buf: memoryview, offset: int, flags: int) -> None:
    buf[:] = h.request(nbd.NBD_CMD_READ, offset, len(buf))


@_told
def pwrite(h: PluginClient, buf: memoryview, offset: int, flags: int) -> None:
    h.request(nbd.NBD_CMD_WRITE, offset, len(buf), _flags(flags), buf)


@_told
def flush(h: PluginClient, flags: int) -> None:
    h.request(nbd.NBD_CMD_FLUSH, 0, 0)


@_told
def trim(h: PluginClient, count: int, offset: int, flags: int) -> None:
    h.request(nbd.NBD_CMD_TRIM, offset, count, _flags(flags))


@_told
def zero(h: PluginClient, count: int, offset: int, flags: int) -> None:
    h.request(nbd.NBD_CMD_WRITE_ZEROES, offset, count, _flags(flags, zeroes=True))


@_told
def cache(h: PluginClient, count: int, offset: int, flags: int) -> None:
    h.request(nbd.NBD_CMD_CACHE, offset, count)


@_told
def extents(h: PluginClient, count: int, offset: int, flags: int) -> Any:
    return h.request(nbd.NBD_CMD_BLOCK_STATUS, offset, count, _flags(flags))
