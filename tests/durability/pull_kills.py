"""Pulls whose client, server, or both are killed again and again, while a guest writes.

python -m tests.durability.pull_kills [RUNS] [SEED]

Each run is one backup: of a disk that a guest overwrites all the time, limited in its rate so that
kills fall into it. Who was killed is started again, the client with ``--resume`` where there is
something to resume. At the end the target has to be the disk as it was when the session began.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbd

from tests.controlling import Control
from tests.disks import MIB, first_difference
from tests.durability.recomputed import recomputed
from tests.serving import FLEECENBD, START_TIMEOUT_S

SIZE = 24 * MIB + 12288
RATE = "24M"
KILLS_MAX = 5
KINDS = ("raw", "qcow2", "nbd")
"""Of targets, by turns: a file, a qcow2 file, the export of an NBD server that stays."""
PULL_TIMEOUT_S = 120.0
LOG_LENGTH_MAX = 4000


class Guest(threading.Thread):
    """Overwrites the disk until it is told to stop; reconnects to the next server."""

    def __init__(self, uri: str, seed: int) -> None:
        super().__init__(name="guest", daemon=True)
        self.writes = 0
        self._uri = uri
        self._dice = random.Random(f"guest {seed}")
        self._ending = threading.Event()
        self.went_on = threading.Event()
        """Set by each write that was answered."""

    def run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(nbd.Error):
                self._write_until_killed()
            self._ending.wait(0.02)

    def _write_until_killed(self) -> None:
        client = nbd.NBD()
        client.connect_uri(self._uri)
        while not self._ending.is_set():
            length = self._dice.choice([4096, 4096, 16384, 65536])
            offset = self._dice.randrange((SIZE - length) // 4096 + 1) * 4096
            if self._dice.random() < 0.1:
                client.zero(length, offset)
            else:
                client.pwrite(self._dice.randbytes(length), offset)
            self.writes += 1
            self.went_on.set()

    def stop(self) -> None:
        """Returns when it writes no more."""
        self._ending.set()
        self.join(START_TIMEOUT_S)
        assert not self.is_alive(), "the guest hangs"


class PullRun:
    """One backup over kills."""

    def __init__(self, folder: Path, seed: int, met: Counter[str]) -> None:
        self.folder = folder
        self.met = met
        self.dice = random.Random(f"pull kills {seed}")
        self.image = folder / "vda.raw"
        self.kind = KINDS[seed % len(KINDS)]
        self.target = folder / f"out.{self.kind}"
        """The file's name once it is complete; an export has none."""
        self.journal = Path(f"{self.target}.journal")
        self.nbd: subprocess.Popen[bytes] | None = None
        self.socket = folder / "f.sock"
        self.log = (folder / "log").open("ab")
        self.server: subprocess.Popen[bytes] | None = None
        self.client: subprocess.Popen[bytes] | None = None
        self.seed = seed
        self._make_image()

    def _make_image(self) -> None:
        with self.image.open("wb") as image:
            image.truncate(SIZE)
            offset = 0
            while offset < SIZE:
                length = min(self.dice.choice([4096, 70_000, 700_000, 3_000_000]), SIZE - offset)
                if self.dice.random() < 0.7:
                    image.seek(offset)
                    image.write(self.dice.randbytes(length))
                offset += length

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def start_server(self) -> None:
        """And wait until it is ready."""
        pidfile = self.folder / "pid"
        pidfile.unlink(missing_ok=True)
        command = [FLEECENBD, "serve", f"vda={self.image}", "-U", self.socket]
        command += ["--state-dir", self.folder / "state", "-P", pidfile, "--log-level", "warning"]
        self.server = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not pidfile.exists():
            assert self.server.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.005)

    def start_target(self) -> str:
        """What the target is called; an export's server is started."""
        if self.kind != "nbd":
            return f"qcow2:{self.target}" if self.kind == "qcow2" else str(self.target)
        with (self.folder / "exported.raw").open("wb") as file:
            file.truncate(SIZE)
        socket, ready = self.folder / "t.sock", self.folder / "t.pid"
        command = ["qemu-nbd", "-f", "raw", "-t", "-e", "8", "-x", "", "-k", socket]
        command += ["--pid-file", ready, self.folder / "exported.raw"]
        self.nbd = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while not ready.exists():
            assert self.nbd.poll() is None, "qemu-nbd did not start"
            time.sleep(0.005)
        return f"nbd+unix:///?socket={socket}"

    def start_client(self) -> None:
        """With --resume where an earlier one has begun."""
        words = ["pull", self.uri("vda@n"), self.name, "--journal", str(self.journal)]
        words += ["--rate", RATE, "--checksum", "blake2b", "--progress", "json", "--retries", "8"]
        if self.journal.exists():
            words.append("--resume")
            self.met["resumes"] += 1
        self.client = subprocess.Popen(
            [sys.executable, "-m", "tests.durability.pulled", *words],
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.begun = threading.Event()
        threading.Thread(target=self._listen, args=(self.client, self.begun), daemon=True).start()

    def _listen(self, client: subprocess.Popen[bytes], begun: threading.Event) -> None:
        """Take what the client tells; ``begun``: it copies, or has ended."""
        assert client.stdout is not None
        with client.stdout:
            for line in client.stdout:
                if not line.endswith(b"\n"):
                    break  # cut short by a kill
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "start":
                    self.met["resumed with something durable"] += event["resumed"] > 0
                    begun.set()
        begun.set()

    def run(self) -> None:
        """AssertionError says what was violated."""
        self.start_server()
        self.name = self.start_target()
        snapshot = self.folder / "snapshot.raw"
        snapshot.write_bytes(self.image.read_bytes())
        Control(f"{self.socket}.control").call("PUT", "sessions/n")
        guest = Guest(self.uri("vda"), self.seed)
        guest.start()
        try:
            assert guest.went_on.wait(START_TIMEOUT_S), "the guest did not begin"
            self._pull()
        finally:
            guest.stop()
        self.met["guest writes"] += guest.writes
        self.met[f"to {self.kind}"] += 1
        difference = first_difference(self._as_raw(), snapshot)
        assert difference is None, difference
        left = {path.name for path in self.folder.iterdir() if path.name.startswith("out")}
        if self.kind == "nbd":
            assert left == {self.journal.name}, left
            return
        assert left == {self.target.name, f"{self.target.name}.blake2b"}, left
        checksum = Path(f"{self.target}.blake2b")
        assert f"root {recomputed(checksum, snapshot)}\n" in checksum.read_text()

    def _as_raw(self) -> Path:
        """What the target shows."""
        if self.kind == "raw":
            return self.target
        shown = self.folder / "exported.raw"
        if self.kind == "qcow2":
            command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.target, shown]
            subprocess.run(command, check=True)
        return shown

    def _pull(self) -> None:
        self.start_client()
        for _ in range(self.dice.randint(1, KILLS_MAX)):
            if self.dice.random() < 0.8:  # else perhaps while it starts
                self.begun.wait(START_TIMEOUT_S)
            if self._ends_within(self.dice.uniform(0, 0.6)):
                break
            self._kill(self.dice.choice(["client", "server", "both"]))
            if self.client is None:
                return
        end = time.monotonic() + PULL_TIMEOUT_S
        while not self._ends_within(PULL_TIMEOUT_S):
            assert time.monotonic() < end, "the pull does not end"

    def _ends_within(self, seconds: float) -> bool:
        """True when it is complete. One that failed, its server being killed, goes on."""
        assert self.client is not None
        try:
            status = self.client.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if status == 0:
            return True
        assert status == 1, f"the pull ended with {status}"
        assert not self.target.exists(), "it is complete, and says that it failed"
        self.met["failed"] += 1
        self.start_client()
        return False

    def _kill(self, who: str) -> None:
        assert self.client is not None
        assert self.server is not None
        self.met[f"killed {who}"] += 1
        self.met["kills"] += 1
        if who != "client":
            self.server.kill()
        if who != "server":
            self.client.kill()
            self.client.wait()
        if who != "client":
            self.server.wait()
            self.start_server()
        if who != "server":
            self.client = None
            if self.target.exists() and not self.journal.exists():
                self.met["killed when it was complete"] += 1
            else:
                self.start_client()

    def close(self) -> None:
        """Nobody is left."""
        for process in (self.client, self.server, self.nbd):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self.log.close()


def run(runs: int, seed: int, folder: Path) -> Counter[str]:
    """So many backups; AssertionError says what was violated, and the log is printed."""
    met: Counter[str] = Counter()
    for number in range(seed, seed + runs):
        home = folder / f"run-{number}"
        home.mkdir()
        one = PullRun(home, number, met)
        try:
            one.run()
        except BaseException:
            print(f"seed {number}; {dict(met)}\n{(home / 'log').read_text()[-LOG_LENGTH_MAX:]}")
            raise
        finally:
            one.close()
        met["backups"] += 1
    return met


def main() -> None:
    """The long form."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="fleecenbd-pulls-") as folder:
        print(dict(run(runs, seed, Path(folder))))


if __name__ == "__main__":
    main()
