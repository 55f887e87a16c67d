"""Several disks, one moment: sessions begun under a writer that goes from disk to disk.

The writer puts a counter on vda, then on vdb, then on vdc, at full speed, each when the write
before it has been acknowledged. So at one moment of all three disks the values are n, n, n, or
n, n, n-1, or n, n-1, n-1. A session whose disks were of different moments would show others.
"""

import threading
from collections import Counter
from pathlib import Path

import nbd
import pytest

from tests.controlling import Control
from tests.serving import connected, serving

DISKS = ("vda", "vdb", "vdc")
SESSIONS = 200
SIZE = 1 << 20
OFFSET = 64 << 10


class _Writer(threading.Thread):
    """Counts on all disks in turn until it is told to stop."""

    def __init__(self, clients: list[nbd.NBD]) -> None:
        super().__init__()
        self.count = 0
        self.failure: Exception | None = None
        self._clients = clients
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                self.count += 1
                data = self.count.to_bytes(8, "little")
                for client in self._clients:
                    client.pwrite(data, OFFSET)
        except Exception as error:
            self.failure = error

    def end(self) -> None:
        self._ended.set()
        self.join()


def _is_one_moment(values: tuple[int, ...]) -> bool:
    first, second, third = values
    return (second, third) in ((first, first), (first, first - 1), (first - 1, first - 1))


def test_two_hundred_sessions_over_three_disks_are_each_of_one_moment(tmp_path: Path) -> None:
    images = [tmp_path / f"{name}.raw" for name in DISKS]
    for image in images:
        image.write_bytes(bytes(SIZE))
    shapes: Counter[tuple[int, ...]] = Counter()
    counts = []
    with (
        serving(tmp_path, *images, "--log-level", "warning") as server,
        connected(server.uri("vda")) as a,
        connected(server.uri("vdb")) as b,
        connected(server.uri("vdc")) as c,
    ):
        control = Control(f"{server.unix}.control")
        writer = _Writer([a, b, c])
        writer.start()
        try:
            for number in range(SESSIONS):
                begun = control.call("PUT", f"sessions/n{number}")
                assert begun["pause_ms"] < 5000
                values = []
                for disk in begun["disks"]:
                    with connected(disk["uri"]) as backup:
                        values.append(int.from_bytes(backup.pread(8, OFFSET), "little"))
                control.call("DELETE", f"sessions/n{number}")
                assert _is_one_moment(tuple(values)), (number, values)
                shapes[tuple(values[0] - value for value in values)] += 1
                counts.append(values[0])
        finally:
            writer.end()
        assert writer.failure is None
        control.close()
    assert counts == sorted(counts)
    assert writer.count > 5 * SESSIONS, "the writer wrote all the while"
    assert len(set(counts)) > SESSIONS // 2, "sessions are of moments of their own"
    print(f"{writer.count} rounds; of {SESSIONS} sessions: {dict(shapes)}")


@pytest.mark.parametrize("values", [(5, 5, 5), (5, 5, 4), (5, 4, 4)])
def test_the_shapes_of_one_moment(values: tuple[int, ...]) -> None:
    assert _is_one_moment(values)


@pytest.mark.parametrize(
    "values", [(5, 6, 6), (5, 4, 5), (5, 5, 3), (5, 3, 3), (4, 5, 5), (5, 5, 6)]
)
def test_other_shapes_are_noticed(values: tuple[int, ...]) -> None:
    assert not _is_one_moment(values)
