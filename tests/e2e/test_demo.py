"""`make demo`, smaller: its verdict is computed, so its exit status is a test."""

import sys
from pathlib import Path

from tests.serving import try_run

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_ends_with_equal_backups_and_less_space_by_trim() -> None:
    result = try_run(sys.executable, DEMO, "--size", "48", "--pace", "32")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "byte for byte" in result.stdout
    assert "TRIM saved" in result.stdout
    assert "FAULT" not in result.stdout
