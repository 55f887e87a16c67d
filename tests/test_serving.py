"""What is looked at of a running server, which opens and closes files meanwhile."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    """A process with one file without a name, of 64 KiB, among its descriptors."""
    path = tmp_path / "temp"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 65536)
        path.unlink()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(["cat"], **pipes, pass_fds=[file.fileno()]) as process:
            yield Serving(process, tmp_path / "f.sock", None, tmp_path / "log")
            process.kill()


def test_a_file_that_is_closed_while_they_are_looked_at_is_left_out(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.temp_bytes() == 65536
    (temp,) = [name for name in server.open_files() if name.endswith(" (deleted)")]
    readlink = os.readlink

    def others_are_closed(entry: Path) -> str:
        name = readlink(entry)
        if name != temp:
            raise FileNotFoundError(entry)
        return name

    monkeypatch.setattr(os, "readlink", others_are_closed)
    assert server.temp_bytes() == 65536
    assert server.open_files() == [temp]
