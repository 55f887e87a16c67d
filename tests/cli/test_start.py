"""A server starts lean: by its first reply it has imported nothing that it does not need for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import FLEECENBD, connected, serving

# What typer brings along, and what only some servers, some of the time, have a use for.
HEAVY = {
    *("typer", "click", "rich", "pydantic", "pydantic_core", "markdown_it", "pygments"),
    *("aiohttp", "msgspec", "prometheus_client", "fleecenbd.server.control"),
    *("fleecenbd.server.control_socket", "fleecenbd.server.sessions", "fleecenbd.server.views"),
    *("fleecenbd.server.jobs", "fleecenbd.server.job_process"),
    *("fleecenbd.cli.command_line", "fleecenbd.cli.command", "fleecenbd.plugin"),
    *("argparse", "email", "http", "importlib.metadata", "json", "optparse", "pickle", "zipfile"),
    *("bz2", "lzma", "platform", "random", "secrets", "shutil", "statistics", "tempfile", "uuid"),
    *("cProfile", "decimal", "fractions", "multiprocessing", "tomllib", "unittest", "xml"),
}
# A session that lasts is described: msgspec brings these along.
DESCRIBED = {"decimal", "json", "msgspec", "uuid"}
# And uuid this one, in some versions of Python.
BY_UUID = {"platform"}
# That a guest is connected is noted for the next server.
NOTED = {"json"}
# Whatever they import themselves is there in any case.
NEEDED = "import asyncio, uvloop, bitarray, ctypes"


def _imported(log: str) -> set[str]:
    """The modules that ``-X importtime`` has listed, and the packages that they are in."""
    names = set()
    for line in log.splitlines():
        if line.startswith("import time:"):
            parts = line.rpartition("|")[2].strip().split(".")
            names |= {".".join(parts[: count + 1]) for count in range(len(parts))}
    return names


@pytest.fixture(scope="module")
def needed() -> set[str]:
    command = [sys.executable, "-X", "importtime", "-c", NEEDED]
    return _imported(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def _by_the_first_reply(directory: Path, *options: str, export: str = "vm@n") -> set[str]:
    image = directory / "vm.raw"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    environment = {"PYTHONPROFILEIMPORTTIME": "1"}
    with (
        serving(directory, image, *options, environment=environment) as server,
        connected(server.uri(export)) as client,
    ):
        client.pread(4096, 0)
        return _imported(server.messages())


def test_a_server_imports_nothing_heavy_before_its_first_reply(
    tmp_path: Path, needed: set[str]
) -> None:
    imported = _by_the_first_reply(tmp_path, export="vm")
    assert "fleecenbd.server.server" in imported
    assert (imported - needed) & HEAVY <= NOTED


def test_a_session_from_the_start_costs_its_description_and_nothing_else(
    tmp_path: Path, needed: set[str]
) -> None:
    imported = _by_the_first_reply(tmp_path, "--begin", "n")
    assert DESCRIBED <= (imported - needed) & HEAVY <= DESCRIBED | BY_UUID


def test_what_an_option_needs_is_imported_with_it_alone(tmp_path: Path, needed: set[str]) -> None:
    imported = _by_the_first_reply(tmp_path, "-r", "--json-log", export="vm")
    assert (imported - needed) & HEAVY == {"json"}
    imported = _by_the_first_reply(tmp_path, "-r", export="vm")
    assert (imported - needed) & HEAVY == set()


def test_help_is_typer_s_and_would_be_noticed_in_a_server() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", FLEECENBD, "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"typer", "rich", "fleecenbd.cli.command_line"} <= _imported(result.stderr) & HEAVY
