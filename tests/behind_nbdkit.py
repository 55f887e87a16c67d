"""The same server behind nbdkit, for a test: what `serving()` starts, by plugins/fleece.py.

Readiness is told by nbdkit's pidfile, which is a FIFO here: nbdkit writes it when it listens.
"""

import os
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.serving import START_TIMEOUT_S, Serving, free_port

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins" / "fleece.py"

# What `serve` calls otherwise.
RENAMED = {"begin": "session"}

# Where this Python's packages are not those of the checkout's own .venv.
ENVIRONMENT = {"VIRTUAL_ENV": sys.prefix}


def nbdkit_version() -> tuple[int, int]:
    """Major and minor."""
    told = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True)
    config = dict(line.split("=", 1) for line in told.stdout.splitlines())
    return int(config["version_major"]), int(config["version_minor"])


def parameters(*arguments: str | Path) -> list[str]:
    """The plugin's parameters for arguments of `serve`: they have the same names."""
    found = []
    words = iter(map(str, arguments))
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found.append(f"{RENAMED.get(name, name)}={next(words)}")
        else:
            found.append(f"disk={word}")
    return found


@contextmanager
def behind_nbdkit(
    directory: Path,
    *arguments: str | Path,
    tcp: bool = False,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    options: Sequence[str | Path] = (),
    settings: Sequence[str] = (),
    status: int = 0,
) -> Iterator[Serving]:
    """As `serving()`: nbdkit with the arguments of `serve`, stopped with SIGTERM at the end.

    nbdkit listens on one kind of socket: `tcp` is instead of the Unix socket. `options` are
    nbdkit's, `settings` are filters' parameters; `status` is what nbdkit must exit with.
    """
    unix, log, pidfile = directory / "f.sock", directory / "server.log", directory / "pidfile"
    port = free_port() if tcp else None
    listen = ["-U", str(unix)] if port is None else ["-i", "127.0.0.1", "-p", str(port)]
    command = [*prefix, "nbdkit", "-f", "-P", str(pidfile), *listen, *map(str, options)]
    command += ["python", str(PLUGIN), *parameters(*arguments), *settings]
    command += [f"state-dir={directory / 'state'}"]
    pidfile.unlink(missing_ok=True)
    os.mkfifo(pidfile)
    ready = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )
    server = Serving(process, unix, port, log, is_tcp_only=tcp)
    try:
        _wait_until_ready(process, ready, server)
        yield server
    except BaseException:
        process.kill()
        process.wait()
        print(f"nbdkit's log ({shlex.join(command)}):\n{server.messages()}")
        raise
    finally:
        os.close(ready)
    ended = server.stop()
    assert ended == status, f"nbdkit exited with {ended}:\n{server.messages()}"
    assert "Traceback" not in server.messages(), server.messages()


def _wait_until_ready(process: subprocess.Popen[bytes], ready: int, server: Serving) -> None:
    end_of_process = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ready, end_of_process], [], [], START_TIMEOUT_S)
        if ready in readable:
            return
        why = "ended before it was" if readable else "did not get"
        raise AssertionError(f"nbdkit {why} ready:\n{server.messages()}")
    finally:
        os.close(end_of_process)
