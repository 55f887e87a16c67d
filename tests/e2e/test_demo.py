"""`make demo`, smaller: its verdict is computed, so its exit status is a test."""

import random
import sys
from pathlib import Path

from tests.disks import MIB
from tests.serving import connected, serving, try_run

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_ends_with_equal_backups_and_less_space_by_trim() -> None:
    result = try_run(sys.executable, DEMO, "--size", "48", "--pace", "32")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "byte for byte" in result.stdout
    assert "TRIM saved" in result.stdout
    assert "FAULT" not in result.stdout


PULL_INTO_A_LIMITED_FILE = """
import pathlib, resource, runpy, sys

demo, uri, target = sys.argv[1:]
names = runpy.run_path(demo)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
names["pull_with_trim"](uri, pathlib.Path(target), names["Run"]("", 8 << 20), 1 << 40)
"""


def test_the_pull_with_trim_releases_nothing_that_its_target_could_not_take(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "vm.raw"
    disk.write_bytes(random.Random("limit").randbytes(8 * MIB))
    with serving(tmp_path, disk, "--begin", "nightly") as server:
        uri = server.uri("vm@nightly")
        script = ("-c", PULL_INTO_A_LIMITED_FILE, DEMO, uri, tmp_path / "backup")
        result = try_run(sys.executable, *script)
        assert "File too large" in result.stderr
        with connected(uri) as backup:  # the step that was stored in part, and what follows
            assert bytes(backup.pread(6 * MIB, 2 * MIB)) == disk.read_bytes()[2 * MIB :]
