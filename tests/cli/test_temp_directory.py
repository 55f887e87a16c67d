"""A folder for temp images that is not there is told when the server starts."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from fleecenbd.cli import temp_directory
from fleecenbd.cli.temp_directory import look_for
from tests.serving import FLEECENBD, run, serving, try_run


async def _told(directory: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING):
        await look_for(str(directory))
    return [record.getMessage() for record in caplog.records]


async def test_a_folder_that_is_there_is_nothing_to_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await _told(tmp_path, caplog) == []


async def test_one_that_is_not_there_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (told,) = await _told(tmp_path / "nope", caplog)
    assert told.startswith(f"--temp-dir {tmp_path / 'nope'}: there is no such folder")


async def test_one_that_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(temp_directory, "LOOK_S", 0.1)
    monkeypatch.setattr(os.path, "isdir", lambda _: goes_on.wait())
    (told,) = await _told(tmp_path, caplog)
    goes_on.set()
    assert told.startswith(f"--temp-dir {tmp_path}: it does not answer")


def test_a_server_serves_its_guests_without_it(tmp_path: Path) -> None:
    image, temps = tmp_path / "vda.raw", tmp_path / "temps"
    image.write_bytes(bytes(1 << 20))
    with serving(tmp_path, image, "--temp-dir", temps) as server:
        assert "1048576" in run("nbdinfo", "--size", server.uri("vda"))
        control = ("--control", f"{server.unix}.control")
        begin = (FLEECENBD, "session", "begin", "n", *control)
        assert "there is no such folder for temp images" in try_run(*begin).stderr
        assert f"--temp-dir {temps}: there is no such folder" in server.messages()
        temps.write_bytes(b"")
        assert "it is no folder for temp images" in try_run(*begin).stderr
        temps.unlink()
        temps.mkdir()
        run(*begin)
