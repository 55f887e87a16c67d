"""Sizes, lengths of time and bars, as people read them."""

import pytest

from fleecenbd.cli import tables


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 << 10, "64.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_sizes_have_units_of_1024(count: int | None, shown: str) -> None:
    assert tables.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0 ms"), (0.0123, "12.3 ms"), (5, "5.0 s"), (119.96, "120.0 s"), (3725, "1:02:05")],
)
def test_lengths_of_time_are_short(seconds: float, shown: str) -> None:
    assert tables.duration(seconds) == shown


def test_moments_are_those_of_the_log() -> None:
    assert tables.moment(1_700_000_000) == "2023-11-14T22:13:20Z"


def test_what_a_server_calls_its_things_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    disk = {
        **{"name": "vda", "size": 4096, "clients": [], "sessions": [], "guest_writes": 0},
        **{"image": "/srv/[red]disk[/red].raw"},
    }
    tables.show(tables.disk_table([disk]))
    assert "/srv/[red]disk[/red].raw" in capsys.readouterr().out
