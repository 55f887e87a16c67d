"""What the tests with other people's clients share. A missing tool is an error, never a skip.

A test that starts a server through the fixture `serving`, or uses `fleeced`, runs twice: against
`fleecenbd serve`, and against nbdkit with plugins/fleece.py. What nbdkit cannot carry is marked
with the reason, `@not_behind_nbdkit(ERROR_TEXT)`, and runs against `serve` alone.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbd
import pytest

from tests import serving as of_serve
from tests.behind_nbdkit import behind_nbdkit, nbdkit_version
from tests.disks import KIB, MIB, copy_disk, make_disk
from tests.serving import Serving, connected

TOOLS = (
    "nbdcopy",
    "nbdinfo",
    "nbdsh",
    "qemu-img",
    "qemu-io",
    "qemu-storage-daemon",
    "fio",
    "nbdkit",
)

OVERWRITTEN = b"\xc3"

Serve = Callable[..., AbstractContextManager[Serving]]
"""(directory, *arguments of `serve`, tcp=, prefix=, environment=) to a running server."""

SERVERS: dict[str, Serve] = {"serve": of_serve.serving, "nbdkit": behind_nbdkit}

META_CONTEXTS = "meta contexts other than base:allocation"
ERROR_TEXT = "error text"
SPARSE_REPLIES = "sparse replies"
EXTENDED_HEADERS = "extended headers"
CANCELLING = "cancelling a request in a waiting thread"
CONTROL = "control of sessions at run time"
REASONS = (META_CONTEXTS, ERROR_TEXT, SPARSE_REPLIES, EXTENDED_HEADERS, CANCELLING, CONTROL)
"""All that nbdkit cannot carry (docs/nbdkit.md)."""

MARK = "not_behind_nbdkit"
not_behind_nbdkit = pytest.mark.not_behind_nbdkit
"""With one of REASONS: the test is about what nbdkit cannot carry."""

VANISH = "clients_vanish"
clients_vanish = pytest.mark.clients_vanish
"""A client goes with requests in flight. nbdkit before 1.34 may abort then, with any plugin, where
a connection has several threads (docs/nbdkit.md): there it is given one."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker(MARK) is not None
        metafunc.parametrize("server_kind", ["serve"] if marked else [*SERVERS])


@pytest.fixture
def serving(server_kind: str, request: pytest.FixtureRequest) -> Serve:
    """What starts a server, of the kind that it is the test's turn for."""
    serve = SERVERS[server_kind]
    vanishing = request.node.get_closest_marker(VANISH) is not None
    if vanishing and server_kind == "nbdkit" and nbdkit_version() < (1, 34):
        return partial(serve, options=["-t", "1"])
    return serve


@pytest.fixture(scope="session", autouse=True)
def _every_tool_is_there() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"missing: {', '.join(missing)} (make tools installs them)"


@dataclass(frozen=True)
class Fleeced:
    """A disk `vm` under session `nightly`, and a copy of what it held when that was armed."""

    server: Serving
    disk: Path
    before: Path
    size: int

    @property
    def guest(self) -> str:
        """URI of the guest export."""
        return self.server.uri("vm")

    @property
    def backup(self) -> str:
        """URI of the fleecing export."""
        return self.server.uri("vm@nightly")


@pytest.fixture
def fleeced(tmp_path: Path, serving: Serve) -> Iterator[Fleeced]:
    """A disk of 8 MiB and 512 bytes that the guest has partly overwritten since it was armed."""
    with _fleeced(tmp_path, serving) as fleeced:
        yield fleeced


@pytest.fixture
def fleeced_over_tcp(tmp_path: Path, serving: Serve) -> Iterator[Fleeced]:
    """The same on a TCP port."""
    with _fleeced(tmp_path, serving, tcp=True) as fleeced:
        yield fleeced


@contextmanager
def _fleeced(tmp_path: Path, serving: Serve, *, tcp: bool = False) -> Iterator[Fleeced]:
    size = 8 * MIB + 512
    disk = make_disk(tmp_path / "vm.raw", size)
    before = copy_disk(disk, tmp_path / "before.raw")
    with serving(tmp_path, disk, "--begin", "nightly", tcp=tcp) as server:
        with connected(server.uri("vm")) as guest:
            overwrite(guest, [(0, 70 * KIB), (3 * MIB + 5, 200 * KIB), (size - 512, 512)])
        yield Fleeced(server, disk, before, size)


def overwrite(guest: nbd.NBD, ranges: list[tuple[int, int]]) -> None:
    """Fill (offset, length) ranges with a byte that no disk of make_disk() repeats like that."""
    for offset, length in ranges:
        guest.pwrite(OVERWRITTEN * length, offset)


def extents(handle: nbd.NBD, context: str, length: int, offset: int = 0) -> list[tuple[int, int]]:
    """(length, flags) of each extent of a meta context over a range, neighbours merged."""
    merged: list[tuple[int, int]] = []

    def collect(name: str, _at: int, entries: list[int], _error: object) -> int:
        if name == context:
            for piece, flags in zip(entries[::2], entries[1::2], strict=True):
                if merged and merged[-1][1] == flags:
                    piece += merged.pop()[0]
                merged.append((piece, flags))
        return 0

    end = offset + length
    while offset < end:
        before = sum(piece for piece, _ in merged)
        handle.block_status(end - offset, offset, collect)
        covered = sum(piece for piece, _ in merged) - before
        assert covered > 0, f"no progress at {offset}"
        offset += covered
    return merged
