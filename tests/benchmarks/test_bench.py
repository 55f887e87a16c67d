"""The benchmarks from start to end, on images so small that figures mean nothing."""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks.__main__ import chosen, main
from benchmarks.peers import FLEECENBD, QEMU, Server
from benchmarks.ratios import ERROR, SHORT
from benchmarks.suites import SUITES, Step
from benchmarks.work import Place

SMALL = ("--size", "8", "--rounds", "2", "--limit", "2")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: what is measured there waits for no disk."""
    with tempfile.TemporaryDirectory(prefix="fleecenbd-test-", dir="/dev/shm") as name:
        yield Path(name)


def _run(memory: Path, output: Path, *words: str) -> tuple[int, dict, Path]:
    status = main([*SMALL, "--folder", str(memory), "--output", str(output), *words])
    (path,) = output.glob("*.json")
    return status, json.loads(path.read_text()), path


def test_a_run_prints_its_rows_and_writes_every_rounds_figures(
    memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document, path = _run(memory, tmp_path, "--rows", "pull-*,temp-size,cpu-*,temp-peak")
    printed = capsys.readouterr().out
    errors = [row["error"] for row in document["rows"] if row["verdict"] == ERROR]
    assert errors == []
    assert status == 0
    figures = [each["fleecing"]["fleecenbd"] for each in document["rounds"]]
    assert len(figures) == 2
    # 1/16 of 8 MiB in blocks of 4 KiB: what was written is kept, and nothing else.
    assert [each["temp-size"] for each in figures] == [0.5, 0.5]
    by_key = {row["key"]: row for row in document["rows"]}
    assert by_key["temp-size"]["ours"] == 0.5
    assert by_key["temp-size"]["theirs"] > 2
    assert document["machine"]["cores"] >= 1
    assert {"qemu-storage-daemon", "nbdkit", "fio", "python"} <= document["versions"].keys()
    assert "CPU seconds per GiB pulled" in printed
    for ending in (".md", ".svg"):
        assert "temp image" in path.with_suffix(ending).read_text()
    assert list(memory.iterdir()) == []
    assert main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    assert main(["--show", str(path), str(path), "--hardest", "--markdown"]) == 0
    assert "| QEMU fleecing (Debian 1" in capsys.readouterr().out


def test_a_server_that_is_missing_is_told_in_its_rows_and_in_the_exit_status(
    memory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    # A qemu-nbd that tells its version and does nothing else.
    (tools / "qemu-nbd").write_text("#!/bin/sh\n[ $1 = --version ] && echo none || exit 7\n")
    (tools / "qemu-nbd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    status, document, _ = _run(memory, tmp_path, "--rows", "read-1,read-1-nbdkit", "--rounds", "1")
    verdicts = {row["key"]: row["verdict"] for row in document["rows"]}
    assert verdicts == {"read-1": ERROR, "read-1-nbdkit": "-"}
    assert "ended with status 7" in capsys.readouterr().out
    assert status == 1


def test_a_row_that_falls_short_fails_only_where_that_was_asked_for(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"latency": {FLEECENBD: {"p99": 101.0}, QEMU: {"p99": 100.0}}}
    monkeypatch.setattr(bench, "measure", lambda *arguments: figures)
    for words, expected in (((), 0), (("--strict",), 1)):
        output = tmp_path / str(expected)
        status, document, _ = _run(memory, output, "--rows", "p99", *words)
        assert [row["verdict"] for row in document["rows"]] == [SHORT]
        assert status == expected


def test_rows_are_chosen_by_patterns_and_a_pattern_that_fits_none_is_an_error() -> None:
    assert {row.key for row in chosen("temp-*,p99")} == {
        "temp-size",
        "temp-peak",
        "temp-peak-pull",
        "p99",
    }
    with pytest.raises(RuntimeError, match="no row is called pul; there are"):
        chosen("pul")


def test_a_folder_that_is_not_there_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rows", "start", "--folder", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.endswith("none is no folder: name another\n")


def test_an_interrupted_run_stops_its_servers_and_leaves_no_file(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))  # sockets have short names
    monkeypatch.setattr(tempfile, "tempdir", str(sockets))
    pids = []

    def interrupted(server: Server, place: Place) -> dict[str, float]:
        pids.extend(server.pids)
        raise KeyboardInterrupt

    (subject,) = (each for each in SUITES[0].subjects if each.name == FLEECENBD)
    subject = replace(subject, steps=(Step(("read-16",), interrupted),))
    monkeypatch.setattr(bench, "SUITES", (replace(SUITES[0], subjects=(subject,)),))
    output = tmp_path / "output"
    words = ("--folder", str(memory), "--output", str(output), "--rows", "qemu-read-16-qemu-nbd")
    assert main([*SMALL, *words]) == 130
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()
    assert [*memory.iterdir(), *sockets.iterdir()] == []
    sockets.rmdir()
    assert not output.exists()
