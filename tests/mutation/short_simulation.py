"""60 seeds in small lots, for mutants of the engine; not collected by a plain pytest run.

``tests/simulation/test_seeds.py`` runs ten times as many, in lots too long for each mutant.
"""

from __future__ import annotations

import pytest

from tests.simulation import world

LOTS = 12
SEEDS_PER_LOT = 5


@pytest.mark.parametrize("lot", range(LOTS))
def test_no_checker_finds_anything(lot: int) -> None:
    for seed in range(lot * SEEDS_PER_LOT, (lot + 1) * SEEDS_PER_LOT):
        assert world.run(seed).violation is None, f"seed {seed}"
