"""Backups over crashes, failures and interruptions at any step, against a small server."""

from __future__ import annotations

import pytest

from tests.cli import sim_backup
from tests.cli.planted_backup import BACKUP_BUGS, BackupBug

SEEDS = 20


def test_no_crash_costs_a_moment_or_leaves_anything() -> None:
    met = sim_backup.simulate(SEEDS, 1)
    print(dict(met))
    # A simulation that meets nothing shows nothing.
    for what in ("whole", "in place", "increments", "crashes", "pending", "looked at"):
        assert met[what] >= 25, what
    for what in ("interrupted", "failed", "resumed", "failed otherwise"):
        assert met[what] >= 3, what


@pytest.mark.parametrize("bug", BACKUP_BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: BackupBug) -> None:
    seeds, said = sim_backup.hunt(bug)
    print(f"after {seeds}: {said}")
    assert 0 < seeds <= sim_backup.HUNT_SEEDS
