"""qemu-storage-daemon as a process of a test: spoken to over QMP on its standard streams.

`fleecing_daemon` is QEMU's own fleecing, as its users set it up: copy-before-write over the active
image, snapshot-access over that, both exported.
"""

import json
import os
import re
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.serving import run

ANSWER_TIMEOUT_S = 30.0


@cache
def qemu_version() -> int:
    """The major version of the QEMU on this machine's path."""
    found = re.search(r"version (\d+)\.", run("qemu-storage-daemon", "--version"))
    assert found is not None
    return int(found[1])


class Daemon:
    """A running qemu-storage-daemon that serves NBD on a Unix socket."""

    def __init__(self, process: subprocess.Popen[bytes], unix: Path, log: Path) -> None:
        self._process = process
        self._unix = unix
        self._log = log
        self._unread = b""

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{quote(export, safe='@')}?socket={self._unix}"

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a QMP command; what it returns. Events that came before are dropped."""
        assert self._process.stdin is not None
        line = json.dumps({"execute": name, "arguments": arguments})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        while True:
            answer = self._message()
            assert "error" not in answer, f"{name}: {answer['error']['desc']}"
            if "return" in answer:
                return answer["return"]

    def event(self, name: str, **expected: Any) -> dict[str, Any]:
        """Wait for an event with these data; all of its data."""
        while True:
            message = self._message()
            if message.get("event") == name:
                data: dict[str, Any] = message["data"]
                if expected.items() <= data.items():
                    return data

    def _message(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
            assert readable, f"qemu-storage-daemon says nothing:\n{self._log.read_text()}"
            piece = os.read(self._process.stdout.fileno(), 65536)
            assert piece, f"qemu-storage-daemon has ended:\n{self._log.read_text()}"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def daemon(directory: Path, *options: str) -> Iterator[Daemon]:
    """Run a qemu-storage-daemon with `options`, its socket and log in `directory`, until ready."""
    unix, log = directory / "qemu.sock", directory / "qemu.log"
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={unix}"]
    command += [*options, "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        started = Daemon(process, unix, log)
        # Answered by the main loop, and that begins when all of the options are done.
        started.command("qmp_capabilities")
        yield started
        assert process.poll() is None, f"qemu-storage-daemon has ended:\n{log.read_text()}"
        started.command("quit")
        process.wait(ANSWER_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


@contextmanager
def fleecing_daemon(directory: Path, disk: Path, temp: Path) -> Iterator[Daemon]:
    """QEMU's fleecing of a raw disk into a raw temp image (created): exports `vm`, `vm@nightly`.

    The fleecing export is writable, or QEMU's NBD server would not offer TRIM there. Every node
    passes discards on. QEMU's cluster is 64 KiB here.
    """
    with temp.open("wb") as image:
        image.truncate(disk.stat().st_size)
    file = "driver=file,discard=unmap,node-name"
    with daemon(
        directory,
        *("--blockdev", f"{file}=active,filename={disk}"),
        *("--blockdev", f"{file}=temp,filename={temp}"),
        *(
            "--blockdev",
            "driver=copy-before-write,discard=unmap,node-name=cbw,file=active,target=temp",
        ),
        *("--blockdev", "driver=snapshot-access,discard=unmap,node-name=snapshot,file=cbw"),
        *("--export", "type=nbd,id=guest,node-name=cbw,name=vm,writable=on"),
        *("--export", "type=nbd,id=backup,node-name=snapshot,name=vm@nightly,writable=on"),
    ) as started:
        yield started
