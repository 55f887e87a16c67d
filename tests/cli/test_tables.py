"""Sizes, lengths of time and bars, as people read them."""

import sys
from typing import Any

import pytest
from rich.console import Console

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


def _status(*, broken: str | None) -> dict[str, Any]:
    """A session of two disks: of the one half is released, the other broke, or is whole."""
    disks = []
    for name, why, released in (
        ("vda", None, 2048),
        ("vdb", broken, 0 if broken is None else 4096),
    ):
        disks.append(
            {
                **{"disk": name, "export": f"{name}@n", "uris": [], "broken": why, "clients": []},
                **{"size": 4096, "released": released, "accessible": 4096 - released},
                "temp": {"image": "/t", "now": 0, "peak": 4096, "limit": None},
                "guest_wait": {"p99": 0.0},
            }
        )
    session = {
        **{"name": "n", "id": "1", "state": "active" if broken is None else "broken"},
        **{"armed_at": 0, "pause_ms": 0.0, "disks": disks},
    }
    return {"version": "1", "pid": 1, "disks": [], "sessions": [session]}


def test_a_fleece_that_broke_is_no_backup_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(*tables.status_parts(_status(broken="the temp [i]image[/i] is full")))
    lines = capsys.readouterr().out.splitlines()
    (good,) = (line for line in lines if line.startswith("vda@n "))
    assert " 50 %" in good
    assert "2.0 KiB" in good
    row, why = (line for line in lines if line.startswith("vdb@n "))
    assert row.split()[:5] == ["vdb@n", "broken", "-", "-", "0"]
    assert why == "vdb@n is broken: the temp [i]image[/i] is full"


def test_where_nothing_broke_nothing_is_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(*tables.status_parts(_status(broken=None)))
    out = capsys.readouterr().out
    assert "broken" not in out
    assert "  0 %" in out


def test_what_a_server_calls_its_things_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    disk = {
        **{
            "name": "vda",
            "size": 4096,
            "image_size": 4096,
            "lost": None,
            "clients": [],
            "sessions": [],
            "guest_writes": 0,
        },
        **{"image": "/srv/[red]disk[/red].raw"},
    }
    tables.show(tables.disk_table([disk]))
    assert "/srv/[red]disk[/red].raw" in capsys.readouterr().out


def test_names_are_whole_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "console", lambda: Console(file=sys.stdout, width=40))
    (session,) = _status(broken=None)["sessions"]
    session |= {"name": "a-session-with-a-long-name", "id": "0b77d1e8-4b0e-4a57-9a50-4a3d0a5a5f3c"}
    tables.show(tables.session_table([session]))
    shown = capsys.readouterr().out
    assert session["name"] in shown
    assert session["id"] in shown
    assert tables.moment(0) not in shown, "something has to give way"
