"""The table, its Markdown, and the file."""

from pathlib import Path

import pytest

from benchmarks.ratios import Result
from benchmarks.report import hardest, markdown, number, read, table, write
from benchmarks.rows import LOWER, Row

ROWS = [
    Row("pull", "pull, quiet guest", "s", "pull", "QEMU fleecing", "MB/s", 2.5, 4.0),
    Row("p99", "p99", "s", "p99", "QEMU fleecing", "us", 1.0, 0.5, LOWER),
    Row("gone", "gone", "s", "gone", "nbdkit file", "/s"),
]
RESULTS = [
    Result("pull", 2345.6, 1000.0, 2.3456, 2.1, 2.9, "SHORT"),
    Result("p99", 80.04, 200.0, 0.4, 0.3, 0.5, "aim reached"),
    Result("gone", None, None, None, None, None, "ERROR", "round 1, nbdkit file: no nbdkit"),
]


def test_the_table_marks_what_falls_short_and_tells_errors_in_full() -> None:
    lines = table(ROWS, RESULTS).splitlines()
    assert lines[2].split("  ")[0] == "pull, quiet guest"
    words = "pull, quiet guest 2346 1000 MB/s QEMU fleecing 2.35 2.10..2.90 >= 2.5 (aim 4) SHORT"
    assert " ".join(lines[2].split()) == words
    assert lines[3].split()[-6:] == ["<=", "1", "(aim", "0.5)", "aim", "reached"]
    assert lines[4].split() == ["gone", "/s", "nbdkit", "file", "ERROR"]
    assert "3 rows: 1 short of what there is to reach, 1 errors" in lines
    assert "ERROR gone: round 1, nbdkit file: no nbdkit" in lines


def test_columns_stand_below_their_heads() -> None:
    head, _, *lines = table(ROWS, RESULTS).splitlines()[:4]
    assert {line.index("QEMU fleecing") for line in lines} == {head.index("against")}


def test_the_markdown_has_a_cell_for_every_head() -> None:
    lines = markdown(ROWS, RESULTS).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| **SHORT** |")
    assert lines[4].endswith("| **ERROR** |")


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (None, ""),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (9.876, "9.88"),
        (1234.5, "1234"),
        (1e6, "1000000"),
    ],
)
def test_figures_have_three_digits_that_count(figure: float | None, words: str) -> None:
    assert number(figure) == words


def test_a_file_comes_back_as_it_was_written_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    document = {"format": 1, "rows": [RESULTS[0].as_json()]}
    write(path, document)
    assert read(path) == document
    assert Result(**read(path)["rows"][0]) == RESULTS[0]
    for content in ("", "[]", "{}", '{"format": 99}'):
        path.write_text(content)
        with pytest.raises(RuntimeError, match=str(path)):
            read(path)


def _run(system: str, *results: Result) -> dict[str, object]:
    return {"machine": {"system": system}, "rows": [each.as_json() for each in results]}


@pytest.mark.parametrize(("row", "worst"), [(ROWS[0], 2.0), (ROWS[1], 3.0)])
def test_of_several_runs_the_row_is_told_that_is_worst_for_us(row: Row, worst: float) -> None:
    runs = [
        _run(f"Debian {ratio:g}", Result(row.key, 1.0, 1.0, ratio, ratio, ratio, "reached"))
        for ratio in (2.0, 3.0)
    ]
    found = hardest(runs, row)
    assert found is not None
    assert (found[0], found[1].ratio) == (f"Debian {worst:g}", worst)


def test_of_several_runs_an_error_is_the_worst_and_a_row_in_none_is_left_out() -> None:
    runs = [
        _run("fine", RESULTS[0]),
        _run("broken", Result(**{**RESULTS[2].as_json(), "key": "pull"})),
    ]
    found = hardest(runs, ROWS[0])
    assert found is not None
    assert (found[0], found[1].verdict) == ("broken", "ERROR")
    assert hardest(runs, ROWS[1]) is None
