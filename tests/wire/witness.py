"""Who watches while others misbehave: a guest that is served all the while; the server's memory."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from types import TracebackType

from tests.nbd import wire
from tests.wire.client import Client

MIB = 1 << 20
ROUNDS_MIN = 20
PAUSE_S = 0.005
"""Between two rounds of the guest: it is there to wait, not to compete."""


class Memory:
    """Resident memory of a process, from procfs: how far its peak is above the start, in bytes."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        # proc(5): the peak begins anew.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self.start = self._read("VmRSS")

    def _read(self, name: str) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
        raise AssertionError(f"no {name} in {self._status}")

    @property
    def grown(self) -> int:
        return self._read("VmHWM") - self.start

    @property
    def grown_now(self) -> int:
        return self._read("VmRSS") - self.start


class Guest:
    """A guest in a thread of its own: it writes, reads back, flushes; each with its latency.

    It stays for ``ROUNDS_MIN`` rounds at least.
    """

    def __init__(self, path: Path) -> None:
        self.latencies_s: list[float] = []
        self._path = path
        self._stop = threading.Event()
        self._served = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="guest")

    def __enter__(self) -> Guest:
        self._thread.start()
        self._served.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Let it end its rounds; whatever it met is raised here."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise AssertionError(f"the guest was not served: {self._failure!r}")

    @property
    def slowest_s(self) -> float:
        return max(self.latencies_s)

    def _run(self) -> None:
        try:
            with Client(self._path, "vm", wire.STRUCTURED) as client:
                for number in itertools.count():
                    if self._stop.wait(PAUSE_S) and number >= ROUNDS_MIN:
                        break
                    self._round(client, number)
                    self._served.set()
        except BaseException as error:
            self._failure = error
        finally:
            self._served.set()

    def _round(self, client: Client, number: int) -> None:
        offset = 16 * MIB + number % 64 * 4096
        data = bytes([number % 255 + 1]) * 4096
        for command, payload in ((wire.WRITE, data), (wire.READ, b""), (wire.FLUSH, b"")):
            begin = time.monotonic()
            reply = client.ask(command, offset, 4096, payload=payload)
            self.latencies_s.append(time.monotonic() - begin)
            assert reply.error == 0
            assert command != wire.READ or reply.data == data
