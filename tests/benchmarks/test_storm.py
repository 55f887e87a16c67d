"""The storm: its tables, its plot, and each of its measurements once, very small."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import slow_temp, storm_work
from benchmarks.storm import main, storm_table, wait_table
from benchmarks.storm_plot import svg
from benchmarks.storm_work import COMPARED, NBDCOPY, ONCE, PULLS, TRIM, WITHOUT, pull_in_storm
from benchmarks.work import MIB


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleecenbd-test-", dir="/dev/shm") as name:
        yield Path(name)


def _outcome(peak: int, copies: int) -> dict[str, Any]:
    return {
        "seconds": 2.0,
        "temp_peak": peak * MIB,
        "copies": copies,
        "cancelled": 3,
        "guest_rate": 1000.0,
        "guest_p99_s": 0.004,
        "samples": [(0.1, MIB), (0.2, peak * MIB)],
    }


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {TRIM: _outcome(10, 5), WITHOUT: _outcome(40, 10)},
        {TRIM: _outcome(100, 50), WITHOUT: _outcome(400, 100)},
        {TRIM: _outcome(100, 50), WITHOUT: _outcome(200, 100)},
    ]
    lines = [[cell.strip() for cell in line.split("|")] for line in storm_table(rounds).split("\n")]
    by_kind = {line[1]: line for line in lines}
    assert by_kind[TRIM][3:7] == ["100", "0.25", "50", "0.50"]
    assert by_kind[WITHOUT][3:7] == ["200", "", "100", ""]
    assert by_kind["pull"][2:4] == ["time, s", "temp peak, MiB"]


def test_waits_are_told_in_milliseconds() -> None:
    waits = {way: {"median": 0.0509, "most": 0.1} for way in slow_temp.WAYS}
    text = wait_table(waits)
    assert "nothing: it waits for the copy" in text
    assert "|                50.9 |   100.0 |" in text


def test_the_plot_has_a_line_for_each_kind_and_is_small() -> None:
    samples = {kind: [(at / 20, at * MIB) for at in range(4000)] for kind in PULLS}
    text = svg(samples)
    root = ElementTree.fromstring(text)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(PULLS)
    assert len(text) < 60_000
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert all(0 <= x <= 900 and 0 <= y <= 420 for x, y in points)
        assert points[0][1] > points[-1][1], "more is higher up"


@pytest.mark.parametrize("kind", PULLS)
def test_every_kind_of_pull_is_measured(memory: Path, kind: str) -> None:
    found = pull_in_storm(memory, kind, 16 * MIB, 64 * MIB)
    assert found.seconds > 0.1
    assert 0 < found.temp_peak <= 16 * MIB
    assert found.copies > 0
    assert found.guest_rate > 0
    assert 0 < found.guest_p99_s < 10
    assert not list(memory.glob("storm*"))


def test_what_releases_is_compared_to_what_does_not() -> None:
    assert COMPARED.keys() | set(COMPARED.values()) == PULLS.keys()
    for kind in (WITHOUT, NBDCOPY):
        assert kind not in COMPARED
    assert "--read-once" in PULLS[ONCE]("nbd:///vm0@n", "t")
    assert "--no-trim" in PULLS[WITHOUT]("nbd:///vm0@n", "t")


def test_a_target_that_is_not_the_moments_is_an_error(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(storm_work.PULLS, TRIM, lambda source, target: ["true"])
    with pytest.raises(RuntimeError, match="the target is not what the disk was at arming"):
        pull_in_storm(memory, TRIM, 4 * MIB, 64 * MIB)


def test_a_write_whose_range_is_released_does_not_wait_for_a_slow_temp_image(memory: Path) -> None:
    found = slow_temp.waits(memory, 5)
    assert found["nothing"]["median"] >= slow_temp.DELAY_S
    for way in ("TRIM", "READ_ONCE"):
        assert slow_temp.LATER_S <= found[way]["median"] < slow_temp.DELAY_S


def test_a_run_prints_its_tables_and_writes_three_files(
    tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(storm_work, "PULLS", {TRIM: PULLS[TRIM], WITHOUT: PULLS[WITHOUT]})
    monkeypatch.setattr("benchmarks.storm.PULLS", storm_work.PULLS)
    words = ["--size", "8", "--rounds", "1", "--writes", "2", "--folder", str(memory)]
    assert main([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| pull with TRIM " in printed
    assert "a TRIM of its range" in printed
    (document,) = tmp_path.glob("storm-*.json")
    assert json.loads(document.read_text())["storm"][0].keys() == {TRIM, WITHOUT}
    assert document.with_suffix(".md").read_text().strip() in printed
    assert "<polyline" in document.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [(["--size", "0"], "--size must be"), (["--writes", "100000"], "a block for each")],
)
def test_options_that_cannot_be_are_refused(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert text in capsys.readouterr().err
