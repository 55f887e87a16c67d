"""A few kills of the long form (``make kills``), each with work in flight."""

from __future__ import annotations

from pathlib import Path

from tests.durability.kills import run


def test_guest_backup_and_chain_sit_out_kills_with_work_in_flight(tmp_path: Path) -> None:
    totals = run(6, 20, tmp_path)
    print(totals)
    assert totals.kills - totals.idle_kills >= 6
    assert totals.copies > 0
    assert totals.active > 0
    assert totals.requests > 0
