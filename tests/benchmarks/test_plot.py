"""The bars of the plot."""

import xml.etree.ElementTree as ET

from benchmarks.plot import COLOURS, svg
from benchmarks.ratios import Result
from benchmarks.rows import LOWER, Row

SVG = "{http://www.w3.org/2000/svg}"


def _bars(rows: list[Row], results: list[Result]) -> list[dict[str, str]]:
    return [element.attrib for element in ET.fromstring(svg(rows, results)).iter(f"{SVG}rect")][1:]


def _row(better: str, title: str = "work") -> Row:
    return Row("key", title, "s", "m", "peer", "/s", 2.0, 3.0, better)


def _result(ratio: float, verdict: str = "reached") -> Result:
    return Result("key", 1.0, 1.0, ratio, ratio, ratio, verdict)


def test_a_bar_goes_right_for_what_is_better_on_either_kind_of_row() -> None:
    rows = [_row("higher"), _row(LOWER), _row("higher"), _row(LOWER)]
    more, less, worse, slower = _bars(rows, [_result(ratio) for ratio in (4.0, 0.25, 0.25, 4.0)])
    assert (more["x"], more["width"]) == (less["x"], less["width"])
    assert (worse["x"], worse["width"]) == (slower["x"], slower["width"])
    assert float(worse["x"]) < float(more["x"])


def test_a_bar_beyond_the_scale_ends_at_its_end() -> None:
    inside, outside = _bars([_row("higher")] * 2, [_result(16.0), _result(1e9)])
    assert inside["width"] == outside["width"]


def test_what_falls_short_has_a_colour_of_its_own_and_an_error_no_bar() -> None:
    error = Result("key", None, None, None, None, None, "ERROR", "gone")
    bars = _bars([_row("higher")] * 2, [_result(1.5, "SHORT"), error])
    assert [bar["fill"] for bar in bars] == [COLOURS[True]]
    assert ">ERROR<" in svg([_row("higher")], [error])


def test_titles_are_text_and_no_markup() -> None:
    ET.fromstring(svg([_row("higher", "a < b & c")], [_result(2.0)]))
