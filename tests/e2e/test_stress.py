"""Short runs of the stress script; `make stress` makes twenty longer ones."""

from pathlib import Path

import pytest

from tests.e2e.stress import one_run


@pytest.mark.parametrize(
    ("seed", "words"),
    [(1001, ""), (1002, "--cache none --temp-prealloc"), (1003, "--temp qcow2")],
)
def test_nothing_differs_hangs_or_is_left_over_under_stress(
    tmp_path: Path, seed: int, words: str
) -> None:
    counts = one_run(tmp_path, seed, loops=1, words=words.split())
    assert counts.pulls >= 4
    assert counts.kills >= 5
    assert counts.trims > 2000
    assert counts.refused == 52
