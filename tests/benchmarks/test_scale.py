"""What grows: the tables of bench-scale, and each of its measurements once, very small."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import isolation
from benchmarks.scale import growth, main, table
from benchmarks.scale_work import DIMENSIONS, Amount, Dimension, disk_size, fragmentation
from benchmarks.work import MIB

UNITS = {dimension.name: dimension.units for dimension in DIMENSIONS}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: what is measured there waits for no disk."""
    with tempfile.TemporaryDirectory(prefix="fleecenbd-test-", dir="/dev/shm") as name:
        yield Path(name)


def test_a_rate_that_falls_grows_in_cost_and_so_does_memory_that_rises() -> None:
    assert growth([[100.0], [50.0], [200.0]], "/s") == 2.0
    assert growth([[10.0], [30.0], [20.0]], "MiB") == 3.0


def test_growth_is_seen_within_a_round() -> None:
    # Every figure is ten times worse in the second round: nothing grows.
    assert growth([[100.0, 10.0, 100.0], [100.0, 10.0, 100.0]], "/s") == 1.0
    # One round in which another program had the machine does not count.
    assert growth([[100.0, 100.0, 100.0], [100.0, 10.0, 100.0]], "/s") == 1.0


def test_without_a_round_that_has_both_figures_no_growth_is_told() -> None:
    assert growth([[1.0, None], [None, 1.0]], "ms") is None
    assert growth([[1.0, None], [2.0, 1.0]], "ms") == 2.0


def test_the_table_marks_what_grows_and_what_could_not_be_measured() -> None:
    nothing = {"1": lambda amount: {}, "2": lambda amount: {}}
    dimension = Dimension("clients", nothing, {"read": "/s", "memory": "MiB"})
    columns = {
        "1": [{"read": 1000.0, "memory": 10.0}, {"read": 1100.0, "memory": 10.0}],
        "2": [{"read": 400.0, "memory": 11.0}, "OSError: refused"],
    }
    lines = [line.split() for line in table(dimension, columns).splitlines()]
    assert lines[0] == ["|", "clients", "|", "|", "1", "|", "2", "|", "grows", "|"]
    assert lines[2] == ["|", "read", "|", "/s", "|", "1050", "|", "400", "|", "2.50", "GROWS", "|"]
    assert lines[3][-2:] == ["1.10", "|"]
    columns["2"] = ["OSError: refused"] * 2
    assert "ERROR" in table(dimension, columns)


@pytest.mark.parametrize("size", [64 * MIB, 1 << 44])
def test_every_figure_of_a_disks_size_is_measured(memory: Path, size: int) -> None:
    amount = Amount(memory, requests=128, size=4 * MIB)
    figures = disk_size(size, "256k", amount)
    assert figures.keys() == UNITS["disk size"].keys()
    assert all(figure > 0 for figure in figures.values())
    # Of so large a disk no two requests share a cluster; all are kept whole.
    if size == 1 << 44:
        assert figures["temp image"] == pytest.approx(128 * 256 / 1024, rel=0.02)
    assert not (memory / "vm.raw").exists()


def test_every_figure_of_fragmentation_is_measured(memory: Path) -> None:
    amount = Amount(memory, requests=128, size=4 * MIB)
    figures = fragmentation(25, amount)
    assert figures.keys() == UNITS["blocks copied, at random"].keys()
    assert all(figure > 0 for figure in figures.values())


@pytest.mark.parametrize("other", ["nothing", "disk", "temp", "sync", "unread"])
def test_what_a_guest_feels_of_others_is_measured(
    memory: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(isolation, "PART_S", 0.5)
    figures = isolation.felt(memory, other)
    assert figures.keys() == UNITS["isolation, p99 while"].keys()
    assert all(figure > 0 for figure in figures.values())
    assert list(memory.glob("*.raw")) == []


def test_a_disk_that_did_not_stall_is_an_error(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "PART_S", 0.5)
    monkeypatch.setattr(isolation, "STALL_S", 30.0)
    with pytest.raises(RuntimeError, match="did not stall as it should"):
        isolation.felt(memory, "sync")


def test_a_run_prints_its_tables_and_writes_every_rounds_figures(
    memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--only", "sessions", "--rounds", "3", "--requests", "128", "--size", "8"]
    assert main([*words, "--folder", str(memory), "--output", str(tmp_path)]) == 0
    assert "| first-touch " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    columns = json.loads(path.read_text())["dimensions"]["sessions (the engine alone)"]
    assert {name: len(rounds) for name, rounds in columns.items()} == dict.fromkeys("0124", 3)
    assert columns["4"][0].keys() == UNITS["sessions (the engine alone)"].keys()
    # Old data is copied once for each session: that costs. (A round may meet a busy machine.)
    best = {name: max(round_["first-touch"] for round_ in columns[name]) for name in "04"}
    assert best["4"] < best["0"]
    assert list(memory.iterdir()) == []


def test_a_table_that_is_not_there_is_an_error_that_names_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--only", "disks"]) == 1
    assert "there are disk size, " in capsys.readouterr().err
